"""Multi-token-prediction loss from hidden states: no logits of (batch, positions, heads, vocabulary), not even of one.

The obvious way computes the logits of n heads and keeps the log-softmax of all of them for the backward. Here they are
projected one after another in tiles of (chunk_tokens, chunk_vocab), and again in the backward. The peak is a tile; it
does not know the number of heads, the number of tokens or the vocabulary. What is left are the gradients that the
caller gets. Only predictions that count are projected (no padding, no ignored label), and in the backward only those
whose weight is not zero.

    losses = mtp_ce_loss(hidden, model.lm_head.weight, labels, attention_mask, weights=weights)
    losses["weighted_ce_loss"].backward()

Shapes: B rows, S positions, n heads, H hidden size, V vocabulary. Head k (1 .. n) at position t predicts token t + k.
"""

from collections.abc import Iterator, Sequence

import torch

from lowmem.chunked_cross_entropy import (
    argmax_rows,
    backward_rows,
    compute_dtype,
    forward_rows,
    refuse_second_derivative,
    sum_dtype,
)
from lowmem.mtp_targets import (
    IGNORE_INDEX,
    check_reduction,
    check_vocabulary,
    prediction_weights,
    reduce_losses,
    shift_labels,
)

CHUNK_TOKENS, CHUNK_VOCAB = 512, 4096  # a tile of 8 MiB in float32; docs/mtp.md measures others

Heads = torch.Tensor | Sequence[torch.Tensor]


class _HeadLosses(torch.autograd.Function):
    """Losses (B, S, n) of all heads. `tensors`: the hidden states, then the weights, as `per_head` returns them."""

    @staticmethod
    def forward(ctx, targets, tile, num_hidden, *tensors):
        hidden, weight = tensors[:num_hidden], tensors[num_hidden:]
        ctx.tile, ctx.num_hidden, ctx.dtype = tile, num_hidden, compute_dtype(hidden[0])
        losses = torch.zeros(targets.shape, dtype=sum_dtype(ctx.dtype), device=targets.device)
        log_z = []
        for rows, lm_head, goals, out in by_call(projected_together(hidden, weight), hidden, weight, targets, losses):
            index = (goals != IGNORE_INDEX).nonzero().squeeze(-1)
            out[index], call_log_z = forward_rows(rows, index, lm_head, goals[index], tile, ctx.dtype)
            log_z.append(call_log_z)
        ctx.save_for_backward(targets, *tensors, *log_z)
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        refuse_second_derivative()
        needed = ctx.needs_input_grad[3:]
        targets, *saved = ctx.saved_tensors
        tensors, log_z = saved[: len(needed)], saved[len(needed) :]
        hidden, weight = tensors[: ctx.num_hidden], tensors[ctx.num_hidden :]
        # A row that heads share gets a sum, of which no part may be rounded; the row of one head is written once.
        adds_up = (hidden[0].ndim == 3 and len(hidden) == 1,) * len(hidden) + (True,) * len(weight)
        grads = [
            torch.zeros(x.shape, dtype=sum_dtype(x.dtype) if added else x.dtype, device=x.device) if wanted else None
            for x, added, wanted in zip(tensors, adds_up, needed)
        ]
        together = projected_together(hidden, weight)
        given = by_call(together, hidden, weight, targets, grad_losses.contiguous())
        returned = by_call(together, grads[: ctx.num_hidden], grads[ctx.num_hidden :], targets)
        for (rows, lm_head, goals, factors), (grad_rows, grad_lm_head, _), logs in zip(given, returned, log_z):
            index = (goals != IGNORE_INDEX).nonzero().squeeze(-1)
            goals, factors = goals[index], factors[index]
            backward_rows(rows, index, lm_head, goals, logs, factors, grad_rows, grad_lm_head, ctx.tile, ctx.dtype)
        for i, (x, grad) in enumerate(zip(tensors, grads)):
            grads[i] = None if grad is None else grad.to(x.dtype)
        return None, None, None, *grads


