"""A trunk with prediction heads, head by head, against the naive loss: gradients and parameters after real steps."""

import copy

import pytest
import torch
from mtp_reference import naive_logits, naive_mtp_loss, padding_mask, some_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen3Config

from lowmem.live_bytes import LiveBytes
from lowmem.mtp_backward import sequential_mtp_backward
from lowmem.mtp_loss import mtp_ce_loss

SHAPE = dict(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    bos_token_id=None,
    eos_token_id=None,
)


class Model(nn.Module):
    """A Qwen3 whose backbone is the trunk, three small heads, and its LM head for all of them."""

    def __init__(self, tied: bool, n_future: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.lm = AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE, tie_word_embeddings=tied))
        size = SHAPE["hidden_size"]
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(size, size), nn.SiLU()) for _ in range(n_future))

    def trunk(self, ids, mask):
        return self.lm.model(input_ids=ids, attention_mask=mask).last_hidden_state


def three_steps(model, way, weighting="tokens", dtype=torch.float64, reduction="mean"):
    """The losses of three AdamW steps; `way` computes one loss and leaves its gradients."""
    model = model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1)
    losses = []
    for step in range(3):
        ids = torch.randint(0, SHAPE["vocab_size"], (3, 9))
        mask = padding_mask(("none", "left", "right")[step], ids)
        labels = ids.clone()
        labels[0, 2] = -100
        weights = some_weights(weighting, ids, len(model.heads), dtype)
        losses.append(way(model, model.trunk(ids, mask), labels, mask, weights, reduction).detach())
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def naive(model, hidden, labels, mask, weights, reduction):
    logits = naive_logits([head(hidden) for head in model.heads], model.lm.lm_head.weight)
    loss = naive_mtp_loss(logits, labels, mask, weights, reduction)
    loss.backward()
    return loss


def tiled(model, hidden, labels, mask, weights, reduction):
    heads = [head(hidden) for head in model.heads]
    settings = dict(weights=weights, reduction=reduction, chunk_tokens=5, chunk_vocab=20)
    loss = mtp_ce_loss(heads, model.lm.lm_head.weight, labels, mask, **settings)["weighted_ce_loss"]
    loss.backward()
    return loss


def sequential(model, hidden, labels, mask, weights, reduction, chunk_vocab=20):
    settings = dict(weights=weights, reduction=reduction, chunk_tokens=5, chunk_vocab=chunk_vocab)
    weight = model.lm.lm_head.weight
    return sequential_mtp_backward(hidden, model.heads, weight, labels, mask, **settings)["weighted_ce_loss"]


def sequential_whole(*args):
    """Tiles of the whole vocabulary, which are not computed again."""
    return sequential(*args, chunk_vocab=SHAPE["vocab_size"])


WAYS = [tiled, sequential, sequential_whole]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("weighting", ["none", "tokens", "predictions"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_parameters_after_three_steps_match_naive(way, tied, weighting, reduction):
    reference = Model(tied)
    ours = copy.deepcopy(reference)
    expected = three_steps(reference, naive, weighting, reduction=reduction)
    found = three_steps(ours, way, weighting, reduction=reduction)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters()):
        # AdamW divides by the root of the squared gradient, which multiplies a rounding where that is tiny
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gradients_match_naive(way, tied, dtype, tolerance):
    reference = Model(tied).to(dtype)
    ours = copy.deepcopy(reference)
    torch.manual_seed(2)
    ids = torch.randint(0, 61, (3, 9))
    mask, weights = padding_mask("left", ids), some_weights("predictions", ids, 3, dtype)
    for model, one in ((reference, naive), (ours, way)):
        one(model, model.trunk(ids, mask), ids, mask, weights, "mean")
    for (name, mine), theirs in zip(ours.named_parameters(), reference.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("way", [sequential, sequential_whole])
def test_autocast_gives_what_the_loss_gives_under_autocast(way):
    reference = Model(tied=False)
    ours = copy.deepcopy(reference)
    ids = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(2))
    for model, one in ((reference, tiled), (ours, way)):
        with torch.autocast("cpu", torch.bfloat16):
            one(model, model.trunk(ids, None), ids, None, None, "mean")
    for (name, mine), theirs in zip(ours.named_parameters(), reference.named_parameters()):
        scale = theirs[1].grad.abs().max().item()
        torch.testing.assert_close(mine.grad, theirs[1].grad, rtol=0, atol=0.02 * scale, msg=name)
        assert mine.grad.dtype == torch.float32


def test_a_head_whose_weight_is_off_by_a_little_is_seen():
    reference = Model(tied=False)
    ours = copy.deepcopy(reference)

    def off(model, hidden, labels, mask, weights, reduction):
        return sequential(model, hidden, labels, mask, torch.tensor([1, 1, 1 + 1e-6]).double(), reduction)

    three_steps(reference, naive, "none"), three_steps(ours, off, "none")
    worst = max((a - b).abs().max() for a, b in zip(ours.parameters(), reference.parameters()))
    assert worst > 1e-8, "the comparison of parameters could not fail"


def test_gradients_add_up_over_micro_batches_and_scale():
    model = Model(tied=True).double()
    twin = copy.deepcopy(model)
    torch.manual_seed(2)
    for ids in torch.randint(0, 61, (2, 2, 8)):
        settings = dict(loss_scale=0.5, chunk_vocab=7)
        sequential_mtp_backward(model.trunk(ids, None), model.heads, model.lm.lm_head.weight, ids, **settings)
        (0.5 * naive_mtp_loss(heads_logits(twin, ids), ids, None)).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)


