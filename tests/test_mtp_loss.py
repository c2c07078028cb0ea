"""Multi-token-prediction loss from hidden states against the naive one: values, gradients, edges, and the memory."""

import pytest
import torch
from mtp_reference import naive_logits, naive_mtp_loss, padding_mask, problem, some_weights
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.live_bytes import LiveBytes
from lowmem.mtp_loss import mtp_ce_loss, mtp_predictions, mtp_token_losses
from lowmem.mtp_targets import shift_labels

TOLERANCE = {torch.float64: dict(rtol=0, atol=1e-12), torch.float32: dict(rtol=1e-5, atol=1e-5)}


def assert_same(found, expected, leaves, dtype):
    """Values, and the gradients of a fixed random projection of them."""
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    torch.manual_seed(3)
    direction = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * direction).sum(), leaves, retain_graph=True, allow_unused=True)
    found_grads = torch.autograd.grad((found * direction).sum(), leaves, retain_graph=True, allow_unused=True)
    for ours, reference in zip(found_grads, expected_grads):
        reference = torch.zeros_like(ours) if reference is None else reference
        torch.testing.assert_close(ours, reference, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "layout", [("stacked", "one"), ("list", "one"), ("shared", "each"), ("list", "each")], ids="-".join
)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("weighting", ["none", "tokens", "heads", "predictions"])
def test_values_and_gradients_match_naive(dtype, layout, padding, weighting):
    leaves, hidden, weight, labels = problem(dtype, hidden=layout[0], weight=layout[1])
    mask, weights = padding_mask(padding, labels), some_weights(weighting, labels, 3, dtype)
    labels[1, 3:5] = -100
    for reduction in ("mean", "sum", "none"):
        logits = naive_logits(hidden, weight)
        settings = dict(weights=weights, reduction=reduction, chunk_tokens=7, chunk_vocab=10)
        found = mtp_ce_loss(hidden, weight, labels, mask, **settings)
        assert_same(found["weighted_ce_loss"], naive_mtp_loss(logits, labels, mask, weights, reduction), leaves, dtype)
        expected = naive_mtp_loss(logits, labels, mask, None, reduction)
        assert_same(found["unweighted_ce_loss"], expected, leaves, dtype)


@pytest.mark.parametrize("tile", [(1, 1), (5, 37), (512, 4096), (3, 36)], ids=str)
@pytest.mark.parametrize("length, n_future", [(1, 3), (2, 4), (3, 8), (4, 4), (17, 1)])
def test_odd_sizes_and_sequences_shorter_than_the_heads(tile, length, n_future):
    leaves, hidden, weight, labels = problem(torch.float64, length=length, n_future=n_future)
    found = mtp_ce_loss(hidden, weight, labels, chunk_tokens=tile[0], chunk_vocab=tile[1])["weighted_ce_loss"]
    assert_same(found, naive_mtp_loss(naive_logits(hidden, weight), labels, None), leaves, torch.float64)


def test_a_head_without_a_prediction_does_not_enter_the_mean():
    leaves, hidden, weight, labels = problem(torch.float64, length=6)
    labels[:, 3:] = -100  # head 3 at position 0 would predict token 3
    found = mtp_ce_loss(hidden, weight, labels, reduction="none")["unweighted_ce_loss"]
    assert (found[..., 2] == 0).all() and (found[:, :1, :2] > 0).all()
    found = mtp_ce_loss(hidden, weight, labels)["weighted_ce_loss"]
    assert_same(found, naive_mtp_loss(naive_logits(hidden, weight), labels, None), leaves, torch.float64)


