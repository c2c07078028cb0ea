"""What the shared prefix refuses, and negative controls: break one thing on purpose and see it caught."""

import contextlib
import functools

import pytest
import torch
from peft import BOFTConfig, LoKrConfig, LoraConfig, PromptTuningConfig, PveraConfig, VeloraConfig, get_peft_model
from test_shared_prefix_models import (
    Float64Everywhere,
    Losses,
    gradients,
    make_groups,
    make_model,
    plain_scores,
    worst_relative_error,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, T5Config, T5ForConditionalGeneration
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem import shared_prefix_prompt, shared_prefix_self_check
from lowmem.shared_prefix import shared_prefix_backward, shared_prefix_scores
from lowmem.shared_prefix_checks import refuse_inexact_padding, why_not_exact
from lowmem.shared_prefix_prompt import SharedPrompt, score_logits
from lowmem.shared_prefix_self_check import SharedPrefixMismatch, check_shared_prefix


def qwen3(**changes):
    return make_model("qwen3", torch.float32, **changes)


def with_lora(**options):
    return get_peft_model(qwen3(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **options))


def with_neftune():
    model = qwen3()
    model.get_input_embeddings().neftune_noise_alpha = 5.0  # as transformers' Trainer marks it
    return model


def with_router_loss():
    return make_model("qwen3-moe", torch.float32, output_router_logits=True)


def with_shared_layers():
    model = qwen3()
    model.config.num_kv_shared_layers = 1
    return model


def with_reentrant_checkpointing():
    model = qwen3()
    model.activation_checkpointing_enable({"use_reentrant": True})
    return model


def with_unknown_checkpointing():
    model = qwen3()
    model.activation_checkpointing_enable()
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = lambda function, *args: function(*args)
    return model


def with_reentrant_wrapper():
    model = qwen3()
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0], checkpoint_impl=CheckpointImpl.REENTRANT)
    return model


def with_adapter(config):
    return lambda: get_peft_model(qwen3(), config)


