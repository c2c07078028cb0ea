"""Multi-token-prediction loss for given logits against the naive one, and the gradient written where they were."""

import pytest
import torch
from mtp_reference import naive_mtp_loss, padding_mask, some_weights

from lowmem.live_bytes import LiveBytes
from lowmem.mtp_logits import compute_mtp_ce_loss, compute_mtp_ce_loss_unweighted, mtp_logit_losses
from lowmem.mtp_targets import shift_labels


def problem(dtype, batch=3, length=11, n_future=3, vocab=37):
    torch.manual_seed(0)
    logits = torch.randn(batch, length, n_future, vocab, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocab, (batch, length))
    labels[1, 3:5] = -100
    return logits, labels


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("weighting", ["none", "tokens", "heads", "predictions"])
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_values_and_gradients_match_naive(dtype, tolerance, padding, weighting, inplace_backward):
    logits, labels = problem(dtype)
    mask, weights = padding_mask(padding, labels), some_weights(weighting, labels, 3, dtype)
    for reduction in ("mean", "sum", "none"):
        for key, used in (("weighted_ce_loss", weights), ("unweighted_ce_loss", None)):
            expected = naive_mtp_loss(logits, labels, mask, used, reduction)
            direction = torch.rand_like(expected)
            reference = torch.autograd.grad((expected * direction).sum(), logits)[0]
            held = logits * 1  # logits are never a leaf
            found = compute_mtp_ce_loss(held, labels, mask, weights, reduction, inplace_backward=inplace_backward)[key]
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            grad = torch.autograd.grad((found * direction).sum(), logits)[0]
            torch.testing.assert_close(grad, reference, rtol=0, atol=tolerance)
    if weights is None:
        alone = compute_mtp_ce_loss_unweighted(logits, labels, mask)
        assert torch.equal(alone, compute_mtp_ce_loss(logits, labels, mask)["unweighted_ce_loss"])


@pytest.mark.parametrize("chunk_bytes", [1, 37 * 4 * 5, 2**23])
@pytest.mark.parametrize("length, n_future", [(2, 4), (4, 4), (17, 1)])
def test_odd_sizes(chunk_bytes, length, n_future):
    torch.manual_seed(0)
    logits = torch.randn(2, length, n_future, 37, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 37, (2, length))
    expected = naive_mtp_loss(logits, labels, None, None, "none")
    found = mtp_logit_losses(logits, shift_labels(labels, None, n_future), chunk_bytes=chunk_bytes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    reference = torch.autograd.grad(expected.square().sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), logits)[0], reference, rtol=0, atol=1e-12)


def test_masked_logits_may_be_anything():
    logits, labels = problem(torch.float64)
    mask = padding_mask("right", labels)
    logits.data[shift_labels(labels, mask, 3) == -100] = torch.inf
    loss = compute_mtp_ce_loss(logits, labels, mask)["weighted_ce_loss"]
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_bfloat16_is_no_further_from_float32_than_naive():
    logits, labels = problem(torch.float32, length=60, vocab=501)

    def run(dtype, ours):
        x = logits.detach().to(dtype).requires_grad_()
        loss = compute_mtp_ce_loss(x, labels)["weighted_ce_loss"] if ours else naive_mtp_loss(x, labels, None)
        return [loss.float(), torch.autograd.grad(loss, x)[0].float()]

    truth = run(torch.float32, False)
    for ours, stock, exact in zip(run(torch.bfloat16, True), run(torch.bfloat16, False), truth):
        assert (ours - exact).norm() <= 1.05 * (stock - exact).norm()


def test_no_softmax_is_kept_and_in_place_nothing_is_allocated():
    torch.manual_seed(0)
    labels = torch.randint(0, 2000, (2, 256))
    size = 2 * 256 * 4 * 2000 * 4

    def sizes(loss):
        """Live after the forward and at the peak, in sizes of the logits; the caller holds them until the backward."""
        leaf = torch.randn(2, 256, 4, 2000, requires_grad=True)
        with LiveBytes() as meter:
            logits = leaf + 0
            value = loss(logits)
            forward = meter.live_bytes
            del logits
            value.backward()
        return forward / size, meter.peak_bytes / size

    naive = sizes(lambda x: naive_mtp_loss(x, labels, None))
    ours = sizes(lambda x: compute_mtp_ce_loss(x, labels)["weighted_ce_loss"])
    inplace = sizes(lambda x: compute_mtp_ce_loss(x, labels, inplace_backward=True)["weighted_ce_loss"])
    assert naive[0] > 1.9 and naive[1] > 3, "the logits and their log-softmax; then gradients of all logits per head"
    assert ours[0] < 1.01 and ours[1] < 2.01, "the logits; then one gradient"
    assert inplace[0] < 1.01 and inplace[1] < 1.01, "the logits and no more"


def test_in_place_is_seen_by_autograd():
    """The logits are gone after the backward: another backward, or one that needs them, must raise."""
    leaf, labels = problem(torch.float64)
    loss = compute_mtp_ce_loss(leaf * 1, labels, inplace_backward=True)["weighted_ce_loss"]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = compute_mtp_ce_loss(leaf.tanh(), labels, inplace_backward=True)["weighted_ce_loss"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # tanh kept its result


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(2, 5, 11)}, "expected .B, S, n_future, V."),
        ({"logits": torch.zeros(2, 5, 0, 11)}, "n_future is 0"),
        ({"logits": torch.zeros(2, 6, 3, 11)}, "expected .2, 5, 3, 'V'."),
        ({"labels": torch.full((2, 5), 11)}, "label 11 is outside the vocabulary"),
        ({"weights": torch.ones(5, 2)}, "5. of tokens"),
        ({"reduction": "avg"}, "known: mean, sum, none"),
        ({"logits": torch.zeros(2, 3, 5, 11).transpose(1, 2), "inplace_backward": True}, "contiguous logits"),
    ],
)
def test_bad_input_ends_in_a_sentence(change, message):
    arguments = dict(logits=torch.zeros(2, 5, 3, 11), labels=torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        compute_mtp_ce_loss(**(arguments | change))
