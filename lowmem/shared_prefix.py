"""Training and scoring k completions of a prompt with one copy of the prompt, exactly, with memory flat in k.

The obvious way runs k rows `[prompt, completion]` and pays for the prompt k times. Here a group runs in three stages:

1. the prompt without its last token runs once; its graph is kept, and every layer's keys and values become leaves;
2. branches `[last prompt token, completion without its last token]` run in micro-batches, forward and backward, on top
   of the leaves, whose gradients add up; a branch's graph is gone before the next one starts;
3. one backward takes the leaves' gradients through the prompt's graph.

A transformers `Cache` carries the keys and values, so the model and its attention are the stock ones.

    groups = [PromptGroup(prompt_ids, completions)]  # (P,) and k tensors (R_i,)
    def loss_fn(scores):  # the loss of all rows is the sum over micro-batches: divide by constants known beforehand
        return -(advantages[scores.rows] * scores.logps.sum(-1)).sum() / num_rows
    loss, scores = shared_prefix_backward(model, groups, loss_fn)  # gradients are in .grad
    optimizer.step()

Shapes: P prompt tokens, k completions of a prompt, R tokens of the longest completion at hand, m branches of a
micro-batch, N completions of all groups.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lowmem.shared_prefix_distributed import agree_on_micro_batches, reduce_once, without_wrapper
from lowmem.shared_prefix_prompt import BranchForward, SharedPrompt, score_logits
from lowmem.shared_prefix_self_check import check_on_first_use

BRANCH_TOKENS = 1024  # of a micro-batch: enough work for one pass over the weights


@dataclass
class PromptGroup:
    """A prompt and its completions, without padding.

    Attributes:
        prompt_ids: (P,), int64, P >= 1.
        completions: k tensors (R_i,), int64, R_i >= 1.
    """

    prompt_ids: torch.Tensor
    completions: Sequence[torch.Tensor]

    def __post_init__(self):
        for ids in (self.prompt_ids, *self.completions):
            if ids.ndim != 1 or ids.numel() == 0:
                raise ValueError(f"unpadded ids (tokens,) with at least one token expected, got {tuple(ids.shape)}")
        if not self.completions:
            raise ValueError("a prompt without completions has nothing to score")


@dataclass
class BranchScores:
    """Scores of m completions, right-padded to R tokens.

    Attributes:
        rows: (m,), int64, where each completion stands among those of all groups, in the order given.
        logps: (m, R), nats, 0 on padding.
        entropies: (m, R), nats, 0 on padding; None if the branch forward computes none.
        mask: (m, R), bool, True on the completion's tokens.
    """

    rows: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor | None
    mask: torch.Tensor


def micro_batches(lengths: Sequence[int], max_branch_tokens: int, max_branches: int | None = None) -> list[list[int]]:
    """Indices of completions by micro-batch: longest first, each padded to `max_branch_tokens` at most, one at least.

    Raises:
        ValueError: if a limit is below 1.
    """
    if max_branch_tokens < 1 or (max_branches is not None and max_branches < 1):
        raise ValueError(f"limits of at least 1 expected, got {max_branch_tokens} tokens, {max_branches} branches")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        num_padded = lengths[batches[-1][0]] if batches else 0  # the first of a batch is its longest
        full = not batches or num_padded * (len(batches[-1]) + 1) > max_branch_tokens
        if full or len(batches[-1]) == max_branches:
            batches.append([])
        batches[-1].append(index)
    return batches


def shared_prefix_backward(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    loss_fn: Callable[[BranchScores], torch.Tensor],
    *,
    max_branch_tokens: int = BRANCH_TOKENS,
    max_branches: int | None = None,
    branch_forward: BranchForward = score_logits,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
    prompt_backward=torch.autograd.backward,
    share_rows: bool = True,
    self_check: bool = True,
) -> tuple[torch.Tensor, BranchScores]:
    """Adds to `.grad` what this adds, without k copies of the prompt and without k graphs at once:

    ```python
    scores = score(model, [[prompt, c] for prompt, completions in groups for c in completions])
    loss_fn(scores).backward()
    ```

    `loss_fn` is called once per micro-batch, and the loss is the sum. So it divides by constants known beforehand
    (rows, tokens of the whole step), never by what is in front of it. Groups run one after the other. The peak is one
    prompt's graph, plus its keys and values and their gradients, plus one micro-batch; k does not add to it.

    With DDP, FSDP2 or DeepSpeed ZeRO-2 give the wrapper: the gradients (DeepSpeed keeps its own) are then averages
    over ranks, see `lowmem.shared_prefix_distributed`.

    Args:
        loss_fn: scores of m completions to a scalar with a gradient.
        max_branch_tokens: most tokens, padding included, of a micro-batch; a longer completion runs alone.
        max_branches: most completions of a micro-batch.
        branch_forward: how the model is asked for log-probabilities, see `BranchForward`.
        backward: called with each micro-batch's loss, for example `accelerator.backward`.
        prompt_backward: see `SharedPrompt`.
        share_rows: let completions share a row where that is cheaper (`lowmem.shared_prefix_packing`).
        self_check: `lowmem.shared_prefix_self_check` on one group, on first use with this model in this mode.

    Returns:
        The loss (a scalar) and the scores of all N completions in the order given, both without a graph.

    Raises:
        NotImplementedError, RuntimeError: see `SharedPrompt` and `reduce_once`.
        ValueError: if there is no group, if `loss_fn` returns something else than a scalar with a gradient, or a limit
            is below 1.
        SharedPrefixMismatch: see `check_shared_prefix`.
    """

    def train(scores: BranchScores) -> torch.Tensor:
        loss = loss_fn(scores)
        if loss.ndim != 0 or not loss.requires_grad:
            raise ValueError(
                f"loss_fn returned a tensor of shape {tuple(loss.shape)} with requires_grad={loss.requires_grad}: a "
                "scalar that depends on scores.logps is expected (is the model frozen, or the loss detached?)"
            )
        backward(loss)
        return loss.detach()

    def idle(logps: torch.Tensor) -> None:
        backward((logps * 0).sum())

    with reduce_once(model) as module:
        if self_check:
            check_on_first_use(module, groups, branch_forward, gradients=True, share_rows=share_rows)
        limits = max_branch_tokens, max_branches
        options = {"prompt_backward": prompt_backward, "share_rows": share_rows}
        losses, scores = _run(module, groups, train, idle, limits, branch_forward, **options)
    return torch.stack(losses).sum(), scores


@torch.no_grad()
def shared_prefix_scores(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    *,
    max_branch_tokens: int = BRANCH_TOKENS,
    max_branches: int | None = None,
    branch_forward: BranchForward = score_logits,
    share_rows: bool = True,
    self_check: bool = True,
) -> BranchScores:
    """Scores of all N completions in the order given, without gradients; for old and reference log-probabilities.

    Equals `score(model, [[prompt, c] for prompt, completions in groups for c in completions])`. Arguments and errors
    are those of `shared_prefix_backward`.
    """
    module = without_wrapper(model, gradients=False)
    if self_check:
        check_on_first_use(module, groups, branch_forward, gradients=False, share_rows=share_rows)

    def nothing(scores):
        pass

    limits = max_branch_tokens, max_branches
    return _run(module, groups, nothing, nothing, limits, branch_forward, share_rows=share_rows)[1]


def _run(model, groups, consume, idle, limits, branch_forward, **prompt_options):
    """Scores every group in micro-batches, hands each to `consume`; returns what that returned, and all scores.

    Where ranks must run the same forwards, one with no micro-batch left hands log-probabilities of a completion to
    `idle`.
    """
    if not groups:
        raise ValueError("no groups: every rank needs at least one, if only with a loss multiplied by zero")
    device = groups[0].prompt_ids.device
    lengths = [len(ids) for group in groups for ids in group.completions]
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]  # (N, R)
    everything = BranchScores(torch.arange(len(lengths), device=device), None, None, mask)
    plan = [micro_batches([len(ids) for ids in group.completions], *limits) for group in groups]
    has_prefix = [len(group.prompt_ids) > 1 for group in groups]
    num_batches = agree_on_micro_batches(model, [len(batches) for batches in plan], has_prefix, device)
    results, first_row = [], 0
    for place, num in enumerate(num_batches):
        group, batches = (groups[place], plan[place]) if place < len(groups) else (groups[-1], [])
        with SharedPrompt(model, group.prompt_ids, **prompt_options) as prompt:
            for batch in batches:
                logps, entropies, branch_mask = prompt.score([group.completions[i] for i in batch], branch_forward)
                scores = BranchScores(torch.tensor(batch, device=device) + first_row, logps, entropies, branch_mask)
                results.append(consume(scores))
                for name in ("logps", "entropies"):
                    part = getattr(scores, name)
                    if part is None:
                        continue
                    if getattr(everything, name) is None:
                        setattr(everything, name, part.new_zeros(mask.shape, requires_grad=False))
                    getattr(everything, name)[scores.rows, : part.shape[1]] = part.detach()
                del logps, entropies, scores, part  # the graph, where `consume` ran no backward
            for _ in range(num - len(batches)):
                idle(prompt.score([min(group.completions, key=len)], branch_forward)[0])
        first_row += len(group.completions)
    return results, everything
