"""The `memory:` section of a run: what is chosen, what it means to the trainer, and what the record says of it.

    memory:
      auto_memory_strategy: true
      selective_checkpointing: true

See docs/memory_strategies.md for the names. A run without the section does what it did before there was one.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from config import GIB, ExperimentConfig
from memory_samples import status_kib

if TYPE_CHECKING:  # imported where it is used: a run's record lists the library files that the run imported
    from lowmem.memory_strategy import MemoryChoice, MemorySettings


def num_processes() -> int:
    """As torchrun and accelerate start them."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def decide(config: ExperimentConfig, stage, longest_prompt: int | None = None) -> "MemoryChoice | None":
    """The strategies of the run; None if the configuration has no `memory` section.

    Args:
        longest_prompt: tokens of the longest prompt of a data set; None for built-in prompts, whose length is set.

    Raises:
        MemorySettingsError: see `choose_memory_strategy`; also for a tree that has none of the strategies.
    """
    if config.memory is None:
        return None
    from lowmem.memory_strategy import MemorySettingsError, choose_memory_strategy, parse_memory_settings

    settings = parse_memory_settings(config.memory)
    if longest_prompt is not None:
        config = dataclasses.replace(config, prompt_tokens=longest_prompt)
    if stage.pin != "v1.16.0" or stage.name == "0":
        raise MemorySettingsError(
            f"the variant {config.variant!r} has no memory strategies. Use `memory`, which is TRL v1.16.0 with the "
            "patch series, or remove the `memory` section."
        )
    if config.variant.startswith("shared-prefix"):
        if settings.sequence_parallel_size(num_processes()) > 1:
            raise MemorySettingsError(
                "memory.sequence_parallelism contradicts the shared prefix, whose prompt is kept as keys and values "
                "that would have to be split as well. Use the variant `memory` where completions are long."
            )
        settings = dataclasses.replace(settings, sequence_parallelism=False)
    choice = choose_memory_strategy(
        settings,
        num_processes(),
        config.prompt_tokens + config.response_tokens,
        budget_bytes=tensor_budget(config),
        predict=planned_peak(config),
        has_accelerator=torch.accelerator.is_available(),
    )
    if choice.settings.gradient_checkpointing_ratio == 0 and config.gradient_checkpointing:
        if settings.gradient_checkpointing_ratio == 0:
            raise MemorySettingsError("gradient_checkpointing is true and memory.gradient_checkpointing_ratio is 0")
    if rank() == 0:
        print(choice, flush=True)
    return choice


def tensor_budget(config: ExperimentConfig) -> int | None:
    """The largest predicted peak that `budget_gib` leaves room for, beside the process and what is not simulated."""
    if config.budget_gib is None:
        return None
    from lowmem.plan_verdict import CPU, CUDA, largest_peak

    budget = int(config.budget_gib * GIB)
    if torch.cuda.is_available():
        return largest_peak(budget, CUDA)
    return largest_peak(budget - status_kib("VmRSS") * 1024, CPU)


def planned_peak(config: ExperimentConfig) -> "Callable[[MemorySettings], int]":
    """Peak bytes of one process under settings, of the planner's step and not of the whole trainer: equal to recorded
    peaks to about a tenth (docs/memory_strategies.md)."""
    from lowmem.plan_config import PlanConfig, from_training_file
    from lowmem.plan_strategies import peak_under

    known = dataclasses.asdict(config)
    names = known.keys() - {"memory", "variant", "gradient_checkpointing", "rows_per_rollout"}
    shape = from_training_file({name: known[name] for name in names})
    shape |= {"shared_prefix": config.variant.startswith("shared-prefix"), "lm_head": "completion"}
    shape["vocab_size"] = config.vocab_size or config.tokenizer_vocab_size
    if shape["shared_prefix"]:  # never padded
        shape.pop("prompt_tokens_min", None)
    return peak_under(PlanConfig(**shape), num_processes(), cuda=torch.cuda.is_available())


