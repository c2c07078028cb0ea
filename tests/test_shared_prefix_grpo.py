"""`GRPOConfig(shared_prefix=True)` of the v1.16.0 series against the unpatched tree, over real optimizer steps.

The runs, comparisons and faults are those of `test_shared_prefix_rloo.py` with the other trainer, on equal footing as
described there. What GRPO adds are losses whose weight per token depends on the lengths in a training step (`grpo`,
`bnpo`), in an optimizer step (`dapo`) or on neither. Two rows per training step and three per group: a step is never a
group, so a loss that took its weights from the groups, or from the micro-batches of the shared prefix, would be seen.
"""

import json

import pytest
import torch
from test_shared_prefix_rloo import (
    ALSO_EXACT,
    NUM_PATCHES,
    TOLERANCE,
    assert_identical,
    assert_is_a_test,
    assert_peak_does_not_grow,
    assert_same,
    equal_runs,
    run_script,
)

STAGE_BEFORE = 4
VOCAB_SIZE = 8192  # of the probe model's tokenizer
SETTINGS = {"rows_per_micro_batch": 2}


@pytest.fixture(scope="session")
def run_grpo(tmp_path_factory, probe_model):
    """`run_grpo(variant, extra_arguments, processes=1, **settings)` -> dict of tensors, see `equal_runs`."""
    run = equal_runs(tmp_path_factory.mktemp("grpo"), probe_model)

    def run_with_grpo(variant: str, extra: dict, processes: int = 1, **settings) -> dict:
        settings = {"dtype": "float64"} | SETTINGS | settings
        return run(variant, {"_algorithm": "GRPO", "max_grad_norm": 0.2} | extra, processes, **settings)

    return run_with_grpo


# From 2 iterations on the ratio is not one; these bounds then clip some tokens and sequences but not all.
NARROW = {"epsilon": 1e-3, "epsilon_high": 2e-3, "delta": 1.004}
ENTROPY = {"entropy_coef": 0.3}
# The entropy of these runs stays above the target, so the coefficient falls to zero; or below it, so that it rises.
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_coef": 0.2, "entropy_target": 7.0, "entropy_coef_delta": 0.1}
RISING = ADAPTIVE | {"entropy_target": 20.0}
QUANTILE = {"loss_type": "grpo", "top_entropy_quantile": 0.5} | ENTROPY


@pytest.mark.parametrize("extra", [ENTROPY, pytest.param(QUANTILE, marks=pytest.mark.slow)], ids=str)
def test_flag_off_is_bit_identical_to_the_release(run_grpo, extra):
    reference = run_grpo("upstream@0", extra, dtype="float32")
    ours = run_grpo(f"upstream@{NUM_PATCHES}", extra | {"_released_head": True}, dtype="float32")
    assert_identical(ours, reference)


@pytest.mark.parametrize("extra", [{}, {"loss_type": "bnpo"} | RISING], ids=str)
def test_shared_prefix_matches_upstream_in_float64(run_grpo, extra):
    reference = run_grpo("upstream", extra)
    assert_is_a_test(reference)
    assert_same(run_grpo("shared-prefix", extra), reference, TOLERANCE["float64"])
    if extra.get("use_adaptive_entropy"):
        coefficients = [value.item() for name, value in reference.items() if name.endswith("entropy_coef")]
        assert len(coefficients) >= 3 and min(coefficients) > 0.2 and max(coefficients) > 0.35, "no bonus is applied"


def test_a_masked_completion_far_from_the_policy_has_no_gradient(run_grpo):
    """Its ratio to the reference model is beyond the largest number, and infinity times a mask of 0 is no number."""
    rare = {"suppress_tokens": [token for token in range(VOCAB_SIZE) if token != 5]}
    extra = {"mask_truncated_completions": True, "generation_kwargs": rare}
    settings = {"response_tokens": 1, "temperature": 1e-5, "kl_coef": 0.1}
    reference = run_grpo("upstream", extra, **settings)
    ours = run_grpo("shared-prefix", extra, **settings)
    assert_same(ours, reference, TOLERANCE["float64"])
    gradients = [value for name, value in ours.items() if ".grad." in name]
    assert gradients and all((value == 0).all() for value in gradients)


def test_weights_of_another_partition_are_seen(run_grpo):
    """Negative control: `bnpo` with the token count of the optimizer step in place of the training step's."""
    extra = {"loss_type": "bnpo"} | ENTROPY
    with pytest.raises(AssertionError, match="differ from those of the training step"):
        run_grpo("shared-prefix", extra | {"_fault": "weights of the optimizer step"})


@pytest.mark.slow
def test_completions_in_another_order_are_seen(run_grpo):
    """Negative control."""
    ours, reference = run_grpo("shared-prefix", {"_fault": "completions in another order"}), run_grpo("upstream", {})
    with pytest.raises(AssertionError, match=r"^(generate|step)\d\."):
        assert_same(ours, reference, 1e-5)


@pytest.mark.slow
def test_a_loss_that_is_not_divided_by_the_accumulation_steps_is_seen(run_grpo):
    """Negative control: the trainer compares it with that of the training step."""
    with pytest.raises(AssertionError, match="losses whose gradients were accumulated differ"):
        run_grpo("shared-prefix", {"_fault": "loss not divided by the accumulation steps"})