@pytest.mark.parametrize("case", ["masked", "ignored", "weights zero", "one position"])
def test_nothing_to_learn_is_a_finite_zero_that_backpropagates(case):
    leaves, hidden, weight, labels = problem(torch.float32, length=1 if case == "one position" else 9)
    mask = torch.zeros_like(labels) if case == "masked" else None
    weights = torch.zeros(labels.shape) if case == "weights zero" else None
    labels = torch.full_like(labels, -100) if case == "ignored" else labels
    found = mtp_ce_loss(hidden, weight, labels, mask, weights=weights)
    assert found["weighted_ce_loss"].item() == 0.0
    assert (found["unweighted_ce_loss"].item() > 0) == (case == "weights zero")
    for grad in torch.autograd.grad(found["weighted_ce_loss"], leaves):
        assert (grad == 0).all()


def test_padding_on_the_left_and_on_the_right_give_the_same_loss():
    _, hidden, weight, labels = problem(torch.float64, batch=1, length=9)
    rolled = [torch.roll(x, 4, dims=1) for x in (hidden, labels)]
    right, left = torch.arange(9)[None] < 5, torch.arange(9)[None] >= 4
    ours = mtp_ce_loss(hidden, weight, labels, right)["weighted_ce_loss"]
    torch.testing.assert_close(mtp_ce_loss(rolled[0], weight, rolled[1], left)["weighted_ce_loss"], ours)
    cut = mtp_ce_loss(hidden[:, :5], weight, labels[:, :5])["weighted_ce_loss"]
    torch.testing.assert_close(ours, cut, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["one head", "one token", "shift"])
def test_a_small_error_is_seen(form):
    """Negative controls: what these tests compare with must be able to fail."""
    _, hidden, weight, labels = problem(torch.float64)
    weights = torch.ones(*labels.shape, 3, dtype=torch.float64)
    expected = naive_mtp_loss(naive_logits(hidden, weight), labels, None, weights)
    if form == "one head":
        weights[..., 2] += 1e-6
    elif form == "one token":
        weights[1, 2, 1] += 1e-6
    else:
        labels = labels.roll(1, dims=1)
    found = mtp_ce_loss(hidden, weight, labels, weights=weights)["weighted_ce_loss"]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_token_and_head_weights_multiply():
    from lowmem.mtp_targets import token_weights_by_head

    leaves, hidden, weight, labels = problem(torch.float64)
    tokens, heads = (some_weights(kind, labels, 3, torch.float64) for kind in ("tokens", "heads"))
    both = token_weights_by_head(tokens, 3) * heads
    found = mtp_ce_loss(hidden, weight, labels, weights=both, reduction="none")["weighted_ce_loss"]
    expected = naive_mtp_loss(naive_logits(hidden, weight), labels, None, tokens, "none") * heads
    assert_same(found, expected, leaves, torch.float64)