def projected_together(hidden: Sequence, weight: Sequence) -> bool:
    """Whether the rows of all heads go through one LM head in one call, so that it is read once for all of them.

    So it is where every prediction has its own row of one tensor; of separate tensors each is a call of its own.
    """
    return len(weight) == 1 and len(hidden) == 1 and hidden[0].ndim == 4


def by_call(together: bool, hidden: Sequence, weight: Sequence, *of_predictions: torch.Tensor) -> Iterator[tuple]:
    """What is projected in one call: rows (R, H), LM head (V, H), and of each (B, S, n) tensor those R entries.

    Views all of them, so that results may be written there; None where `hidden` and `weight` are.
    """
    if together:
        rows = None if hidden[0] is None else hidden[0].reshape(-1, hidden[0].shape[-1])
        yield rows, weight[0], *(x.view(-1) for x in of_predictions)
        return
    for k in range(of_predictions[0].shape[-1]):
        columns = (x.view(-1, x.shape[-1])[:, k] for x in of_predictions)
        yield rows_of_head(hidden, k), of_head(weight, k), *columns


def of_head(tensors: Sequence, k: int):
    """What head k uses: the only one, or its own."""
    return tensors[k if len(tensors) > 1 else 0]


def rows_of_head(hidden: Sequence, k: int) -> torch.Tensor | None:
    """The rows (R, H) of head k, a view wherever the hidden states are contiguous; None where they are."""
    rows = of_head(hidden, k)
    if rows is None:
        return None
    return (rows.select(2, k) if rows.ndim == 4 else rows).reshape(-1, rows.shape[-1])


def mtp_token_losses(
    hidden: Heads,
    weight: Heads,
    targets: torch.Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    chunk_vocab: int = CHUNK_VOCAB,
) -> torch.Tensor:
    """Cross-entropy of every prediction, (B, S, n), 0 where there is none. Equal to

    ```python
    logits = hidden @ weight.T  # (B, S, n, V)
    F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(targets.shape)
    ```

    but holds one tile of `chunk_tokens * chunk_vocab` logits (two in low precision). Any function of the result
    may be differentiated. bfloat16 and float16 are projected in their type; statistics and sums are float32.

    Args:
        hidden: (B, S, H) shared by the heads, (B, S, n, H), or a sequence of n tensors (B, S, H).
        weight: the LM head (V, H), or a sequence of n of them.
        targets: (B, S, n), of `shift_labels`.

    Raises:
        ValueError: for shapes that do not fit, labels outside the vocabulary, and chunks < 1.
    """
    hidden, weight = per_head(hidden, weight, targets)
    check_vocabulary(targets, weight[0].shape[0])
    return _HeadLosses.apply(targets, check_tile(chunk_tokens, chunk_vocab), len(hidden), *hidden, *weight)


def mtp_ce_loss(
    hidden: Heads,
    weight: Heads,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    n_future: int | None = None,
    weights: torch.Tensor | None = None,
    reduction: str = "mean",
    chunk_tokens: int = CHUNK_TOKENS,
    chunk_vocab: int = CHUNK_VOCAB,
) -> dict[str, torch.Tensor]:
    """`compute_mtp_ce_loss(hidden @ weight.T, labels, attention_mask, weights, reduction)` without the logits.

    Args:
        hidden, weight: as in `mtp_token_losses`.
        labels: (B, S), the token at each position, not shifted; -100 is not predicted.
        attention_mask: (B, S), 0 at padding.
        n_future: number of heads; only needed where `hidden` and `weight` are both shared by them.
        weights: (B, S) of tokens, (n,) of heads or (B, S, n) of predictions; see `prediction_weights`.
        reduction: "mean", "sum" or "none"; see `reduce_losses`.

    Returns:
        `weighted_ce_loss` and `unweighted_ce_loss`, both with gradients.

    Raises:
        ValueError: as `shift_labels`, `prediction_weights` and `mtp_token_losses` do.
    """
    check_reduction(reduction)
    targets = shift_labels(labels, attention_mask, number_of_heads(hidden, weight, n_future))
    weights = prediction_weights(weights, targets)
    losses = mtp_token_losses(hidden, weight, targets, chunk_tokens=chunk_tokens, chunk_vocab=chunk_vocab)
    return {
        "weighted_ce_loss": reduce_losses(losses, targets, weights, reduction),
        "unweighted_ce_loss": reduce_losses(losses, targets, None, reduction),
    }