def heads_logits(model, ids):
    hidden = model.trunk(ids, None)
    return naive_logits([head(hidden) for head in model.heads], model.lm.lm_head.weight)


def test_a_tile_of_the_whole_vocabulary_is_projected_once():
    class CountProducts(TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
                self.flops += args[-2].shape[0] * args[-2].shape[1] * args[-1].shape[1]
            return func(*args, **(kwargs or {}))

    weight, labels = nn.Parameter(torch.randn(300, 16)), torch.randint(0, 300, (2, 40))
    weights = torch.ones(2, 40, 2)
    weights[0, 3, 0] = 0  # projected for its loss, and no more
    flops, losses = {}, {}
    for chunk_vocab in (100, 300):
        hidden = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        settings = dict(weights=weights, chunk_tokens=16, chunk_vocab=chunk_vocab)
        with CountProducts() as counter:
            found = sequential_mtp_backward(hidden, [nn.Identity()] * 2, weight, labels, **settings)
        flops[chunk_vocab], losses[chunk_vocab] = counter.flops / (300 * 16), found["losses"]
    predictions = 2 * (39 + 38)
    assert flops == {100: 4 * predictions - 3, 300: 3 * predictions - 2}
    torch.testing.assert_close(losses[300], losses[100])


def test_frozen_parts_stay_without_gradient():
    model = Model(tied=False).double()
    model.lm.requires_grad_(False)
    ids = torch.randint(0, 61, (2, 8))
    sequential_mtp_backward(model.trunk(ids, None), model.heads, model.lm.lm_head.weight, ids)
    assert all(p.grad is None for p in model.lm.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.heads.parameters())


@pytest.mark.parametrize("chunk_vocab", [125, 500])
def test_activations_of_one_head_live_at_a_time(chunk_vocab):
    def peak(way, n_future):
        torch.manual_seed(0)
        heads = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 512), nn.SiLU(), nn.Linear(512, 32)) for _ in range(n_future)
        )
        weight = nn.Parameter(torch.randn(500, 32))
        base = torch.randn(4, 256, 32, requires_grad=True)
        labels = torch.randint(0, 500, (4, 256))
        for p in (*heads.parameters(), weight):
            p.grad = torch.zeros_like(p)  # gradients of heads aside
        meter = LiveBytes()
        meter.track([base, *(x for p in (*heads.parameters(), weight) for x in (p, p.grad))])
        before = meter.live_bytes
        with meter:
            hidden, settings = base * 1, dict(chunk_tokens=256, chunk_vocab=chunk_vocab)
            if way == "sequential":
                sequential_mtp_backward(hidden, heads, weight, labels, **settings)
            else:
                loss = mtp_ce_loss([head(hidden) for head in heads], weight, labels, **settings)
                loss["weighted_ce_loss"].backward()
        return meter.peak_bytes - before

    assert peak("sequential", 8) <= 1.05 * peak("sequential", 1)
    assert peak("tiled", 8) > 3 * peak("sequential", 8), "all heads' activations at once, for comparison"


def test_the_head_gradient_is_not_held_twice():
    weight = nn.Parameter(torch.randn(40_000, 16))
    hidden, labels = torch.randn(1, 64, 16, requires_grad=True), torch.randint(0, 40_000, (1, 64))
    meter = LiveBytes()
    meter.track([weight])
    before = meter.live_bytes
    with meter:
        sequential_mtp_backward(hidden, [nn.Identity()] * 4, weight, labels, chunk_tokens=16, chunk_vocab=512)
    assert meter.peak_bytes - before <= 1.1 * weight.numel() * 4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": []}, "n_future is 0"),
        ({"reduction": "none"}, "there is no backward"),
        ({"loss_scale": float("nan")}, "must be finite"),
        ({"heads": [nn.Linear(8, 4)]}, r"head 1 returned \(2, 5, 4\)"),
        ({"labels": torch.zeros(2, 6, dtype=torch.long)}, "hidden states are"),
        ({"weights": torch.ones(3)}, "of heads"),
        ({"weights": torch.ones(2, requires_grad=True)}, "weights require a gradient"),
    ],
)
def test_bad_input_ends_in_a_sentence(change, message):
    arguments = dict(trunk_output=torch.zeros(2, 5, 8), heads=[nn.Identity()] * 2, weight=torch.zeros(11, 8))
    arguments |= dict(labels=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        sequential_mtp_backward(**(arguments | change))
