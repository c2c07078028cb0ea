"""Edge cases of multi-token prediction, every case in every form and type, against the naive loss."""

import pytest
import torch
from mtp_reference import naive_logits, naive_mtp_loss, problem
from torch import nn

from lowmem.mtp_backward import sequential_mtp_backward
from lowmem.mtp_logits import compute_mtp_ce_loss
from lowmem.mtp_loss import mtp_ce_loss

TILE = dict(chunk_tokens=5, chunk_vocab=10)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}  # of the largest entry
N_FUTURE, VOCAB = 4, 37


def from_logits(hidden, weight, labels, mask, weights, inplace_backward=False):
    logits = naive_logits(hidden, weight)
    loss = compute_mtp_ce_loss(logits, labels, mask, weights, inplace_backward=inplace_backward)
    loss["weighted_ce_loss"].backward()
    return loss


def from_hidden(hidden, weight, labels, mask, weights):
    loss = mtp_ce_loss(hidden, weight, labels, mask, weights=weights, **TILE)
    loss["weighted_ce_loss"].backward()
    return loss


def driver(hidden, weight, labels, mask, weights, tile=TILE):
    heads = [lambda _, k=k: hidden[:, :, k] for k in range(hidden.shape[2])]
    return sequential_mtp_backward(hidden.detach()[:, :, 0], heads, weight, labels, mask, weights=weights, **tile)


FORMS = {
    "logits": from_logits,
    "logits in place": lambda *args: from_logits(*args, inplace_backward=True),
    "hidden": from_hidden,
    "driver": driver,
    "driver, whole vocabulary": lambda *args: driver(*args, tile=dict(chunk_tokens=5, chunk_vocab=VOCAB)),
}


def edge(case, labels, dtype):
    """(labels, mask, weights) of one case."""
    mask, weights = torch.ones_like(labels), torch.rand(labels.shape, dtype=torch.float64).to(dtype) + 0.5
    if case == "ignored labels":
        labels = labels.masked_fill(torch.rand(labels.shape) < 0.4, -100)
    elif case == "a head without a prediction":
        labels = labels.clone()
        labels[:, 3:] = -100
    elif case == "a row of one token":
        mask[0, 1:] = 0
    elif case == "padding left":
        mask[0, :5], mask[2, :3] = 0, 0
    elif case == "padding right":
        mask[0, 4:], mask[2, 6:] = 0, 0
    elif case == "weights zero":
        weights = torch.zeros_like(weights)
    elif case == "weights of a head zero":
        weights = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=dtype)
    elif case == "weights negative":
        weights = weights - 1
    elif case == "nothing to predict":
        mask = torch.zeros_like(mask)
    elif case != "plain":
        raise ValueError(case)
    return labels, mask, weights


CASES = ["ignored labels", "a head without a prediction", "a row of one token", "padding left", "padding right"]
CASES += ["weights zero", "weights of a head zero", "weights negative", "nothing to predict"]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case, length", [(c, 9) for c in CASES] + [("plain", n) for n in (1, 2, 3, 4, 5, 17)])
def test_every_form_matches_naive_at_the_edges(case, length, form, dtype):
    leaves, hidden, weight, labels = problem(dtype, length=length, n_future=N_FUTURE, vocab=VOCAB)
    labels, mask, weights = edge(case, labels, dtype)
    wide = [leaf.detach().to(torch.float32 if dtype == torch.bfloat16 else dtype).requires_grad_() for leaf in leaves]
    expected = [naive_mtp_loss(naive_logits(*wide), labels, mask, w) for w in (weights, None)]
    expected[0].backward()
    found = FORMS[form](hidden, weight, labels, mask, weights)
    scale = 1 if dtype != torch.bfloat16 else max(1.0, expected[1].item())
    for name, wanted in zip(("weighted_ce_loss", "unweighted_ce_loss"), expected):
        assert found[name].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=TOLERANCE[dtype] * scale, check_dtype=False)
    for ours, naive in zip(leaves, wide):
        assert ours.grad.dtype == dtype
        bound = TOLERANCE[dtype] * (1 if dtype != torch.bfloat16 else max(1e-3, naive.grad.abs().max().item()))
        torch.testing.assert_close(ours.grad, naive.grad, rtol=0, atol=bound, check_dtype=False)
    if case in ("weights zero", "nothing to predict") or length == 1:
        assert found["weighted_ce_loss"].item() == 0.0 and all((leaf.grad == 0).all() for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["logits", "logits in place", "hidden"])  # the driver: tests/test_mtp_backward.py
def test_a_tied_embedding_gets_both_parts_of_its_gradient(form, dtype):
    torch.manual_seed(0)
    tied = torch.randn(VOCAB, 12, dtype=dtype)
    mix = torch.randn(N_FUTURE, 12, 12, dtype=dtype)
    labels = torch.randint(0, VOCAB, (2, 8))
    grads = []
    for one in (None, FORMS[form]):
        embedding = nn.Parameter(tied.clone())
        hidden = torch.einsum("bsh,nhi->bsni", embedding[labels].tanh(), mix)
        if one is None:
            naive_mtp_loss(naive_logits(hidden, embedding), labels, None).backward()
        else:
            one(hidden, embedding, labels, None, None)
        grads.append(embedding.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=TOLERANCE[dtype])
