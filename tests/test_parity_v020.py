"""Every patch of the v0.20.0 series against the unpatched tree: the same prompts, sampled tokens, log-probabilities,
advantages, loss, gradients, and parameters after three generated batches (two optimizer steps or more on each, so that
the ratio is not one). Two prompts per batch, ragged prompts and responses, two micro-batches per step."""

import pytest
import torch

LAST_STAGE = 5
# eps 1e-4: Adam at 1e-8 turns rounding of a near-zero gradient into a full step
ARGUMENTS = {"adam_epsilon": 1e-4, "stop_token": "eos", "missing_eos_penalty": 1.0}
SETTINGS = {"rows_per_micro_batch": 3, "rows_per_forward": 2, "logprob_chunk_tokens": 5, "learning_rate": 3e-4}
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def assert_same(ours: dict, reference: dict, tolerance: float) -> None:
    """Integer tensors equal, others within `tolerance` (absolute), the same keys in both. Logged statistics go through
    float32 tensors of the trainer, so they are compared to 1e-6 at best."""
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        found = ours[name]
        assert found.shape == expected.shape, name
        if expected.dtype.is_floating_point:
            worst = (found.double() - expected.double()).abs().max().item()
            allowed = max(tolerance, 1e-6) if name.startswith("log") else tolerance
            assert worst <= allowed, f"{name} differs by {worst:.2e}"
        else:
            assert torch.equal(found, expected), name


def assert_is_a_test(reference: dict, rows: int = 6) -> None:
    """The comparison would mean little if nothing was learned, padded or clipped."""
    assert len([name for name in reference if name.startswith("step") and name.endswith(".loss")]) >= 6
    masks = [value for name, value in reference.items() if name.endswith("padding_mask")]
    assert masks[0].shape[0] == rows and any(m.any() for m in masks), "responses are not ragged"
    prompts = [value for name, value in reference.items() if name.endswith("input_ids")]
    assert any((ids == 0).any() for ids in prompts), "prompts are not ragged"
    assert reference["step0.advantages"].abs().min() > 0
    assert max(value.abs().max() for name, value in reference.items() if "step5.grad" in name) > 1e-3
    first, last = reference["step0.param.lm_head.weight"], reference["step5.param.lm_head.weight"]
    assert (first - last).abs().max() > 1e-4
    ratios = (reference["step1.loss"] - reference["step0.loss"]).abs()
    assert ratios > 1e-6, "the second epoch has the same loss: the ratio is still one"


@pytest.mark.parametrize("stage", range(1, LAST_STAGE + 1))
def test_patch_matches_upstream_in_float64(run_probe, stage):
    reference = run_probe("baseline", ARGUMENTS, dtype="float64", **SETTINGS)
    assert_is_a_test(reference)
    ours = run_probe(f"string-level@{stage}", ARGUMENTS, dtype="float64", **SETTINGS)
    assert_same(ours, reference, TOLERANCE["float64"])


def test_series_matches_upstream_in_float32(run_probe):
    reference = run_probe("baseline", ARGUMENTS, dtype="float32", **SETTINGS)
    assert_same(run_probe("string-level", ARGUMENTS, dtype="float32", **SETTINGS), reference, TOLERANCE["float32"])


def test_the_reward_function_sees_the_batch_that_upstream_shows_it(run_probe):
    settings = SETTINGS | {"reward": "killing_reward:rank"}
    reference = run_probe("baseline", ARGUMENTS, dtype="float64", **settings)
    assert_same(run_probe("string-level", ARGUMENTS, dtype="float64", **settings), reference, TOLERANCE["float64"])


def test_series_matches_upstream_with_token_ids(run_probe):
    reference = run_probe("baseline", ARGUMENTS, dtype="float64", **SETTINGS)
    ours = run_probe("string-level", ARGUMENTS | {"token_ids": True}, dtype="float64", **SETTINGS)
    assert_same(ours, reference, TOLERANCE["float64"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(1, LAST_STAGE))
def test_patch_matches_upstream_in_float32(run_probe, stage):
    reference = run_probe("baseline", ARGUMENTS, dtype="float32", **SETTINGS)
    ours = run_probe(f"string-level@{stage}", ARGUMENTS, dtype="float32", **SETTINGS)
    assert_same(ours, reference, TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"lora_rank": 4, "learning_rate": 3e-3},
        {"lora_rank": 4, "learning_rate": 3e-3, "gradient_checkpointing": True},
        {"rloo_k": 2, "prompts_per_step": 3},
        {"rloo_k": 6, "prompts_per_step": 1},
        {"rows_per_forward": 1, "logprob_chunk_tokens": 1},
        {"rows_per_micro_batch": 6, "rows_per_forward": 4},
    ],
    ids=lambda change: "-".join(f"{key}={value}" for key, value in change.items()),
)
def test_series_matches_upstream_in_float64_with(run_probe, change):
    settings = SETTINGS | change
    reference = run_probe("baseline", ARGUMENTS, dtype="float64", **settings)
    assert_same(run_probe("string-level", ARGUMENTS, dtype="float64", **settings), reference, TOLERANCE["float64"])


@pytest.mark.parametrize("change", [{"temperature": 0.901}, {"kl_coef": 0.06}, {"seed": 1}], ids=str)
def test_a_small_change_is_seen(run_probe, change):
    """Negative control: the comparison fails for a change of one setting."""
    reference = run_probe("baseline", ARGUMENTS, dtype="float64", **SETTINGS)
    changed = run_probe("string-level", ARGUMENTS, dtype="float64", **SETTINGS | change)
    with pytest.raises(AssertionError, match="differs by|input_ids|sequences|query_responses"):
        assert_same(changed, reference, 1e-5)


def test_series_matches_upstream_where_ratios_are_clipped(run_probe):
    arguments = ARGUMENTS | {"cliprange": 1e-4}
    reference = run_probe("baseline", arguments, dtype="float64", **SETTINGS)
    shares = [value for name, value in reference.items() if name.endswith("policy/clipfrac_avg")]
    assert max(shares) > 0.1, "no ratio was clipped"
    ours = run_probe("string-level", arguments, dtype="float64", **SETTINGS)
    assert_same(ours, reference, TOLERANCE["float64"])
