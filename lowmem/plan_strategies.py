"""The planner as the `predict` of `lowmem.memory_strategy.choose_memory_strategy`: peaks under a `memory:` section.

    choose_memory_strategy(given, 2, 4096, budget_bytes=24 * 2**30, predict=peak_under(plan, num_processes=2))

Recomputation (whole layers, a share of them, all but the attention) is the real code, run without data. What several
processes divide and what an engine holds is arithmetic.
"""

from collections.abc import Callable

import torch

from lowmem.memory_strategy import MemorySettings
from lowmem.plan_config import PlanConfig, changed
from lowmem.plan_step import StepMemory, simulate

STATES = ("weights", "gradients", "optimizer")
BUCKET_BYTES = 2 * 4 * 5_000_000  # of lowmem.zero2.zero2_config


def peak_under(plan: PlanConfig, num_processes: int = 1, *, cuda: bool = False) -> Callable[[MemorySettings], int]:
    """A function from strategies to the peak bytes of one process, each simulated step run once.

    Processes that split a sequence divide the activations of training, and neither generation nor scoring. Offloaded
    activations are not simulated: their peak is that without offloading, which is never too low. `oom_recovery`
    changes no peak.

    Args:
        plan: a step of all processes together; its own recomputation is replaced. `rows_per_micro_batch` is what the
            processes that share sequences hold at once, `rows_per_rollout` what one process generates.
    """
    weight_bytes = getattr(torch, plan.dtype).itemsize
    steps: dict[str, StepMemory] = {}

    def predict(settings: MemorySettings) -> int:
        peers = settings.sequence_parallel_size(num_processes)
        rows_of_peers = plan.rows_per_step // (num_processes // peers)
        rows = min(plan.rows_per_micro_batch or rows_of_peers, rows_of_peers)
        ratio = settings.gradient_checkpointing_ratio
        own = changed(
            plan,
            rows_per_micro_batch=rows,
            rows_per_rollout=plan.rows_per_rollout or max(1, plan.rows_per_step // num_processes),
            gradient_checkpointing=False,
            selective_checkpointing=bool(settings.selective_checkpointing and ratio != 0 and plan.attention == "sdpa"),
            gradient_checkpointing_ratio=ratio or None,
        )
        if repr(own) not in steps:
            steps[repr(own)] = simulate(own, cuda=cuda)
        step = steps[repr(own)]
        # The simulated step has the rows of all processes and accumulates, where a process may have one micro-batch
        is_first = rows == rows_of_peers < plan.rows_per_step
        found = _phase_bytes(step, settings, num_processes, peers, is_first, weight_bytes, cuda)
        return max(found) + step.workspace_bytes

    return predict


def _phase_bytes(step, settings, num_processes, peers, is_first, weight_bytes, cuda) -> list[int]:
    """Of one process, by phase. `is_first`: its forward begins without the gradients that the simulated one has."""
    full = {name: step.by_phase["optimizer"].get(name, 0) for name in STATES}
    beside = {p: sum(n for c, n in held.items() if c not in STATES) for p, held in step.by_phase.items()}
    in_backward = max(0, beside["train_backward"] - beside["train_forward"])  # is not divided
    found = []
    for phase, held in step.by_phase.items():
        rest = beside[phase]
        if phase.startswith("train_"):
            rest = beside["train_forward"] // peers + (in_backward if phase == "train_backward" else 0)
        if settings.uses_deepspeed:
            states = engine_bytes(full, num_processes, weight_bytes, bool(settings.grad_offload), cuda)
            if not cuda and phase == "train_backward":
                states += 2 * in_backward
        else:  # DDP reduces through buckets as large as the gradients
            states = sum(held.get(name, 0) for name in STATES) + full["gradients"] * (num_processes > 1)
            if is_first and phase.startswith("train_"):
                states -= held.get("gradients", 0)
        found.append(states + rest)
    return found


def engine_bytes(states: dict[str, int], num_processes: int, weight_bytes: int, offload: bool, cuda: bool) -> int:
    """Weights, gradients and AdamW's state that DeepSpeed ZeRO-2 holds on one process's device.

    On a CPU, host and device are one, so offloading hides nothing; there it is what the engine was seen to hold (the
    records zero2_1, zero2_2 and zero2_4 of results/memory).

    Args:
        states: bytes of `STATES` in a process that has all of them.
        weight_bytes: of one weight.
    """
    in_float32 = 4 * states["gradients"] // weight_bytes  # of the trained weights
    if not cuda:
        return int(states["weights"] + 1.4 * in_float32 + 6 * in_float32 / num_processes) + BUCKET_BYTES
    part = 0 if offload else 4 * in_float32 // num_processes  # gradients, float32 weights, two moments
    return states["weights"] + part + BUCKET_BYTES
