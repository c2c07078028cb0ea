"""What multi-token prediction predicts, and how the losses of its tokens become one number.

Head k of n (k = 1 .. n) at position t predicts token t + k. The form from hidden states (mtp_loss.py), the form from
logits (mtp_logits.py) and the driver (mtp_backward.py) share this arithmetic on (B, S, n) tensors, which is small.

Shapes: B rows, S positions, n heads (`n_future`).
"""

import torch

IGNORE_INDEX = -100
REDUCTIONS = ("mean", "sum", "none")


def shift_labels(labels: torch.Tensor, attention_mask: torch.Tensor | None, n_future: int) -> torch.Tensor:
    """The token that each head predicts at each position, (B, S, n), -100 where there is nothing to predict.

    ```python
    targets[b, t, k - 1] = labels[b, t + k]
    ```

    where t + k lies in the row, the label is not -100, and neither t nor t + k is padding. A position that is padding
    predicts nothing, so padding on the left and on the right give the same loss.

    Args:
        labels: (B, S), the token at each position, not shifted.
        attention_mask: (B, S), 0 at padding; None for no padding.

    Raises:
        ValueError: if `n_future` < 1 or a shape or type is not the one above.
    """
    if n_future < 1:
        raise ValueError(f"n_future is {n_future}; there must be at least 1 head")
    if labels.ndim != 2 or labels.is_floating_point():
        raise ValueError(f"labels are {tuple(labels.shape)} {labels.dtype}; expected (B, S) token ids, not shifted")
    if attention_mask is not None and attention_mask.shape != labels.shape:
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; expected {tuple(labels.shape)} as labels")
    targets = labels.new_full((*labels.shape, n_future), IGNORE_INDEX, dtype=torch.long)
    for k in range(1, min(n_future, labels.shape[1] - 1) + 1):
        shifted = labels[:, k:]
        if attention_mask is not None:
            real = attention_mask.bool()
            shifted = shifted.masked_fill(~(real[:, k:] & real[:, :-k]), IGNORE_INDEX)
        targets[:, :-k, k - 1] = shifted
    return targets


def prediction_weights(weights: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor | None:
    """Weights of every prediction, broadcastable to (B, S, n), from one of

    * (B, S), of tokens: entry [b, t + k] weighs every prediction of token t + k, whichever head makes it;
    * (n,), of heads;
    * (B, S, n), of predictions: entry [b, t, k - 1] weighs what head k predicts at position t. The product of the two
      others has this shape: `token_weights_by_head(weights, n_future) * head_weights`.

    They may be negative (advantages).

    Raises:
        ValueError: for any other shape, and for values that are not finite.
    """
    if weights is None:
        return None
    batch, length, n_future = targets.shape
    shapes = {"tokens": (batch, length), "heads": (n_future,), "predictions": (batch, length, n_future)}
    if tuple(weights.shape) not in shapes.values():
        expected = ", ".join(f"{shape} of {what}" for what, shape in shapes.items())
        raise ValueError(f"weights are {tuple(weights.shape)}; expected {expected}")
    if not torch.isfinite(weights).all():
        raise ValueError("weights contain values that are not finite; look for a division by zero where they are made")
    return token_weights_by_head(weights, n_future) if weights.ndim == 2 else weights


def token_weights_by_head(weights: torch.Tensor, n_future: int) -> torch.Tensor:
    """(B, S) weights of tokens as (B, S, n) weights of predictions: `[b, t, k - 1] = weights[b, t + k]`, else 0."""
    by_head = weights.new_zeros((*weights.shape, n_future))
    for k in range(1, min(n_future, weights.shape[1] - 1) + 1):
        by_head[:, :-k, k - 1] = weights[:, k:]
    return by_head


def reduce_losses(
    losses: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, reduction: str
) -> torch.Tensor:
    """One number from the (B, S, n) losses of the predictions, which are 0 where there is none.

    ```python
    mean = sum((weights * losses)[..., k].sum() / count[k] for k in heads with a prediction) / their number
    sum = (weights * losses).sum()
    none = weights * losses
    ```

    Weights are of tokens, heads or predictions, as `prediction_weights` takes them. `count[k]` is the number of
    predictions of head k, not the sum of their weights, so halving the weights halves the loss. Without any prediction
    the mean is a zero that still backpropagates.
    """
    check_reduction(reduction)
    weights = prediction_weights(weights, targets)
    if weights is not None:
        losses = losses * weights.to(losses.dtype)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return (losses.sum((0, 1)) * head_scales(targets).to(losses.dtype)).sum()


def head_scales(targets: torch.Tensor) -> torch.Tensor:
    """What the mean multiplies the sum of each head with, (n,): 1 / (its predictions x heads with a prediction)."""
    counts = (targets != IGNORE_INDEX).sum((0, 1)).double()
    return torch.where(counts > 0, 1 / counts.clamp(min=1), 0) / (counts > 0).sum().clamp(min=1)


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; known: {', '.join(REDUCTIONS)}")


def check_vocabulary(targets: torch.Tensor, vocab_size: int) -> None:
    """Raises ValueError where a label is neither a token of the vocabulary nor -100."""
    wrong = (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))
    if wrong.any():
        raise ValueError(
            f"label {targets[wrong][0].item()} is outside the vocabulary of {vocab_size:,} tokens; "
            f"use {IGNORE_INDEX} for what is not to be predicted"
        )
