"""What to do about a failure: the guideline's order, corrected where the planner's figures contradict it.

The guideline (docs/planner.md) puts the data loader first, then the evaluation batch, then the training batch. That
order is kept for the host, where it is right. On the device neither workers nor their number take a byte, so there the
plan's own ranking decides, and the effective batch is kept by gradient accumulation.
"""

import math
from dataclasses import dataclass, field

from lowmem.failures import Finding, of_tensors


@dataclass
class Remedy:
    """A change of settings and its reason. `settings` is empty where only the environment or the code changes."""

    action: str
    reason: str
    settings: dict = field(default_factory=dict)


def smaller_batch(batch: int, accumulation: int, factor: float = 0.75) -> tuple[int, int]:
    """(batch, accumulation) with at most `factor` of the rows at once and the same effective batch.

    The guideline cuts by a quarter (16, 12, 8, 6), which changes the effective batch; here the batch is the largest
    divisor of the effective batch that is not above the cut.
    """
    effective = batch * accumulation
    target = max(1, math.floor(batch * factor))
    rows = max(r for r in range(1, target + 1) if effective % r == 0)
    return rows, effective // rows


def remedies(finding: Finding, settings: dict | None = None, fixes: list | None = None) -> list[Remedy]:
    """Ordered, first first.

    Args:
        settings: per_device_train_batch_size, gradient_accumulation_steps, per_device_eval_batch_size and
            dataloader_num_workers, as far as they are known.
        fixes: `lowmem.plan_search.Fix` of the run, ranked, where the run could be planned.
    """
    settings = settings or {}
    workers, out = settings.get("dataloader_num_workers"), []
    if finding.kind == "fragmentation":
        out.append(_expandable("the allocator holds memory that it cannot use; this lets segments grow"))
        out.append(Remedy("torch.cuda.empty_cache() between generation and training", "phases ask for other sizes"))
    elif finding.kind == "device out of memory":
        out += [_of_fix(fix) for fix in fixes or [] if fix.saved_bytes > 0]
        if not fixes:
            out += _batches(settings)
            out.append(Remedy("recompute activations", "about a third more time", {"gradient_checkpointing": True}))
        out.append(_expandable("costs nothing; worth as much as is reserved and unused"))
        out.append(Remedy("leave the data loader alone", "its workers hold host memory, not the device's"))
    elif of_tensors(finding):  # training on the CPU
        out += [_of_fix(fix) for fix in fixes or [] if fix.saved_bytes > 0] or _batches(settings)
        if workers is None or workers > 0:
            out.append(Remedy("fewer data loader workers", "they share the host with the tensors"))
    elif finding.kind in ("host out of memory", "data loader worker killed", "shared memory exhausted"):
        if workers is None:
            out.append(Remedy("halve dataloader_num_workers", "every worker is a process of its own"))
        elif workers > 0:
            out.append(
                Remedy(
                    "halve dataloader_num_workers",
                    f"{workers} processes of their own",
                    {"dataloader_num_workers": workers // 2},
                )
            )
        out.append(Remedy("no pinned memory", "pinned pages cannot be given back", {"dataloader_pin_memory": False}))
        if finding.kind == "shared memory exhausted":
            out.append(
                Remedy("raise the container's shared memory (--shm-size)", "workers hand batches over through it")
            )
        out += _evaluation(settings)
        out.append(Remedy("raise the memory limit of the container", "if the plan's host figure is above it"))
    elif finding.kind == "broken pipe":
        out.append(
            Remedy(
                "look for what ended first",
                "a broken pipe is what the other end says: a killed worker, a full disk, an interrupted run",
            )
        )
        if workers is None or workers:
            out.append(
                Remedy(
                    "run once without workers", "the error then shows where it happens", {"dataloader_num_workers": 0}
                )
            )
    elif finding.kind == "NCCL time-out":
        out.append(
            Remedy(
                "look at the log of every rank for the one that stopped first",
                "an out-of-memory on one rank is a time-out on the others",
            )
        )
        out.append(
            Remedy(
                "see that every rank makes the same number of steps and generates as long",
                "a rank that waits is told to time out",
            )
        )
        out.append(Remedy("raise ddp_timeout", "if a step is only slow", {"ddp_timeout": 3600}))
    elif finding.kind == "leak":
        out.append(
            Remedy(
                "keep numbers and not tensors: .item() or .detach() in what is logged or collected",
                "a tensor of the loss holds its whole graph",
            )
        )
        out.append(Remedy("see that caches and hooks end with their step", "the peak rises with every step"))
    return out


def _expandable(reason: str) -> Remedy:
    return Remedy("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True", reason)


def _of_fix(fix) -> Remedy:
    time = "time not known" if fix.time_ratio is None else f"operations x{fix.time_ratio:.2f}"
    saved = f"saves {fix.saved_bytes / 2**30:.2f} GiB (simulated), {time}"
    return Remedy(fix.name, f"{saved}; {fix.note}" if fix.note else saved, dict(fix.changes))


def _evaluation(settings: dict) -> list[Remedy]:
    batch = settings.get("per_device_eval_batch_size")
    if batch is None or batch < 2:
        return []
    return [Remedy("halve the evaluation batch", "it changes no result", {"per_device_eval_batch_size": batch // 2})]


def _batches(settings: dict) -> list[Remedy]:
    out = _evaluation(settings)
    batch, accumulation = settings.get("per_device_train_batch_size"), settings.get("gradient_accumulation_steps", 1)
    if batch is None:
        out.append(
            Remedy("cut per_device_train_batch_size and raise gradient_accumulation_steps", "keep their product")
        )
    elif batch > 1:
        rows, times = smaller_batch(batch, accumulation)
        changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": times}
        out.append(Remedy("smaller micro-batch", f"the effective batch stays {batch * accumulation}", changes))
    return out