@torch.no_grad()
def mtp_predictions(
    hidden: Heads,
    weight: Heads,
    targets: torch.Tensor,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    chunk_vocab: int = CHUNK_VOCAB,
) -> torch.Tensor:
    """The likeliest token of every prediction, (B, S, n), -100 where there is none; no more memory than the loss.

    `(predictions == targets)[targets != -100]` of the heads after the first is MTP acceptance: how often a draft of
    theirs would be right.
    """
    hidden, weight = per_head(hidden, weight, targets)
    tile = check_tile(chunk_tokens, chunk_vocab)
    best = torch.full_like(targets, IGNORE_INDEX)
    for rows, lm_head, goals, out in by_call(projected_together(hidden, weight), hidden, weight, targets, best):
        index = (goals != IGNORE_INDEX).nonzero().squeeze(-1)
        out[index] = argmax_rows(rows, index, lm_head, tile, compute_dtype(rows))
    return best


def number_of_heads(hidden: Heads, weight: Heads, n_future: int | None) -> int:
    """`n_future`, or what the shapes say. Raises ValueError where they say nothing."""
    if n_future is not None:
        return n_future
    for tensors in (hidden, weight):
        if not isinstance(tensors, torch.Tensor):
            return len(tensors)
    if hidden.ndim == 4:
        return hidden.shape[2]
    raise ValueError("hidden states and weight are shared by all heads; say how many there are with n_future")


def per_head(hidden: Heads, weight: Heads, targets: torch.Tensor) -> tuple[tuple, tuple]:
    """Hidden states and weights as tuples: one (B, S, H), one (B, S, n, H) or n (B, S, H); one (V, H) or n of them.

    Raises:
        ValueError: if they do not fit each other and the (B, S, n) targets.
    """
    batch, length, n_future = targets.shape
    hiddens = (hidden,) if isinstance(hidden, torch.Tensor) else tuple(hidden)
    weights = (weight,) if isinstance(weight, torch.Tensor) else tuple(weight)
    shapes, size = {h.shape[:-1] for h in hiddens}, hiddens[0].shape[-1] if hiddens else None
    if isinstance(hidden, torch.Tensor):
        good = shapes <= {(batch, length), (batch, length, n_future)}
    else:
        good = len(hiddens) == n_future and {h.shape for h in hiddens} == {(batch, length, size)}
    if not good:
        given = tuple(hidden.shape) if isinstance(hidden, torch.Tensor) else [tuple(h.shape) for h in hiddens]
        raise ValueError(
            f"hidden states are {given}; for labels ({batch}, {length}) and {n_future} heads expected "
            f"({batch}, {length}, H), ({batch}, {length}, {n_future}, H) or {n_future} tensors ({batch}, {length}, H)"
        )
    good = len(weights) == (1 if isinstance(weight, torch.Tensor) else n_future)
    if not good or any(w.ndim != 2 or w.shape[1] != size or w.shape != weights[0].shape for w in weights):
        given = [tuple(w.shape) for w in weights]
        raise ValueError(f"LM head weights are {given}; expected one (V, {size}) or a sequence of {n_future} of them")
    return hiddens, weights


def check_tile(chunk_tokens: int, chunk_vocab: int) -> tuple[int, int]:
    if chunk_tokens < 1 or chunk_vocab < 1:
        raise ValueError(f"chunk_tokens and chunk_vocab are {chunk_tokens} and {chunk_vocab}; they must be at least 1")
    return chunk_tokens, chunk_vocab