SEQUENCE = {"importance_sampling_level": "sequence"}
OFF_POLICY = {"off_policy_mask_threshold": 1e-4}
LORA = {"lora_rank": 4, "learning_rate": 3e-3}


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra, settings",
    [
        ({"loss_type": "grpo"} | NARROW, {}),
        ({"loss_type": "grpo"} | NARROW | SEQUENCE, {}),
        ({"loss_type": "bnpo"} | NARROW, {}),
        ({"loss_type": "dr_grpo"} | NARROW, {}),
        ({"loss_type": "dapo"} | NARROW | OFF_POLICY, {}),
        ({"loss_type": "cispo", "epsilon_high": 1.001}, {}),
        ({"loss_type": "sapo"}, {}),
        ({"loss_type": "luspo"} | SEQUENCE, {"kl_coef": 0.0}),  # a loss of shape (B, 1)
        ({"loss_type": "luspo"} | NARROW, {}),
        ({"loss_type": "vespo"}, {}),
        ({"use_bias_correction_kl": False, "scale_rewards": "batch"}, {}),
        ({"mask_truncated_completions": True, "loss_type": "grpo"}, {}),
        ({"mask_truncated_completions": True}, {"response_tokens": 1}),  # whole optimizer steps are masked
        (ADAPTIVE, {}),
        ({"loss_type": "bnpo"} | ENTROPY, {}),
        ({}, {"epochs_per_batch": 1}),  # no old log-probabilities
        ({} | ENTROPY, {"epochs_per_batch": 1, "kl_coef": 0.0}),
        ({"steps_per_generation": 6, "loss_type": "bnpo"}, {"steps": 8}),
        ({"steps_per_generation": 12} | NARROW, {"rows_per_micro_batch": 1, "steps": 8}),
        ({"steps_per_generation": 1}, {"rows_per_micro_batch": 3}),  # two generations per optimizer step
        ({"steps_per_generation": 1}, {"rows_per_micro_batch": 3, "epochs_per_batch": 1}),
        ({}, {"rows_per_micro_batch": 6}),
        ({"sync_ref_model": True, "ref_model_sync_steps": 1, "repetition_penalty": 1.2, "top_k": 50}, {}),
        ({"pad_to_multiple_of": 16}, {}),
        ({}, {"gradient_checkpointing": True}),
        ({"loss_type": "grpo"}, LORA),
        ({}, LORA | {"gradient_checkpointing": True}),
        ({"_evaluate": True, "per_device_eval_batch_size": 3} | ENTROPY, {}),
        ({"_rollout": {}} | OFF_POLICY, {}),
        ({"_rollout": {}, "loss_type": "grpo"} | SEQUENCE | ENTROPY, {}),
        ({"_rollout": {"with_vllm": True}} | OFF_POLICY, {}),
        ({"_rollout": {"with_vllm": True}, "vllm_importance_sampling_mode": "token_truncate"}, {}),
        ({"_rollout": {"with_vllm": True}, "vllm_importance_sampling_mode": "token_mask", "loss_type": "vespo"}, {}),
    ],
    ids=str,
)
def test_shared_prefix_matches_upstream_in_float64_with(run_grpo, extra, settings):
    reference = run_grpo("upstream", extra, **settings)
    assert_same(run_grpo("shared-prefix", extra, **settings), reference, TOLERANCE["float64"])
    if "epsilon" in extra:
        assert any(value > 0 for name, value in reference.items() if "clip_ratio/region" in name), "nothing is clipped"
    if extra.get("loss_type") == "cispo":
        assert any(value > 0 for name, value in reference.items() if "cispo_clip" in name), "nothing is clipped"
    if extra.get("use_adaptive_entropy"):
        assert len({value.item() for name, value in reference.items() if name.endswith("entropy_coef")}) >= 2
    if extra.get("mask_truncated_completions"):
        ratios = [value for name, value in reference.items() if "completions/clipped_ratio" in name]
        assert any(value > 0 for value in ratios), "nothing is truncated"
    if extra.get("_evaluate"):
        assert any("eval_entropy" in name for name in reference)


@pytest.mark.slow
def test_the_first_patch_alone_matches_upstream_in_float64(run_grpo):
    ours = run_grpo(f"shared-prefix@{STAGE_BEFORE + 1}", {})
    assert_same(ours, run_grpo("upstream", {}), TOLERANCE["float64"])


@pytest.mark.slow
@pytest.mark.parametrize("extra", [{}, {"loss_type": "grpo"}], ids=str)
def test_shared_prefix_matches_upstream_in_float32(run_grpo, extra):
    """Nothing of transformers and of the fused head replaced."""
    reference = run_grpo("upstream", extra, dtype="float32")
    assert_same(run_grpo("shared-prefix", extra, dtype="float32"), reference, TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra, settings", [({}, {}), ({"loss_type": "bnpo"} | ENTROPY, LORA | {"gradient_checkpointing": True})], ids=str
)
def test_shared_prefix_matches_upstream_in_two_processes(run_grpo, extra, settings):
    settings = {"prompts_per_step": 4} | settings  # two groups of every process, in three training steps
    reference = run_grpo("upstream", extra, processes=2, **settings)
    assert_same(run_grpo("shared-prefix", extra, processes=2, **settings), reference, TOLERANCE["float64"])
    one_process = run_grpo("upstream", extra, **settings)
    assert any(not torch.equal(one_process[name], reference[name]) for name in one_process if ".param." in name)