def with_virtual_tokens():
    return get_peft_model(qwen3(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def encoder_decoder():
    return T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


def multimodal():
    text = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


NO_BERT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
REFUSED = {
    "attention dropout": (lambda: qwen3(attention_dropout=0.1), "attention_dropout = 0.1.*eval"),
    "dropout modules": (lambda: make_model("phi3", torch.float32, resid_pdrop=0.2), "dropout.p = 0.2"),
    "adapter dropout": (lambda: with_lora(lora_dropout=0.05).train(), "lora_dropout.*0.05"),
    "dropout by adapter": (
        with_adapter(LoKrConfig(r=4, rank_dropout=0.01, target_modules=["q_proj"])),
        "rank_dropout.default = 0.01",
    ),
    "multiplicative dropout": (
        with_adapter(BOFTConfig(boft_block_size=4, boft_dropout=0.1, target_modules=["q_proj"])),
        r"boft_dropout.default.p = 0.1",
    ),
    "embedding noise": (with_neftune, "neftune_noise_alpha = 5"),
    "router jitter": (lambda: make_model("mixtral", torch.float32, router_jitter_noise=0.1), "jitter_noise = 0.1"),
    "router loss": (with_router_loss, "output_router_logits = False"),
    "mamba": (lambda: make_model("mamba", torch.float32, attn_implementation="eager"), "Conv1d"),
    "linear attention": (lambda: make_model("qwen3_next", torch.float32), "linear_attention"),
    "convolution": (lambda: make_model("lfm2", torch.float32, layer_types=["conv"] * 3), "conv"),
    "recurrence": (lambda: make_model("rwkv", torch.float32, attn_implementation="eager"), "recurrent state"),
    "hybrid": (lambda: make_model("jamba", torch.float32), "linear_attention"),
    "indexed attention": (lambda: make_model("glm_moe_dsa", torch.float32), "indexed_attention"),
    "shared layers": (with_shared_layers, "shares keys and values"),
    "bidirectional": (lambda: make_model("bert", torch.float32), "bidirectional"),
    "reentrant": (with_reentrant_checkpointing, "use_reentrant.: False"),
    "unknown checkpointing": (with_unknown_checkpointing, "use_reentrant.: False"),
    "reentrant wrapper": (with_reentrant_wrapper, "use_reentrant.: False"),
    "compiled": (lambda: torch.compile(qwen3()), "uncompiled"),
    "virtual tokens": (with_virtual_tokens, "virtual tokens"),
    "activated adapter": (lambda: with_lora(alora_invocation_tokens=[5, 6]), "activated LoRA"),
    "stateful adapter": (lambda: with_lora(velora_config=VeloraConfig()), "VeLoRA keeps statistics"),
    "noisy adapter": (with_adapter(PveraConfig(target_modules=["q_proj"])), "PVeRA and MonteCLoRA draw noise"),
    "positions from the padding token": (
        lambda: make_model("roberta", torch.float32, is_decoder=True, **NO_BERT_DROPOUT),
        "padding token",
    ),
    "encoder-decoder": (encoder_decoder, "decoder-only"),
    "multimodal": (multimodal, "vision_config"),
    "not a transformers model": (lambda: torch.nn.Linear(2, 2), "PreTrainedModel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_with_the_reason_and_the_way_out(case):
    make, message = REFUSED[case]
    model = make().train()
    for call in (shared_prefix_backward, shared_prefix_scores):
        arguments = [lambda scores: scores.logps.sum()] if call is shared_prefix_backward else []
        with pytest.raises(NotImplementedError, match=message):
            call(model, make_groups(), *arguments, self_check=False)


def test_checkpointing_of_an_older_transformers_is_refused(monkeypatch):
    model = qwen3().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert why_not_exact(model) == []
    monkeypatch.delattr(GradientCheckpointingLayer, "_can_checkpoint_with_cache")
    (reason,) = why_not_exact(model)
    assert "transformers >= 5.23" in reason and "switch gradient checkpointing off" in reason


def test_accepts_what_is_switched_off():
    assert why_not_exact(qwen3(attention_dropout=0.1).eval()) == []
    assert why_not_exact(with_reentrant_checkpointing().eval()) == []
    assert why_not_exact(with_lora(lora_dropout=0.0).train()) == []
    assert why_not_exact(make_model("qwen3-moe", torch.float32)) == []


def rope(rope_type, **options):
    return {"rope_type": rope_type, "rope_theta": 10000.0, **options}


LONG = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0}
# RoPE of a model for 128 tokens; groups of 23 + 12 and 9 + 9 tokens
EXACT_ROPE = {
    "dynamic below": {"rope_parameters": rope("dynamic", factor=2.0)},
    "longrope short": {"rope_parameters": rope("longrope", original_max_position_embeddings=35, **LONG)},
    "longrope long": {"rope_parameters": rope("longrope", original_max_position_embeddings=7, **LONG)},
    "yarn": {"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    "linear": {"rope_parameters": rope("linear", factor=4.0)},
}
INEXACT_ROPE = {
    "dynamic across": {"rope_parameters": rope("dynamic", factor=2.0), "max_position_embeddings": 30},
    "dynamic above": {"rope_parameters": rope("dynamic", factor=2.0), "max_position_embeddings": 7},
    "longrope across": {"rope_parameters": rope("longrope", original_max_position_embeddings=30, **LONG)},
}


@pytest.mark.parametrize("case", EXACT_ROPE)
def test_rope_that_treats_all_lengths_alike_is_exact(case):
    model, groups = make_model("llama", **EXACT_ROPE[case]), make_groups()
    with torch.no_grad(), Float64Everywhere():
        scores = shared_prefix_scores(model, groups, self_check=False)
        reference = plain_scores(model, groups)
    torch.testing.assert_close(scores.logps, reference.logps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", INEXACT_ROPE)
def test_rope_that_depends_on_the_longest_position_is_refused_and_would_be_wrong(case, monkeypatch):
    model, groups = make_model("llama", **INEXACT_ROPE[case]), make_groups()
    with pytest.raises(NotImplementedError, match="longest position"):
        shared_prefix_scores(model, groups)
    monkeypatch.setattr(shared_prefix_prompt, "refuse_inexact_lengths", lambda *args: None)
    with pytest.raises(SharedPrefixMismatch, match="logp_error_max"):
        check_shared_prefix(model, groups[0], gradients=False)


LLAMA4 = {"num_local_experts": 2, "attention_chunk_size": 8, "floor_scale": 20}
MINISTRAL3 = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.5}
BY_POSITION = {
    "learned positions": ("gpt2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "of a decoder from BERT": ("bert-generation", {"is_decoder": True}),
    "sinusoids": ("ctrl", {"dff": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_implementation": "eager"}),
    "temperature": ("llama4_text", LLAMA4 | {"attn_temperature_tuning": True, "no_rope_layers": [0, 0, 0]}),
    "beam": ("beam", {}),
    "query scale": ("ministral3", {"rope_parameters": MINISTRAL3 | {"original_max_position_embeddings": 20}}),
}


@pytest.mark.parametrize("case", BY_POSITION)
def test_padding_that_changes_the_plain_numbers_is_refused(case):
    """Plain rows of 14 tokens, with and without 10 tokens of padding at the left."""
    model_type, changes = BY_POSITION[case]
    model = make_model(model_type, torch.float32, **changes).eval()
    ids, padding = make_groups([(14, (1,))])[0].prompt_ids[None], torch.zeros(1, 10, dtype=torch.long)
    mask = torch.cat([torch.zeros_like(padding), torch.ones_like(ids)], 1)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        padded = model(input_ids=torch.cat([padding, ids], 1), attention_mask=mask).logits[:, 10:]
    assert (plain - padded).abs().max() > (1e-5 if case == "beam" else 1e-3)
    with pytest.raises(NotImplementedError, match="up to 10 tokens here.*one length"):
        refuse_inexact_padding(model, num_padding=10, longest=24)
    refuse_inexact_padding(model, num_padding=0, longest=24)
    for name in ("qwen3", "opt"):  # OPT counts from the mask
        refuse_inexact_padding(make_model(name, torch.float32), num_padding=10, longest=24)
    if case in ("temperature", "query scale"):
        refuse_inexact_padding(model, num_padding=5, longest=19)  # on one side of the step


@pytest.mark.parametrize("adapter", [{"target_modules": ["c_attn", "wpe"]}, {"modules_to_save": ["wpe"]}], ids=str)
def test_positions_inside_an_adapter_are_found(adapter):
    model = make_model("gpt2", torch.float32, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **adapter))
    with pytest.raises(NotImplementedError, match="one length"):
        refuse_inexact_padding(model, num_padding=10, longest=24)


def forget_positions(model, inputs, labels):
    if "past_key_values" in inputs:
        inputs = {**inputs, "position_ids": inputs["position_ids"] - inputs["position_ids"][:, :1]}
    return score_logits(model, inputs, labels)


def forget_the_prompt(model, inputs, labels):
    return score_logits(model, {k: v for k, v in inputs.items() if k != "past_key_values"}, labels)


def test_self_check_catches_forgotten_positions_before_anything_is_trained():
    model = qwen3()
    with pytest.raises(SharedPrefixMismatch, match="logp_error_max exceeds"):
        shared_prefix_backward(model, make_groups(), lambda s: s.logps.sum(), branch_forward=forget_positions)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_self_check_catches_a_lost_prompt_gradient(monkeypatch):
    monkeypatch.setattr(SharedPrompt, "__exit__", lambda *args: None)
    with pytest.raises(SharedPrefixMismatch, match="grad_error exceeds"):
        check_shared_prefix(qwen3(), make_groups()[0])


def move_positions_by_one(model, inputs, labels):
    if "past_key_values" in inputs:
        inputs = {**inputs, "position_ids": inputs["position_ids"] + 1}
    return score_logits(model, inputs, labels)


def flat_model(dtype):
    """As a new model is: its logits hardly depend on anything, and a fault in a few layers changes little."""
    model = make_model("qwen3", torch.float32, num_hidden_layers=8, hidden_size=64, head_dim=16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.02 * parameter.shape[-1] ** 0.5 / 1.2)
    return model.to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bfloat16", "float16", "autocast"]
)
def test_self_check_catches_small_faults_in_half_precision(dtype, monkeypatch):
    """The faults are below 0.05 nats a token and 0.1 of the gradient."""
    group, model = make_groups([(60, (30, 30))])[0], flat_model(dtype)

    def check(**options):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            return check_shared_prefix(model, group, **options)

    figures = check()
    assert figures["logp_tolerance"] < 0.05 and figures["grad_tolerance"] < 0.1
    with pytest.raises(SharedPrefixMismatch, match="grad_error exceeds"):
        check(branch_forward=move_positions_by_one)
    close = SharedPrompt.__exit__

    def lose_gradient_of_a_layer(self, *args):
        for leaf in self._leaves[2:4]:  # keys and values
            leaf.grad.zero_()
        close(self, *args)

    monkeypatch.setattr(SharedPrompt, "__exit__", lose_gradient_of_a_layer)
    with pytest.raises(SharedPrefixMismatch, match="grad_error exceeds"):
        check()


def test_self_check_needs_layers_whose_output_it_can_round_in_half_precision(monkeypatch):
    monkeypatch.setattr(shared_prefix_self_check, "GradientCheckpointingLayer", torch.nn.Conv3d)  # there is none
    check_shared_prefix(qwen3(), make_groups()[0])
    with pytest.raises(NotImplementedError, match="in float32"):
        check_shared_prefix(qwen3().to(torch.bfloat16), make_groups()[0])


def test_self_check_runs_once_per_model_and_mode(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "lowmem.shared_prefix_self_check.check_shared_prefix",
        lambda model, group, **kwargs: calls.append(kwargs["gradients"]),
    )
    model, groups = qwen3(), make_groups()
    for _ in range(2):
        shared_prefix_scores(model, groups)
        shared_prefix_backward(model, groups, lambda s: s.logps.sum())
    assert calls == [False, True]
    model.activation_checkpointing_enable()
    shared_prefix_backward(model, groups, lambda s: s.logps.sum())
    shared_prefix_backward(model, groups, lambda s: s.logps.sum(), self_check=False)
    assert calls == [False, True, True]


def test_self_check_runs_once_per_branch_forward(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "lowmem.shared_prefix_self_check.check_shared_prefix",
        lambda model, group, **kwargs: calls.append(kwargs["branch_forward"]),
    )
    model, groups = qwen3(), make_groups()

    class Trainer:
        def branch_forward(self, *args):
            return score_logits(*args)

    for _ in range(2):  # each of these is made anew in every step
        shared_prefix_scores(model, groups)
        shared_prefix_scores(model, groups, branch_forward=functools.partial(score_logits, temperature=0.7))
        shared_prefix_scores(model, groups, branch_forward=lambda *args: score_logits(*args))
        shared_prefix_scores(model, groups, branch_forward=Trainer().branch_forward)
    assert len(calls) == 3 and calls[0] is score_logits


def test_self_check_runs_once_per_adapter(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "lowmem.shared_prefix_self_check.check_shared_prefix",
        lambda model, group, **kwargs: calls.append(model.active_adapter),
    )
    model, groups = with_lora(lora_dropout=0.0), make_groups()
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for _ in range(2):
        model.set_adapter("default")
        shared_prefix_scores(model, groups)
        with model.disable_adapter():  # the reference model of a trainer
            shared_prefix_scores(model, groups)
        model.set_adapter("other")
        shared_prefix_scores(model, groups)
    assert calls == ["default", "default", "other"]


@pytest.mark.parametrize(
    ("lengths", "message"), [((4,), "0 of 3 layers used the cache"), ((7, 4), "must match")], ids=["alone", "packed"]
)
def test_a_branch_that_drops_the_cache_is_caught(lengths, message):
    with pytest.raises(RuntimeError, match=message):
        groups = make_groups([(23, lengths)])
        shared_prefix_scores(qwen3(), groups, branch_forward=forget_the_prompt, self_check=False)


def test_a_cache_stripped_under_checkpointing_is_caught(monkeypatch):
    model = qwen3()
    model.activation_checkpointing_enable()
    monkeypatch.setattr(
        shared_prefix_prompt, "_cache_reaches_checkpointed_layers", lambda model: contextlib.nullcontext()
    )
    with pytest.raises(RuntimeError, match="0 of 3 layers used the cache"):
        shared_prefix_scores(model, make_groups(), self_check=False)


def test_a_model_that_strips_the_cache_in_its_own_way_is_caught():
    model = make_model("gpt2", torch.float32, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    shared_prefix_backward(model, make_groups(), lambda s: s.logps.sum())
    model.activation_checkpointing_enable()
    with pytest.raises(RuntimeError, match="0 of 3 layers used the cache"):
        shared_prefix_backward(model, make_groups(), lambda s: s.logps.sum())


def test_checkpointed_layers_are_left_as_they_were():
    model = qwen3()
    model.activation_checkpointing_enable()
    shared_prefix_backward(model, make_groups(), lambda s: s.logps.sum())
    assert all("_can_checkpoint_with_cache" not in vars(layer) for layer in model.model.layers)


def run_with_a_changed_weight(model, group):
    with SharedPrompt(model, group.prompt_ids) as prompt:
        logps, _, _ = prompt.score(group.completions)
        logps.sum().backward()
        with torch.no_grad():
            model.model.layers[0].mlp.gate_proj.weight.mul_(1.5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_weight_changed_between_the_stages_is_caught(checkpointing):
    model, group = qwen3(), make_groups()[0]
    if checkpointing:
        model.activation_checkpointing_enable()
    with pytest.raises(RuntimeError, match="weights changed"):
        run_with_a_changed_weight(model, group)


def test_without_the_check_a_changed_weight_is_silently_wrong_under_checkpointing(monkeypatch):
    model, group = qwen3(), make_groups()[0]
    model.activation_checkpointing_enable()
    plain_scores(model, [group]).logps.sum().backward()
    reference = gradients(model)
    monkeypatch.setattr(SharedPrompt, "_check_weights", lambda self: None)
    run_with_a_changed_weight(model, group)
    assert worst_relative_error(gradients(model), reference) > 0.1


def test_an_adapter_switched_off_between_the_stages_is_caught():
    model, group = with_lora(lora_dropout=0.0), make_groups()[0]
    with pytest.raises(RuntimeError, match="weights changed"), SharedPrompt(model, group.prompt_ids) as prompt:
        with model.disable_adapter():
            prompt.score(group.completions)


@torch.no_grad()
def test_a_frozen_adapter_switched_off_or_merged_between_the_stages_is_caught():
    model, group = with_lora(init_lora_weights=False).requires_grad_(False), make_groups()[0]
    with pytest.raises(RuntimeError, match="weights changed"), SharedPrompt(model, group.prompt_ids) as prompt:
        with model.disable_adapter():
            prompt.score(group.completions)
    with pytest.raises(RuntimeError, match="weights changed"), SharedPrompt(model, group.prompt_ids) as prompt:
        model.merge_adapter()
        prompt.score(group.completions)


def test_a_forgotten_last_stage_is_caught_and_would_be_wrong():
    model, groups = qwen3(), make_groups()[:1]
    loss_fn = Losses(model, groups).pg
    loss_fn(plain_scores(model, groups)).backward()
    reference = gradients(model)
    options = {"prompt_backward": lambda tensors, grads: None, "self_check": False}
    with pytest.raises(RuntimeError, match="`prompt_backward` ran no backward through the prompt"):
        shared_prefix_backward(model, groups, loss_fn, **options)
    assert worst_relative_error(gradients(model), reference) > 0.5


def test_a_block_without_a_backward_is_caught():
    model, group = qwen3(), make_groups()[0]
    with pytest.raises(RuntimeError, match="6 of 6 keys and values of the prompt received no gradient"):
        with SharedPrompt(model, group.prompt_ids) as prompt:
            prompt.score(group.completions)


def test_a_backward_after_the_block_is_caught():
    model, group = qwen3(), make_groups()[0]
    with SharedPrompt(model, group.prompt_ids) as prompt:
        first, _, _ = prompt.score(group.completions[:1])
        late, _, _ = prompt.score(group.completions[1:])
        first.sum().backward()
    with pytest.raises(RuntimeError, match="after its SharedPrompt was closed"):
        late.sum().backward()
    with pytest.raises(RuntimeError, match="outside its `with` block"):
        prompt.score(group.completions)


def test_an_exception_inside_the_block_skips_the_last_stage():
    model, group, stages = qwen3(), make_groups()[0], []
    with pytest.raises(KeyError):
        with SharedPrompt(model, group.prompt_ids, prompt_backward=lambda *args: stages.append(args)) as prompt:
            prompt.score(group.completions)[0].sum().backward()
            raise KeyError
    assert stages == []


def test_gradients_through_a_prompt_without_a_graph_are_caught():
    model, group = qwen3(), make_groups()[0]
    with torch.no_grad(), SharedPrompt(model, group.prompt_ids) as prompt:
        prompt.score(group.completions)
        with torch.enable_grad(), pytest.raises(RuntimeError, match="no_grad"):
            prompt.score(group.completions)


def test_a_gradient_lost_between_layers_is_caught():
    model, group = qwen3(), make_groups()[0]
    model.requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    model.model.layers[0].register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(RuntimeError, match="lose their gradient between layers"):
        with SharedPrompt(model, group.prompt_ids):
            pass


@pytest.mark.parametrize(
    "loss_fn", [lambda s: s.logps.detach().sum(), lambda s: s.logps.sum(-1)], ids=["detached", "not a scalar"]
)
def test_a_loss_without_a_gradient_or_of_several_values_is_refused(loss_fn):
    with pytest.raises(ValueError, match="loss_fn returned a tensor"):
        shared_prefix_backward(qwen3(), make_groups(), loss_fn)


def test_a_loss_that_divides_by_what_is_in_front_of_it_depends_on_the_micro_batches():
    model, groups = qwen3(), make_groups()
    losses = [
        shared_prefix_backward(model, groups, lambda s: s.logps.mean(), max_branches=m, self_check=False)[0]
        for m in (1, 2)
    ]
    assert (losses[0] - losses[1]).abs() > 0.1  # why the docstring asks for constants


def test_autocast_is_seen_by_prompt_and_branches():
    model, groups = qwen3(), make_groups()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        figures = check_shared_prefix(model, groups[0])
    assert 1e-4 < figures["logp_error_mean"] < 0.01  # bfloat16 was used, and by both alike
    assert 1e-4 < figures["grad_error"] < 0.1