def test_bfloat16_is_no_further_from_float32_than_naive():
    """Excess error of ours over the naive loss, both in bfloat16, against a float32 truth."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 40, 3, 128) / 8, torch.randn(503, 128)
    labels = torch.randint(0, 503, (2, 40))

    def run(dtype, ours):
        h, w = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        if ours:
            loss = mtp_ce_loss(h, w, labels, chunk_tokens=16, chunk_vocab=100, reduction="none")["weighted_ce_loss"]
        else:
            loss = naive_mtp_loss((h @ w.T).float(), labels, None, None, "none")
        return [loss, *(g.float() for g in torch.autograd.grad(loss.mean(), (h, w)))]

    truth = run(torch.float32, False)
    for ours, stock, exact in zip(run(torch.bfloat16, True), run(torch.bfloat16, False), truth):
        assert (ours - exact).norm() <= 1.05 * (stock - exact).norm()


def test_autocast_projects_in_bfloat16_and_sums_in_float32():
    leaves, hidden, weight, labels = problem(torch.float32, hidden_size=64)
    with torch.autocast("cpu", torch.bfloat16):
        found = mtp_ce_loss(hidden, weight, labels)["weighted_ce_loss"]
        expected = naive_mtp_loss(naive_logits(hidden, weight).float(), labels, None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the projection is rounded as autocast does
    for ours, stock in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, stock, rtol=0, atol=2e-2 * stock.abs().max().item())


def test_half_precision_sums_in_float32():
    """512 tokens of one label: summed in bfloat16 its gradient would stop growing."""
    hidden = torch.ones(1, 513, 1, 4, dtype=torch.bfloat16)
    weight = torch.zeros(8, 4, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, 513, dtype=torch.long)
    mtp_ce_loss(hidden, weight, labels, reduction="sum", chunk_tokens=1)["weighted_ce_loss"].backward()
    torch.testing.assert_close(weight.grad[0], torch.full((4,), -512 * 7 / 8, dtype=torch.bfloat16))


def test_the_gradient_of_shared_hidden_states_is_rounded_once():
    _, hidden, weight, labels = problem(torch.bfloat16, n_future=8, hidden="shared", weight="each")
    loss = mtp_ce_loss(hidden, weight, labels, reduction="sum")["weighted_ce_loss"]
    parts = []
    for k in range(8):  # one head at a time, in float32
        targets = shift_labels(labels, None, 8)
        targets[..., torch.arange(8) != k] = -100
        wide = hidden.detach().float().requires_grad_()
        losses = mtp_token_losses(wide, [w.detach().float() for w in weight], targets)
        parts.append(torch.autograd.grad(losses.sum(), wide)[0])
    exact, found = sum(parts), torch.autograd.grad(loss, hidden)[0].float()
    added_rounded = sum((part.bfloat16() for part in parts), torch.zeros_like(hidden)).float()
    assert (found - exact).norm() < 0.75 * (added_rounded - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_stacked_hidden_states_is_made_where_it_is_returned(dtype):
    hidden = torch.randn(4, 128, 8, 64).to(dtype).requires_grad_()
    weight, labels = torch.randn(500, 64).to(dtype), torch.randint(0, 500, (4, 128))
    meter = LiveBytes()
    meter.track([hidden, weight, labels])
    before = meter.live_bytes
    with meter:
        loss = mtp_ce_loss(hidden, weight, labels, chunk_tokens=16, chunk_vocab=100)["weighted_ce_loss"]
        loss.backward()
    numbers = 4 * 128 * 8 * 40  # targets, losses, log-sum-exps, indices
    assert meter.peak_bytes - before - hidden.numel() * dtype.itemsize <= 16 * 100 * 4 * 4 + numbers


def test_parts_that_need_no_gradient_get_none():
    _, hidden, weight, labels = problem(torch.float64)
    reference = torch.autograd.grad(mtp_ce_loss(hidden, weight, labels)["weighted_ce_loss"], (hidden, weight))
    for i, inputs in enumerate([(hidden, weight.detach()), (hidden.detach(), weight)]):
        loss = mtp_ce_loss(*inputs, labels)["weighted_ce_loss"]
        assert torch.equal(torch.autograd.grad(loss, inputs[i])[0], reference[i])


def test_backward_twice_gives_the_same_and_second_order_is_refused():
    _, hidden, weight, labels = problem(torch.float64)
    loss = mtp_ce_loss(hidden, weight, labels)["weighted_ce_loss"]
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, weight, create_graph=True)


class CountProjectedRows(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.rows.append(args[-2].shape[0])
        return func(*args, **(kwargs or {}))


def test_what_does_not_count_is_never_projected():
    leaves, hidden, weight, labels = problem(torch.float64, batch=2, length=10)
    mask = padding_mask("right", labels)
    labels[1, 4:] = -100
    targets = shift_labels(labels, mask, 3)
    hidden.data[(targets == -100)] = torch.nan  # would spread to the loss and to the weight's gradient
    with CountProjectedRows() as forward:
        losses = mtp_ce_loss(hidden, weight, labels, mask, reduction="none")["weighted_ce_loss"]
    assert sum(forward.rows) == (targets != -100).sum()
    chosen = torch.zeros_like(losses)
    chosen[0, :3, 0] = 1.0
    with CountProjectedRows() as backward:
        grads = torch.autograd.grad((losses * chosen).sum(), leaves)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert backward.rows == [3], "only the tokens of weight 1 are projected again"


def test_predictions_are_the_argmax():
    _, hidden, weight, labels = problem(torch.float32, batch=4, length=30)
    mask = padding_mask("left", labels[:3])
    mask = torch.cat([mask, torch.ones_like(mask[:1])])
    targets = shift_labels(labels, mask, 3)
    found = mtp_predictions(hidden, weight, targets, chunk_tokens=7, chunk_vocab=10)
    expected = naive_logits(hidden, weight).argmax(-1)
    assert torch.equal(found, torch.where(targets == -100, -100, expected))


def peak_bytes(n_future, vocab, hidden_size=16, tokens=512, tile=(64, 256)):
    """Above the inputs, of one loss with its backward."""
    hidden = torch.randn(4, tokens // 4, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    labels = torch.randint(0, vocab, (4, tokens // 4))
    meter = LiveBytes()
    meter.track([hidden, weight, labels])
    before = meter.live_bytes
    with meter:
        settings = dict(n_future=n_future, chunk_tokens=tile[0], chunk_vocab=tile[1])
        mtp_ce_loss(hidden, weight, labels, **settings)["weighted_ce_loss"].backward()
    return meter.peak_bytes - before


def test_peak_does_not_know_heads_or_vocabulary():
    one, eight = (peak_bytes(n, 20_000, tile=(256, 1024)) for n in (1, 8))
    assert eight <= 1.05 * one
    small, large = (peak_bytes(4, vocab, hidden_size=16) - vocab * 16 * 4 for vocab in (2_000, 50_000))
    assert large <= 1.01 * small, "the gradient of the head aside"
    few, many = (peak_bytes(4, 5_000, tokens=tokens) for tokens in (256, 4096))
    assert many - few <= (4096 - 256) * (16 * 4 + 4 * 60), "the gradient of the hidden states and a few numbers each"


ARGUMENTS = dict(hidden=torch.zeros(2, 5, 3, 8), weight=torch.zeros(11, 8), labels=torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(2, 5, 8)}, "say how many there are with n_future"),
        ({"hidden": torch.zeros(2, 5, 8), "n_future": 0}, "n_future is 0; there must be at least 1"),
        ({"n_future": 4}, r"hidden states are \(2, 5, 3, 8\).*4 heads expected"),
        ({"hidden": [torch.zeros(2, 5, 8)] * 2, "n_future": 3}, "3 tensors"),
        ({"hidden": torch.zeros(2, 6, 3, 8)}, "hidden states are"),
        ({"labels": torch.zeros(2, 5)}, "expected .B, S. token ids"),
        ({"labels": torch.zeros(2, 5, 3, dtype=torch.long)}, "expected .B, S. token ids"),
        ({"labels": torch.full((2, 5), 11)}, "label 11 is outside the vocabulary of 11 tokens"),
        ({"labels": torch.full((2, 5), -1)}, "label -1 is outside"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask is"),
        ({"weight": torch.zeros(11, 7)}, "LM head weights are"),
        ({"weight": [torch.zeros(11, 8)] * 2, "n_future": 3}, "sequence of 3"),
        ({"weights": torch.ones(2, 4)}, "5. of tokens, .3,. of heads, .2, 5, 3. of predictions"),
        ({"weights": torch.full((3,), torch.nan)}, "not finite"),
        ({"reduction": "avg"}, "reduction is 'avg'; known: mean, sum, none"),
        ({"chunk_vocab": 0}, "at least 1"),
    ],
)
def test_bad_input_ends_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        mtp_ce_loss(**(ARGUMENTS | change))


def test_token_losses_need_targets_of_the_vocabulary():
    with pytest.raises(ValueError, match="outside the vocabulary"):
        mtp_token_losses(torch.zeros(1, 2, 1, 8), torch.zeros(4, 8), torch.full((1, 2, 1), 9))