def rloo_arguments(config: ExperimentConfig, choice: "MemoryChoice | None") -> dict:
    """What the choice means to `RLOOConfig`. Rows of a step are those of all processes.

    Raises:
        ValueError: if the rows of a step cannot be divided over the processes.
    """
    settings = None if choice is None else choice.settings
    size = 1 if settings is None else settings.sequence_parallel_size(num_processes())
    pools = num_processes() // size  # groups of processes that hold the same rows
    if config.rows_per_step % pools:
        raise ValueError(
            f"{config.rows_per_step} rows of a step cannot be divided over {pools} processes (or groups of them that "
            "split sequences). Change rloo_k or prompts_per_step."
        )
    arguments = {}
    if num_processes() > 1:
        rows = min(config.rows_per_micro_batch or config.rows_per_step, config.rows_per_step // pools)
        arguments["per_device_train_batch_size"] = rows
        arguments["gradient_accumulation_steps"] = config.rows_per_step // pools // rows
    if settings is None:
        return arguments
    if settings.gradient_checkpointing_ratio:
        arguments["gradient_checkpointing"] = True
        arguments["gradient_checkpointing_ratio"] = settings.gradient_checkpointing_ratio
        arguments["selective_checkpointing"] = settings.selective_checkpointing
    if settings.uses_deepspeed:
        from lowmem.zero2 import check_compile_locks, stand_alone, zero2_config

        check_compile_locks()
        stand_alone()
        arguments["deepspeed"] = zero2_config(offload=bool(settings.grad_offload))
    if size > 1:
        arguments["sequence_parallel_size"] = size
    for name in ("activation_offloading", "oom_recovery"):
        if getattr(settings, name):
            arguments[name] = True
    return arguments


_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class ProductFlops(TorchDispatchMode):
    """Floating-point operations of matrix products and of attention, and calls of attention operators.

    Attributes:
        flops: 2 m k n for every product (m, k) x (k, n).
        attention_flops: of the CPU's flash kernels, which contain no such products, forward and backward; half where
            attention is causal, because they skip the keys after a query (not those that a mask hides).
        attention_calls: forward calls of a whole attention.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.attention_flops = self.attention_calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.flops += 2 * out.numel() * args[0].shape[-1]
        elif func in (torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            self.flops += 2 * out.numel() * args[1].shape[-1]
        elif "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.attention_calls += 1
        if func in (_flash_cpu, _flash_cpu_backward):
            backward = func is _flash_cpu_backward
            shapes = [tensor.shape for tensor in args[: 4 if backward else 3]]
            is_causal = args[7] if backward else len(args) > 4 and args[4]
            count = (sdpa_backward_flop_count if backward else sdpa_flop_count)(*shapes)
            self.attention_flops += count // 2 if is_causal else count
        return out


def callbacks(choice: "MemoryChoice | None") -> list:
    """What checks at the start that the engine is in force."""
    if choice is None or not choice.settings.uses_deepspeed:
        return []
    from lowmem.zero2 import Zero2Check

    return [Zero2Check(num_processes())]


def check_world(trainer) -> None:
    """Raises RuntimeError if the trainer does not communicate with all processes that were started: each would train
    for itself, to the end and without an error."""
    found = trainer.accelerator.num_processes
    if found != num_processes():
        raise RuntimeError(
            f"{num_processes()} processes were started (WORLD_SIZE), but the trainer sees {found}: they would train "
            "apart from each other. Start them with torchrun; without an accelerator, `use_cpu` has to be true."
        )


def record_of(choice: "MemoryChoice | None", trainer, products: ProductFlops) -> dict | None:
    """For the run's record: settings, reason, predicted peak, bytes of this process's parts, out-of-memories, and the
    work of this process in all steps."""
    if choice is None:
        return None
    from lowmem.zero2 import Zero2Check

    checks = [c for c in trainer.callback_handler.callbacks if isinstance(c, Zero2Check)]
    recovery = trainer._oom_recovery
    return {
        "settings": vars(choice.settings),
        "strategies": choice.settings.describe(),
        "reason": choice.reason,
        "predicted_peak_bytes": choice.predicted_peak_bytes,
        "rejected": list(choice.rejected),
        "num_processes": trainer.accelerator.num_processes,
        "rank": trainer.accelerator.process_index,
        "zero2_bytes": checks[0].bytes if checks else None,
        "oom_events": None if recovery is None else recovery.events,
        "product_flops": products.flops,
        "attention_calls": products.attention_calls,
    }
