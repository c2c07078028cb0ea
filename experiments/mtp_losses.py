"""One multi-token-prediction loss, four ways to compute it: `loss:` of a config chooses.

naive        F.cross_entropy on the logits of every head, as the obvious loop has it
logits       the same logits, no softmax kept, their gradient written in their place (lowmem/mtp_logits.py)
hidden       no logits: tiles of them (lowmem/mtp_loss.py)
sequential   tiles, and one head's activations at a time (lowmem/mtp_backward.py)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from lowmem.mtp_backward import sequential_mtp_backward
from lowmem.mtp_logits import mtp_logit_losses
from lowmem.mtp_loss import mtp_predictions, mtp_token_losses
from lowmem.mtp_targets import IGNORE_INDEX, reduce_losses, shift_labels

Weigh = Callable[[dict, torch.Tensor, torch.Tensor], torch.Tensor | None]  # batch, targets, losses -> weights


def naive_token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(B, S, n) from logits (B, S, n, V), head by head; 0 where there is no prediction."""
    losses = []
    for k in range(targets.shape[-1]):
        flat, head_targets = logits[:, :, k].reshape(-1, logits.shape[-1]), targets[..., k].reshape(-1)
        ce = F.cross_entropy(flat, head_targets, reduction="none", ignore_index=IGNORE_INDEX)
        losses.append(ce.view(targets.shape[:2]))
    return torch.stack(losses, dim=-1)


def token_losses(config, model, batch: dict, targets: torch.Tensor) -> torch.Tensor:
    """Losses (B, S, n) of every prediction, with their graph where gradients are on."""
    trunk = model.trunk(batch)
    hidden = [head(trunk) for head in model.heads]
    if config.loss in ("hidden", "sequential"):
        tile = dict(chunk_tokens=config.chunk_tokens, chunk_vocab=config.chunk_vocab)
        return mtp_token_losses(hidden, model.lm_head.weight, targets, **tile)
    logits = model.lm_head(torch.stack(hidden, dim=2))  # (B, S, n, V)
    if config.loss == "logits":
        return mtp_logit_losses(logits, targets, inplace_backward=True)
    return naive_token_losses(logits, targets)


def loss_and_gradients(config, model, batch: dict, weigh: Weigh | None) -> dict[str, torch.Tensor]:
    """Runs the backward of the weighted mean; returns both means, detached."""
    targets = shift_labels(batch["labels"], batch["attention_mask"], config.n_future)
    if config.loss != "sequential":
        losses = token_losses(config, model, batch, targets)
        weights = None if weigh is None else weigh(batch, targets, losses.detach())
        loss = reduce_losses(losses, targets, weights, "mean")
        loss.backward()
        return {"weighted": loss.detach(), "unweighted": reduce_losses(losses.detach(), targets, None, "mean")}
    weights = None
    if weigh is not None:
        with torch.no_grad():  # the driver has to know the weights before the first head runs
            weights = weigh(batch, targets, token_losses(config, model, batch, targets))
    found = sequential_mtp_backward(
        model.trunk(batch),
        model.heads,
        model.lm_head.weight,
        batch["labels"],
        batch["attention_mask"],
        weights=weights,
        chunk_tokens=config.chunk_tokens,
        chunk_vocab=config.chunk_vocab,
    )
    return {"weighted": found["weighted_ce_loss"], "unweighted": found["unweighted_ce_loss"]}


@torch.no_grad()
def validate(config, model, parts: list[dict]) -> dict:
    """Loss and share of right predictions of every head over all batches; acceptance is the share of heads 2 to n."""
    loss, right, counts = (torch.zeros(config.n_future, dtype=torch.float64) for _ in range(3))
    for batch in parts:
        targets = shift_labels(batch["labels"], batch["attention_mask"], config.n_future)
        trunk = model.trunk(batch)
        found = mtp_predictions([head(trunk) for head in model.heads], model.lm_head.weight, targets)
        real = targets != IGNORE_INDEX
        loss += token_losses(config, model, batch, targets).sum((0, 1)).cpu()
        right += ((found == targets) & real).sum((0, 1)).cpu()
        counts += real.sum((0, 1)).cpu()
    per_head = (loss / counts.clamp(min=1)).tolist()
    return {
        "loss": sum(per_head) / max(1, (counts > 0).sum().item()),
        "loss_per_head": per_head,
        "right_share_per_head": (right / counts.clamp(min=1)).tolist(),
        "acceptance": (right[1:].sum() / counts[1:].sum()).item() if counts[1:].sum() > 0 else None,
        "predictions_per_head": counts.int().tolist(),
    }
