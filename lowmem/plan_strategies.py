"""The planner as the `predict` of `lowmem.memory_strategy.choose_memory_strategy`: peaks under a `memory:` section.

choose_memory_strategy(given, 2, 4096, budget_bytes=24 * 2**30, predict=peak_under(plan, num_processes=2))
"""

from collections.abc import Callable

from lowmem.memory_strategy import MemorySettings, MemorySettingsError
from lowmem.plan_config import PlanConfig, changed
from lowmem.plan_step import simulate


def peak_under(plan: PlanConfig, num_processes: int = 1, *, cuda: bool = False) -> Callable[[MemorySettings], int]:
    """A function from strategies to the peak bytes of one process, each combination simulated once.

    Recomputation (whole layers, a share of them, all but the attention) is the real code, run without data. Two things
    are arithmetic: ZeRO-2 divides gradients and optimizer state, and processes that split a sequence divide what is
    above weights, gradients and optimizer state. `oom_recovery` changes no peak.

    Args:
        plan: of the rows that one process holds; its own recomputation and offload are replaced.
    """
    known: dict[MemorySettings, int] = {}

    def predict(settings: MemorySettings) -> int:
        if settings.activation_offloading:
            raise MemorySettingsError("memory.activation_offloading is not simulated; set it to false to be planned")
        if settings not in known:
            known[settings] = _peak(plan, settings, num_processes, cuda)
        return known[settings]

    return predict


def _peak(plan: PlanConfig, settings: MemorySettings, num_processes: int, cuda: bool) -> int:
    ratio = settings.gradient_checkpointing_ratio
    own = changed(
        plan,
        gradient_checkpointing=False,
        selective_checkpointing=bool(settings.selective_checkpointing),
        gradient_checkpointing_ratio=ratio if ratio or not settings.selective_checkpointing else None,
        offload_optimizer=bool(settings.grad_offload),
    )
    step = simulate(own, cuda=cuda)
    states = ("weights", "gradients", "optimizer")
    divided = ("gradients", "optimizer") if settings.uses_deepspeed and num_processes > 1 else ()
    peers = settings.sequence_parallel_size(num_processes)
    totals = []
    for categories in step.by_phase.values():
        held = sum(n / (num_processes if name in divided else 1) for name, n in categories.items() if name in states)
        rest = sum(n for name, n in categories.items() if name not in states)
        totals.append(held + rest / peers)
    return int(max(totals)) + step.workspace_bytes
