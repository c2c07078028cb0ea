"""Forward and backward of a trunk with n prediction heads, one head at a time (Gloeckle et al., arXiv 2404.19737).

The obvious way runs all heads, adds their losses and calls backward once: the activations of every head live together.
Here each head runs forward and backward before the next begins, on a detached copy of the trunk's output in which the
gradients add up, and the trunk's backward follows once at the end. In tiles, as in lowmem/mtp_loss.py, neither
activations nor logits grow with n. The weights are known before, so a tile need not be projected again if it holds the
whole vocabulary: `chunk_vocab` = V and few `chunk_tokens` cost three matrix products instead of four.

    hidden = trunk(input_ids)
    losses = sequential_mtp_backward(hidden, heads, lm_head.weight, labels, attention_mask)
    optimizer.step()

Shapes: B rows, S positions, n heads, H hidden size, V vocabulary. Head k (1 .. n) at position t predicts token t + k.
"""

from collections.abc import Callable, Sequence

import torch

from lowmem.chunked_cross_entropy import compute_dtype, loss_and_gradient_rows, sum_dtype
from lowmem.mtp_loss import CHUNK_TOKENS, CHUNK_VOCAB, Heads, check_tile, of_head, per_head
from lowmem.mtp_targets import (
    IGNORE_INDEX,
    check_reduction,
    check_vocabulary,
    prediction_weights,
    reduce_losses,
    shift_labels,
)


class _Deliver(torch.autograd.Function):
    """Hands gradients that are known already to the tensors they belong to; `grads` is emptied, so none is copied."""

    @staticmethod
    def forward(ctx, grads, *tensors):
        ctx.grads, ctx.dtypes = grads, [x.dtype for x in tensors]
        return torch.zeros((), device=tensors[0].device)

    @staticmethod
    def backward(ctx, _):
        grads = (ctx.grads.pop(0) for _ in range(len(ctx.grads)))
        return None, *(None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes))


def sequential_mtp_backward(
    trunk_output: torch.Tensor,
    heads: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    weight: Heads,
    labels: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    weights: torch.Tensor | None = None,
    reduction: str = "mean",
    loss_scale: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
    chunk_vocab: int = CHUNK_VOCAB,
) -> dict[str, torch.Tensor]:
    """Loss and gradients of all heads. Leaves in `.grad` what this leaves there:

    ```python
    hidden = [head(trunk_output) for head in heads]
    losses = mtp_ce_loss(hidden, weight, labels, attention_mask, weights=weights, reduction=reduction)
    (loss_scale * losses["weighted_ce_loss"]).backward()
    ```

    The gradient of a shared LM head is summed over the heads in one buffer. It and the trunk's reach autograd in one
    call at the end, so hooks see them once, and a tied embedding gets both of its parts.

    Args:
        trunk_output: (B, S, H), with its graph.
        heads: n modules or functions, each from (B, S, H) to (B, S, H).
        weight: (V, H), or a sequence of n of them.
        labels, attention_mask, weights: as in `mtp_ce_loss`.
        reduction: "mean" or "sum".
        loss_scale: 1 / steps under gradient accumulation; a loss scaler's factor.

    Returns:
        `weighted_ce_loss`, `unweighted_ce_loss` and `losses` (B, S, n) of the predictions, detached and not scaled.

    Raises:
        ValueError: as `mtp_ce_loss`; for reduction "none", which has no backward of its own; for a `loss_scale` that
            is not finite; for weights that require a gradient; for a head that changes the shape.
    """
    check_reduction(reduction)
    if reduction == "none":
        raise ValueError("reduction is 'none', of which there is no backward; use 'mean' or 'sum'")
    if not torch.isfinite(torch.tensor(loss_scale)):
        raise ValueError(f"loss_scale is {loss_scale}; it must be finite")
    targets = shift_labels(labels, attention_mask, len(heads))
    weights = prediction_weights(weights, targets)
    if weights is not None and weights.requires_grad:
        raise ValueError("weights require a gradient, which is not computed here; detach them, or use `mtp_ce_loss`")
    output = trunk_output.detach().requires_grad_(trunk_output.requires_grad)
    lm_heads = per_head(output, weight, targets)[1]
    check_vocabulary(targets, lm_heads[0].shape[0])
    tile, dtype = check_tile(chunk_tokens, chunk_vocab), compute_dtype(trunk_output)
    stats = sum_dtype(dtype)

    # d loss / d losses[b, t, k], known before any head runs
    coefficients = torch.zeros(targets.shape, dtype=stats, device=targets.device, requires_grad=True)
    with torch.enable_grad():
        total = reduce_losses(coefficients, targets, weights, reduction)
    coefficients = loss_scale * torch.autograd.grad(total, coefficients)[0].view(-1, len(heads))

    losses = torch.zeros(targets.shape, dtype=stats, device=targets.device)
    flat, flat_losses = targets.view(-1, len(heads)), losses.view(-1, len(heads))
    grad_weights = [torch.zeros_like(w, dtype=sum_dtype(w.dtype)) if w.requires_grad else None for w in lm_heads]
    for k, head in enumerate(heads):
        with torch.enable_grad():
            hidden = head(output)
        if hidden.shape != output.shape:
            raise ValueError(f"head {k + 1} returned {tuple(hidden.shape)}; expected {tuple(output.shape)}")
        index = (flat[:, k] != IGNORE_INDEX).nonzero().squeeze(-1)
        rows = hidden.detach().reshape(-1, hidden.shape[-1])
        head_targets, lm_head = flat[index, k], of_head(lm_heads, k).detach()
        grad = torch.zeros(rows.shape, dtype=stats, device=rows.device) if hidden.requires_grad else None
        flat_losses[index, k] = loss_and_gradient_rows(
            rows, index, lm_head, head_targets, coefficients[index, k], grad, of_head(grad_weights, k), tile, dtype
        )
        if grad is not None:
            hidden.backward(grad.view(hidden.shape).to(hidden.dtype))
        del hidden, rows, grad  # this head's activations, before the next head's

    grads = [output.grad, *grad_weights]
    del output, grad_weights
    with torch.enable_grad():
        end = _Deliver.apply(grads, trunk_output, *lm_heads)
    if end.requires_grad:
        end.backward()
    return {
        "weighted_ce_loss": reduce_losses(losses, targets, weights, reduction),
        "unweighted_ce_loss": reduce_losses(losses, targets, None, reduction),
        "losses": losses,
    }