@pytest.mark.slow
def test_resumed_run_matches_upstream_and_the_run_that_was_not_interrupted(run_grpo, tmp_path):
    runs = {}
    for variant in ("upstream", "shared-prefix"):
        saving = {"output_dir": str(tmp_path / variant), "save_strategy": "steps", "save_steps": 2} | ADAPTIVE
        whole = run_grpo(variant, saving)
        rest = run_grpo(variant, saving | {"_resume": str(tmp_path / variant / "checkpoint-2")})
        runs[variant] = rest
        for name in (name for name in rest if name.startswith("step1.param")):
            torch.testing.assert_close(rest[name], whole[name.replace("step1", "step3")], rtol=0, atol=0)
    assert_same(runs["shared-prefix"], runs["upstream"], TOLERANCE["float64"])


@pytest.mark.slow
def test_training_peak_does_not_grow_with_the_completions(tmp_path):
    assert_peak_does_not_grow("GRPO", tmp_path)


@pytest.fixture(scope="session")
def refusals(probe_model) -> dict[str, str | None]:
    return json.loads(run_script("--refusals", "GRPO", str(probe_model)).splitlines()[-1])


@pytest.mark.parametrize(
    "case, error, way_out",
    [
        ("torch_compile", "NotImplementedError", "Set `torch_compile=False`"),
        ("top_entropy_quantile", "NotImplementedError", "Set `top_entropy_quantile=1.0`"),
        ("lomo", "NotImplementedError", "Choose another `optim`"),
        ("layerwise", "NotImplementedError", "Choose another `optim`"),
        ("longest position", "NotImplementedError", "Keep all lengths on one side"),
        ("absolute positions", "NotImplementedError", "Give the prompts of a batch one length"),
        ("num_generations", "ValueError", "Raise gradient_accumulation_steps"),
        ("steps_per_generation", "ValueError", "divisible by the other"),
        ("vision-language", "NotImplementedError", "Pass a tokenizer and a text model"),
        ("auxiliary loss", "NotImplementedError", "`router_aux_loss_coef=0.0`"),
        ("_compute_loss", "NotImplementedError", "Override `_compute_per_token_loss`"),
        ("_get_per_token_logps_and_entropies", "NotImplementedError", "Override `_compute_per_token_loss`"),
        ("_prepare_inputs", "NotImplementedError", "Override `_generate_and_score_completions`"),
        ("compute_loss_context_manager", "NotImplementedError", "Override `_compute_per_token_loss`"),
        ("`_compute_loss` out of the backward pass", "NotImplementedError", "Override `_compute_per_token_loss`"),
        ("Trainer.training_step", "NotImplementedError", "Undo the change"),
        ("losses whose gradients were accumulated", "RuntimeError", "Change what overrides"),
        ("differ from those of the training step", "RuntimeError", "Change what overrides"),
        ("their gradients differ in 4 of 4 rows", "RuntimeError", "Change what overrides"),
        ("and their gradients differ", "RuntimeError", "Change what overrides"),
        ("group_ids", "NotImplementedError", "Keep what `super()._generate_and_score_completions` returns"),
        ("hides tokens in between", "NotImplementedError", "without holes"),
        ("register_post_accumulate_grad_hook", "NotImplementedError", "Remove the hook"),
        ("split_batches", "NotImplementedError", "Leave it out"),
        ("their prompts differ", "RuntimeError", "repeat every prompt"),
        ("token_type_ids", "NotImplementedError", "see `chat_template_kwargs`"),
        ("optimizer step begins", "RuntimeError", "Make a new trainer"),
        ("or ends within", "RuntimeError", "Make a new trainer"),
        ("accumulation was changed", "RuntimeError", "Make a new trainer"),
        ("FSDP", "NotImplementedError", "Use a single process, DDP or DeepSpeed"),
        ("lora_dropout", "NotImplementedError", "`lora_dropout=0`"),
        ("reentrant", "NotImplementedError", '"use_reentrant": False'),
        ("num_beams", "NotImplementedError", "num_generations"),
        ("observation", "RuntimeError", "return the same one"),
        ("lowmem", "ImportError", "Put it on the path"),
        ("self-check", "RuntimeError", "found a difference"),
    ],
)
def test_what_is_not_exact_is_refused_with_the_way_out(refusals, case, error, way_out):
    assert refusals[case] is not None, "it trains"
    assert refusals[case].startswith(f"{error}: ") and case in refusals[case] and way_out in refusals[case]


@pytest.mark.parametrize("case", [*("none", "experts", "no self-check", "adapter in mixed precision"), *ALSO_EXACT])
def test_what_is_exact_is_not_refused(refusals, case):
    assert refusals[case] is None
