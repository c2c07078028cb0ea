"""What the pipelines differ in: the weights of the predictions."""

import torch
import torch.nn.functional as F

from lowmem.mtp_targets import IGNORE_INDEX
from mtp_data import batches
from mtp_losses import Weigh, loss_and_gradients, token_losses
from mtp_model import Critic, MtpModel


def make_weigh(config, rows: list[dict], tokenizer, vocab_size: int, log: dict) -> Weigh | None:
    """The weights of `config.pipeline`; what was trained for them is told in `log`."""
    if config.pipeline == "verifiable":
        critic = train_critic(config, rows, tokenizer, vocab_size, log)
        return lambda batch, targets, losses: td_weights(config, critic, batch)
    if config.pipeline == "rho1":
        reference = train_reference(config, rows, tokenizer, vocab_size, log)
        return lambda batch, targets, losses: excess_weights(config, reference, batch, targets, losses)
    return None


def train_critic(config, rows, tokenizer, vocab_size, log) -> Critic:
    """A critic of the reward after every token of a completion, by regression on the rewards of all rows."""
    torch.manual_seed(config.seed + 1)
    critic = Critic(config, vocab_size)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=config.learning_rate)
    errors = []
    for batch in batches(rows, config.batch_size, config.critic_steps, tokenizer.pad_token_id, config.seed + 1):
        real = batch["labels"] != IGNORE_INDEX
        wanted = batch["rewards"].unsqueeze(1).expand_as(real)[real]
        error = F.mse_loss(critic(batch)[real], wanted)
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.item())
    log["critic_error"] = errors
    return critic.eval().requires_grad_(False)


@torch.no_grad()
def td_weights(config, critic: Critic, batch: dict) -> torch.Tensor:
    """Weights of tokens (B, S): exp(beta * z), cut to [min, max], of rows of reward 1; 0 for the others.

    z is the temporal difference V(after the token) - V(before it), standardised over the batch; after the last token
    the value is the reward itself.
    """
    values = critic(batch).to(torch.float32)
    real = batch["labels"] != IGNORE_INDEX
    last = real & ~F.pad(real[:, 1:], (0, 1))
    after = torch.where(last, batch["rewards"].unsqueeze(1), values)
    difference = (after - F.pad(values[:, :-1], (1, 0))) * real
    mean = difference.sum() / real.sum()
    deviation = (((difference - mean) * real).square().sum() / real.sum()).sqrt().clamp(min=1e-6)
    weights = (
        (config.td_beta * (difference - mean) / deviation).exp().clamp(config.td_weight_min, config.td_weight_max)
    )
    return weights * real * batch["rewards"].unsqueeze(1)


def train_reference(config, rows, tokenizer, vocab_size, log) -> MtpModel:
    """The same model, trained before on rows of reward 1 alone, without weights."""
    torch.manual_seed(config.seed + 2)
    reference = MtpModel(config, vocab_size)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=config.learning_rate)
    clean = [row for row in rows if row["reward"] == 1]
    if len(clean) < config.batch_size:
        raise ValueError(f"{len(clean)} rows of reward 1 are fewer than batch_size = {config.batch_size}")
    losses = []
    for batch in batches(clean, config.batch_size, config.reference_steps, tokenizer.pad_token_id, config.seed + 2):
        losses.append(loss_and_gradients(config, reference, batch, None)["unweighted"].item())
        optimizer.step()
        optimizer.zero_grad()
    log["reference_loss"] = losses
    return reference.eval().requires_grad_(False)


@torch.no_grad()
def excess_weights(config, reference: MtpModel, batch: dict, targets, losses) -> torch.Tensor:
    """Weights of predictions (B, S, n): 1 for the share of each head with the largest excess loss, else 0."""
    excess = losses - token_losses(config, reference, batch, targets)
    weights = torch.zeros_like(losses)
    for k in range(targets.shape[-1]):
        head_excess = excess[..., k][targets[..., k] != IGNORE_INDEX]
        if head_excess.numel():
            keep = max(1, round(config.rho1_top_share * head_excess.numel()))
            threshold = head_excess.topk(keep).values[-1]
            weights[..., k] = (excess[..., k] >= threshold) & (targets[..., k] != IGNORE_INDEX)
    return weights
