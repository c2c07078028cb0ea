"""`lowmem.recompute`: gradients equal to those of the plain model, counted operators, live bytes, fallbacks."""

import functools
import itertools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.live_bytes import LiveBytes
from lowmem.recompute import _SelectivePolicy, is_attention_op, recompute_activations, recomputed_layers
from lowmem.shared_prefix import PromptGroup, shared_prefix_backward

LAYERS = 4
SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": LAYERS}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def build(kind: str = "qwen3", attention: str = "sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    if kind == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, **HEADS, head_dim=8, attn_implementation=attention))
    elif kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, attn_implementation=attention))
    else:
        shape = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 96, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0.0, attn_implementation=attention))
    return model.to(dtype).train()


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_attention_op(func) and "backward" not in str(func):
            self.counts["attention"] += 1
        elif func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.counts["mm"] += 1
        return func(*args, **(kwargs or {}))


def batch(tokens: int = 24, rows: int = 2):
    ids = torch.randint(1, 96, (rows, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # left padding
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def train_once(model, inputs=None):
    """(gradients, operators of the forward, operators of the backward, live bytes after the forward, peak)"""
    model.zero_grad(set_to_none=True)
    inputs = inputs or batch()
    meter, forward, backward = LiveBytes(), CountOps(), CountOps()
    with meter:
        with forward:
            loss = model(**inputs, use_cache=False).loss
        held = meter.live_bytes
        with backward:
            loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return grads, forward.counts, backward.counts, held, meter.peak_bytes


def test_a_kept_product_that_is_changed_in_place_is_an_error():
    """torch keeps no copy, and the recomputation would change it a second time, without an error."""

    class AddsInPlace(torch.nn.Linear):
        def forward(self, x):
            result = super().forward(x)
            result += 1.0
            return result

    model = build()
    for layer in model.model.layers:
        layer.self_attn.q_proj.__class__ = AddsInPlace
    recompute_activations(model, selective=True)
    with pytest.raises(NotImplementedError, match="changes one in place.*recomputes whole layers"):
        train_once(model)


@pytest.mark.parametrize("rate, policy", [(0.0, CheckpointPolicy.MUST_SAVE), (0.5, CheckpointPolicy.PREFER_RECOMPUTE)])
def test_attention_with_dropout_is_recomputed(rate, policy):
    """Kept, it would not draw its random numbers again, and what comes after it in the layer would draw them. CPUs
    have no such operator with dropout, so the policy is asked."""
    query = torch.zeros(1, 1, 2, 4)
    op = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert _SelectivePolicy()(None, op, query, query, query, rate) == policy
    assert _SelectivePolicy()(None, op, query, query, query, dropout_p=rate) == policy


@pytest.mark.parametrize("options", [{"offload": True}, {"preserve_rng_state": False}, {"every_n_layers": 2}], ids=str)
def test_options_that_would_be_ignored_are_refused(options):
    model = build()
    recompute_activations(model, ratio=0.5)
    usual = {"use_reentrant": False, "preserve_rng_state": True, "determinism_check": "default"}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=usual)
    with pytest.raises(ValueError, match="would ignore"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def assert_equal_gradients(ours, reference):
    assert ours.keys() == reference.keys()
    for name, expected in reference.items():
        assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt2"])
@pytest.mark.parametrize("ratio, selective", [(1.0, True), (0.5, False), (0.5, True), (0.3, True), (0.0, True)])
def test_gradients_are_those_of_the_plain_model(kind, ratio, selective):
    reference = train_once(build(kind))[0]
    model = build(kind)
    summary = recompute_activations(model, ratio=ratio, selective=selective)
    assert summary == {"num_layers": LAYERS, "num_recomputed": -int(-ratio * LAYERS // 1), "selective": selective}
    assert_equal_gradients(train_once(model)[0], reference)


def test_selective_recomputes_the_mlp_and_nothing_of_the_attention():
    """Counted operators: full recomputation repeats attention and all 7 products but the last of a layer; selective
    repeats gate and up only."""
    plain, full, selective = build(), build(), build()
    full.gradient_checkpointing_enable({"use_reentrant": False})
    recompute_activations(selective, selective=True)
    (_, f0, b0, held0, _), (_, f1, b1, held1, _), (_, f2, b2, held2, _) = map(train_once, (plain, full, selective))
    assert f0 == f1 == f2 and f0["attention"] == LAYERS
    assert (b0["attention"], b1["attention"], b2["attention"]) == (0, LAYERS, 0)
    assert b1["mm"] - b0["mm"] == 6 * LAYERS
    assert b2["mm"] - b0["mm"] == 2 * LAYERS
    assert held1 < held2 < 0.75 * held0


def test_scoring_without_gradients_first_leaves_the_selection_in_force():
    model = build()
    recompute_activations(model, selective=True)
    with torch.no_grad():
        model(**batch())
    _, _, backward, _, _ = train_once(model)
    assert backward["attention"] == 0


def test_ratio_recomputes_that_share_of_the_layers():
    extra = []
    for ratio in (0, 0.25, 0.5, 0.75, 1):
        model = build()
        recompute_activations(model, ratio=ratio)
        extra.append(train_once(model)[2]["attention"])
    assert extra == [0, 1, 2, 3, 4]


def test_no_other_choice_of_layers_has_a_lower_peak():
    """All 6 ways to recompute 2 of 4 layers, measured."""
    peaks = {}
    inputs = batch(tokens=64)
    for chosen in itertools.combinations(range(LAYERS), 2):
        model = build()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number in chosen
        peaks[chosen] = train_once(model, inputs)[4]
    model = build()
    recompute_activations(model, ratio=0.5)
    ours = train_once(model, inputs)[4]
    assert ours == peaks[0, 1] == min(peaks.values()), peaks
    assert max(peaks.values()) > 1.02 * ours, "the choice makes no difference here, so this is no test"


def test_live_bytes_fall_with_the_ratio():
    held = []
    for ratio in (0, 0.5, 1):
        model = build()
        recompute_activations(model, ratio=ratio, selective=True)
        held.append(train_once(model)[3])
    assert held[0] > held[1] > held[2]


def test_eager_attention_says_that_it_recomputes_in_full():
    reference = train_once(build(attention="eager"))
    model = build(attention="eager")
    with pytest.warns(UserWarning, match="eager attention.*recomputed in full"):
        assert recompute_activations(model, selective=True)["selective"] is False
    grads, _, backward, _, _ = train_once(model)
    assert_equal_gradients(grads, reference[0])
    assert backward["mm"] - reference[2]["mm"] == 6 * LAYERS


def test_attention_without_an_operator_is_found_when_it_runs():
    """The math fallback of sdpa computes attention from matrix products: seen in the first layer, said, and full."""
    model, reference = build(), build()
    recompute_activations(model, selective=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = train_once(reference)[0]
        with pytest.warns(UserWarning, match="no attention operator.*recomputed in full"):
            grads = train_once(model)[0]
        _, _, backward, _, _ = train_once(model)
        plain = train_once(reference)[2]
    assert_equal_gradients(grads, expected)
    assert backward["mm"] - plain["mm"] == 6 * LAYERS


def test_lora_and_input_gradients_survive():
    from peft import LoraConfig, get_peft_model

    def adapted():
        model = get_peft_model(build(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model.train()

    reference, model = adapted(), adapted()
    recompute_activations(model, selective=True)
    expected, ours = train_once(reference)[0], train_once(model)[0]
    assert len(expected) == 2 * 7 * LAYERS
    assert_equal_gradients(ours, expected)


def test_stays_in_force_when_a_trainer_disables_and_enables():
    model = build()
    recompute_activations(model, ratio=0.5, selective=True)
    plain = train_once(build())[2]
    for enable in (model.gradient_checkpointing_enable, model.activation_checkpointing_enable):
        model.activation_checkpointing_disable()
        assert train_once(model)[2] == plain
        enable({"use_reentrant": False})
        counts = train_once(model)[2]
        assert counts["attention"] == 0 and counts["mm"] == plain["mm"] + 2 * (LAYERS // 2)


def test_shared_prefix_gradients_are_the_same_with_selective_recomputation():
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(1, 96, (n,), generator=generator) for n in (9, 5, 7, 3)]
    groups = [PromptGroup(ids[0], ids[1:])]
    grads = []
    for selective in (False, True):
        model = build(dtype=torch.float64)
        if selective:
            recompute_activations(model, ratio=0.75, selective=True)
        shared_prefix_backward(model, groups, lambda scores: scores.logps.sum() / 3, max_branches=2)
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        torch.testing.assert_close(grads[1][name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_a_ratio_that_is_no_share_is_an_error(ratio):
    with pytest.raises(ValueError, match="between 0 and 1"):
        recompute_activations(build(), ratio=ratio)


def test_reentrant_checkpointing_is_refused():
    model = build()
    recompute_activations(model, selective=True)
    with pytest.raises(ValueError, match="non-reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("layers, ratio, expected", [(30, 0.1, 3), (3, 0.5, 2), (28, 1 / 28, 1), (7, 0.01, 1)])
def test_rounding_goes_to_less_memory(layers, ratio, expected):
    assert recomputed_layers(layers, ratio) == expected


def test_a_kept_value_that_is_wrong_is_seen():
    """Negative control: what the policy kept of the first attention is disturbed between forward and backward."""
    reference, model, kept = train_once(build())[0], build(), []

    def policy(ctx, op, *args, **kwargs):
        if is_attention_op(op):
            kept.append(ctx.op_output[0])
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    function = functools.partial(
        checkpoint, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, policy)
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._gradient_checkpointing_func = function
    loss = model(**batch(), use_cache=False).loss
    kept[0].data.mul_(1.01)
    loss.backward()
    with pytest.raises(AssertionError):
        assert_equal_gradients({name: p.grad for name, p in model.named_parameters()}, reference)
