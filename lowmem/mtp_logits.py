"""Multi-token-prediction loss for callers who already hold the logits of all heads.

The obvious way, `F.cross_entropy` head by head, copies every head's slice, keeps its log-softmax for the backward, and
builds a gradient of all logits for each head. Here the forward keeps one number per prediction and the backward builds
one gradient; with `inplace_backward` that gradient is written where the logits were, and nothing of their size is
allocated at all. Deleting Python names (`del`) frees nothing of this, because the graph holds it.

Where the logits need not exist in the first place, use lowmem/mtp_loss.py.

Shapes: B rows, S positions, n heads, V vocabulary. Head k (1 .. n) at position t predicts token t + k.
"""

import torch

from lowmem.chunked_cross_entropy import refuse_second_derivative, sum_dtype
from lowmem.mtp_targets import (
    IGNORE_INDEX,
    check_reduction,
    check_vocabulary,
    prediction_weights,
    reduce_losses,
    shift_labels,
)

CHUNK_BYTES = 2**23  # of logits handled at once, in the type of sums


def _chunks(rows: torch.Tensor, chunk_bytes: int):
    """Slices of the (R, V) rows, of about `chunk_bytes` in the type of sums and at least one row each."""
    size = max(1, chunk_bytes // (rows.shape[1] * sum_dtype(rows.dtype).itemsize))
    return (slice(start, start + size) for start in range(0, rows.shape[0], size))


class _LogitLosses(torch.autograd.Function):
    """Losses (R,) of logits (R, V), 0 where the target is -100."""

    @staticmethod
    def forward(ctx, logits, targets, chunk_bytes, inplace_backward):
        stats = sum_dtype(logits.dtype)
        log_z = torch.empty(targets.shape, dtype=stats, device=logits.device)
        for rows in _chunks(logits, chunk_bytes):
            log_z[rows] = logits[rows].to(stats).logsumexp(-1)
        real = targets != IGNORE_INDEX
        chosen = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(logits, targets, log_z)
        ctx.chunk_bytes, ctx.inplace_backward = chunk_bytes, inplace_backward
        return torch.where(real, log_z - chosen, 0)

    @staticmethod
    def backward(ctx, grad_losses):
        refuse_second_derivative()
        logits, targets, log_z = ctx.saved_tensors
        # An in-place write raises the version of the logits, so that autograd refuses a second backward and the
        # backward of an operation that kept the logits as its output.
        grad = logits.detach() if ctx.inplace_backward else torch.empty_like(logits)
        real = (targets != IGNORE_INDEX).unsqueeze(-1)
        column = targets.clamp(min=0).unsqueeze(-1)
        scale = grad_losses.to(log_z.dtype).unsqueeze(-1)
        for rows in _chunks(logits, ctx.chunk_bytes):
            if grad.dtype == log_z.dtype:
                tile = torch.sub(logits[rows], log_z[rows].unsqueeze(-1), out=grad[rows])
            else:
                tile = logits[rows].to(log_z.dtype).sub_(log_z[rows].unsqueeze(-1))
            # d loss / d logit_j = p_j - 1[j = target]
            tile.exp_().mul_(scale[rows]).scatter_add_(-1, column[rows], -scale[rows])
            tile.masked_fill_(~real[rows], 0)
            if tile.dtype != grad.dtype:
                grad[rows] = tile.to(grad.dtype)
        return grad, None, None, None


def mtp_logit_losses(
    logits: torch.Tensor, targets: torch.Tensor, *, inplace_backward: bool = False, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Cross-entropy of every prediction, (B, S, n), 0 where there is none; no softmax is kept. Equal to

    ```python
    F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(targets.shape)
    ```

    Args:
        logits: (B, S, n, V)
        targets: (B, S, n), of `shift_labels`.
        inplace_backward: the backward overwrites `logits` with their gradient. Nothing may read them after it;
            autograd raises where a backward would.
        chunk_bytes: of logits handled at once.

    Raises:
        ValueError: for shapes that do not fit, labels outside the vocabulary, and logits that cannot be overwritten.
    """
    if logits.ndim != 4 or logits.shape[:3] != targets.shape:
        raise ValueError(f"logits are {tuple(logits.shape)}; expected {(*targets.shape, 'V')} for these labels")
    if inplace_backward and not logits.is_contiguous():
        raise ValueError("inplace_backward needs contiguous logits, these are a view: leave it out or pass their base")
    check_vocabulary(targets, logits.shape[-1])
    rows = logits.reshape(-1, logits.shape[-1])
    return _LogitLosses.apply(rows, targets.reshape(-1), chunk_bytes, inplace_backward).view(targets.shape)


def compute_mtp_ce_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    reduction: str = "mean",
    *,
    inplace_backward: bool = False,
) -> dict[str, torch.Tensor]:
    """Weighted and unweighted cross-entropy of the predictions of n heads. With the default reduction equal to

    ```python
    for k in range(1, n + 1):
        ce = F.cross_entropy(logits[:, :-k, k - 1].flatten(0, 1), labels[:, k:].flatten(), reduction="none")
        weighted += (ce * weights[:, k:].flatten() * mask[:, k:].flatten()).sum() / mask[:, k:].sum()
    weighted / n
    ```

    Args:
        logits: (B, S, n, V)
        labels: (B, S), the token at each position, not shifted; -100 is not predicted.
        attention_mask: (B, S), 0 at padding; padding neither predicts nor is predicted.
        weights: (B, S) of tokens, (n,) of heads or (B, S, n) of predictions; see `prediction_weights`.
        reduction: "mean", "sum" or "none"; see `reduce_losses`.
        inplace_backward: see `mtp_logit_losses`.

    Returns:
        `weighted_ce_loss` and `unweighted_ce_loss`, both with gradients.

    Raises:
        ValueError: as `shift_labels`, `prediction_weights` and `mtp_logit_losses` do.
    """
    check_reduction(reduction)
    if logits.ndim != 4:
        raise ValueError(f"logits are {tuple(logits.shape)}; expected (B, S, n_future, V)")
    targets = shift_labels(labels, attention_mask, logits.shape[2])
    weights = prediction_weights(weights, targets)
    losses = mtp_logit_losses(logits, targets, inplace_backward=inplace_backward)
    return {
        "weighted_ce_loss": reduce_losses(losses, targets, weights, reduction),
        "unweighted_ce_loss": reduce_losses(losses, targets, None, reduction),
    }


def compute_mtp_ce_loss_unweighted(
    logits: torch.Tensor,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    reduction: str = "mean",
    *,
    inplace_backward: bool = False,
) -> torch.Tensor:
    """`compute_mtp_ce_loss` without weights, the loss alone."""
    losses = compute_mtp_ce_loss(
        logits, labels, attention_mask, reduction=reduction, inplace_backward=inplace_backward
    )
    return losses["unweighted_ce_loss"]
