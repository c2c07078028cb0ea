"""The v1.16.0 series against the unpatched tree: prompts, sampled tokens, loss, gradients and parameters after three
steps with a KL penalty, two prompts per step, ragged prompts and responses, two micro-batches per step."""

import pytest
from test_parity_v020 import assert_same

SETTINGS = {"rows_per_micro_batch": 3, "learning_rate": 3e-4, "epochs_per_batch": 2, "kl_coef": 0.1}
ARGUMENTS = {"adam_epsilon": 1e-4}


def run(run_probe, variant: str, **settings) -> dict:
    return run_probe(variant, ARGUMENTS, **(SETTINGS | {"steps": 4} | settings))


def test_fused_head_on_valid_positions_matches_upstream(run_probe):
    reference = run(run_probe, "upstream")
    assert_same(run(run_probe, "upstream@1"), reference, 1e-5)
    steps = {name.split(".")[0] for name in reference if name.startswith("step") and name.endswith(".loss")}
    assert steps == {"step0", "step1", "step2", "step3"}
    assert any((value == 0).any() for name, value in reference.items() if name.endswith("input_ids")), "not ragged"
    first, last = reference["step0.param.lm_head.weight"], reference["step3.param.lm_head.weight"]
    assert (first - last).abs().max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [{"lora_rank": 4, "learning_rate": 3e-3}, {"gradient_checkpointing": True}], ids=str
)
def test_fused_head_on_valid_positions_matches_upstream_with(run_probe, change):
    assert_same(run(run_probe, "upstream@1", **change), run(run_probe, "upstream", **change), 1e-5)


def test_a_small_change_is_seen(run_probe):
    """Negative control."""
    changed, reference = run(run_probe, "upstream@1", kl_coef=0.101), run(run_probe, "upstream")
    with pytest.raises(AssertionError, match="differs by|input_ids|sequences"):
        assert_same(changed, reference, 1e-5)
