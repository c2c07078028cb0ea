"""Every PPO patch of the v0.20.0 series against the unpatched tree, as test_parity_v020.py does for RLOO: the same
prompts, sampled tokens, log-probabilities, values, rewards, advantages, loss, gradients and parameters of the policy
and of the value model after three generated batches. Ragged prompts and responses, two micro-batches."""

import pytest
from test_parity_v020 import ARGUMENTS, SETTINGS, TOLERANCE, assert_same

FIRST_STAGE, LAST_STAGE = 6, 10
PPO = ARGUMENTS | {"algorithm": "ppo"}


def run(run_probe, variant: str, arguments=None, **settings) -> dict:
    # kl_coef and the clip ranges wide enough that every term of the loss counts
    return run_probe(variant, PPO | (arguments or {}), **(SETTINGS | {"dtype": "float64", "kl_coef": 0.2} | settings))


def assert_is_a_test(reference: dict) -> None:
    """The comparison would mean little if nothing was learned, padded or different in the second epoch."""
    steps = sorted({int(name.split(".")[0][4:]) for name in reference if name.startswith("step")})
    assert len(steps) >= 6
    first, last = f"step{steps[0]}", f"step{steps[-1]}"
    for name in ("policy.lm_head.weight", "value_model.score.weight", "value_model.model.embed_tokens.weight"):
        assert (reference[f"{first}.param.{name}"] - reference[f"{last}.param.{name}"]).abs().max() > 1e-5, name
    assert reference[f"{first}.padding_mask"].any(), "responses are not ragged"
    assert any((ids == 0).any() for name, ids in reference.items() if name.endswith("input_ids")), "prompts not ragged"
    for name in ("logprobs", "ref_logprobs", "values", "returns", "rewards", "advantages"):
        assert reference[f"{last}.{name}"].abs().max() > 1e-3, name
    assert (reference["step0.loss"] - reference["step1.loss"]).abs() > 1e-6


def test_reward_function_matches_reward_model_bit_for_bit(run_probe):
    reference = run(run_probe, "baseline")
    assert_is_a_test(reference)
    assert_same(run(run_probe, "string-level@6"), reference, 0.0)


def test_series_matches_upstream_in_float64(run_probe):
    assert_same(run(run_probe, "string-level"), run(run_probe, "baseline"), TOLERANCE["float64"])


def test_a_small_change_is_seen(run_probe):
    """Negative control: the comparison fails for a change of one setting that only PPO has."""
    changed = run(run_probe, "string-level", {"vf_coef": 0.101})
    with pytest.raises(AssertionError, match="differs by|input_ids|sequences|query_responses"):
        assert_same(changed, run(run_probe, "baseline"), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(FIRST_STAGE + 1, LAST_STAGE + 1))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_patch_matches_upstream(run_probe, stage, dtype):
    reference = run(run_probe, "baseline", dtype=dtype)
    assert_same(run(run_probe, f"string-level@{stage}", dtype=dtype), reference, TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"lora_rank": 4, "learning_rate": 3e-3},
        {"rows_per_rollout": 2},
        {"logprob_chunk_tokens": 1},
        {"rows_per_micro_batch": 6},
    ],
    ids=lambda change: "-".join(f"{key}={value}" for key, value in change.items()),
)
def test_series_matches_upstream_with(run_probe, change):
    assert_same(run(run_probe, "string-level", **change), run(run_probe, "baseline", **change), TOLERANCE["float64"])


@pytest.mark.slow
def test_series_matches_upstream_with_a_reward_model(run_probe):
    ours = run(run_probe, "string-level", {"reward_as_module": True})
    assert_same(ours, run(run_probe, "baseline"), TOLERANCE["float64"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [{"cliprange": 1e-4}, {"cliprange_value": 1e-3}, {"kl_estimator": "k3"}], ids=str
)
def test_series_matches_upstream_with_argument(run_probe, arguments):
    ours = run(run_probe, "string-level", arguments)
    assert_same(ours, run(run_probe, "baseline", arguments), TOLERANCE["float64"])
