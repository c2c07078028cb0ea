"""Gradients and optimizer state divided over processes and kept on the host: DeepSpeed ZeRO-2 with offload, checked.

The obvious way, DDP, holds all gradients and all of AdamW's state on every device. ZeRO-2 reduces every gradient to
the process that owns its part, which runs AdamW on the CPU on that part, and gathers the parameters back. One GPU is
the same path with one part. DeepSpeed does the work; here is the configuration that was shown to be exact, and a check
that it is really in force, because most of the ways to lose it raise no error:

    RLOOConfig(deepspeed=zero2_config(), ...)             # any transformers trainer; torchrun, or `stand_alone()`
    trainer.add_callback(Zero2Check(num_processes=2))     # stops at the first step if something is not sharded

A plain loop calls `check_zero2(engine.optimizer, num_processes)` after `deepspeed.initialize`.
"""

import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.cpp_extension import get_default_build_root
from transformers import TrainerCallback

# Optimizers whose update of a weight depends on that weight's own gradients only, so that a part of a tensor is enough
_ELEMENTWISE = frozenset(
    {"AdamW", "Adam", "DeepSpeedCPUAdam", "FusedAdam", "SGD", "Adagrad", "DeepSpeedCPUAdagrad", "RMSprop", "NAdam"}
    | {"RAdam", "Adamax", "Adadelta", "Lion", "FusedLion", "DeepSpeedCPULion"}
)


def zero2_config(*, offload: bool = True, bucket_elements: int = 5_000_000) -> dict:
    """A DeepSpeed configuration for `TrainingArguments(deepspeed=...)`, without a file.

    A model whose weights are float32 is trained in bfloat16 where the trainer says `bf16=True` (TRL's default), with
    float32 master weights: that is DeepSpeed's mixed precision, not autocast's, whose weights stay float32. Say
    `bf16=False` for the numbers of a plain float32 run.

    Args:
        offload: keep gradient parts, float32 weights and AdamW's state on the host, and step there.
        bucket_elements: gradients that are reduced at once. Two buckets are held on the device.
    """
    zero = {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": bucket_elements,
        "allgather_bucket_size": bucket_elements,
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, on the part; DeepSpeed's own has to be compiled
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "bf16": {"enabled": "auto"},
    }


def stand_alone() -> None:
    """Makes a process that no launcher started a world of its own, for one GPU without torchrun.

    Without ranks in the environment DeepSpeed looks for MPI. Call it before the trainer's config is made; in a
    process of torchrun it changes nothing.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ.update(alone)


def check_compile_locks(oldest_s: float = 600) -> None:
    """DeepSpeed compiles an operator on its first use and waits for a process that does so already, for ever if that
    one was killed: its lock stays. On a CPU that is the first ZeRO-2 run of a user.

    Raises:
        RuntimeError: for a lock that is older than any compilation takes.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("deepspeed_*/lock"), *root.glob("*/deepspeed_*/lock")):
        try:
            age_s = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # a peer has just finished
            continue
        if age_s > oldest_s:
            raise RuntimeError(
                f"{lock} says that a process has been compiling DeepSpeed's operator for over {oldest_s / 60:.0f} "
                "minutes; it was probably killed, and DeepSpeed would wait for it for ever. Delete that file."
            )


class NotSharded(RuntimeError):
    """The training would run, but not as ZeRO-2 with the processes that were asked for."""


def zero_optimizer(optimizer):
    """DeepSpeed's optimizer inside accelerate's and transformers' wrappers.

    Raises:
        NotSharded: if there is none: DDP or a single plain process would train instead.
    """
    inner = optimizer
    while inner is not None and not hasattr(inner, "single_partition_of_fp32_groups"):
        inner = getattr(inner, "optimizer", None)
    if inner is None:
        raise NotSharded(
            f"ZeRO-2 was asked for, but the optimizer is a {type(optimizer).__name__} without DeepSpeed's inside. "
            "Pass `deepspeed=` to the trainer's config (accelerate drops FSDP on CPUs without an error, and "
            "`accelerate launch` needs `distributed_type: DEEPSPEED`)."
        )
    return inner


def zero2_bytes(optimizer) -> dict[str, int]:
    """Bytes of this process's parts, and of the whole gradients, in float32.

    `gradient_bytes`, `master_bytes` (float32 weights), `optimizer_bytes` (AdamW's two moments; 0 before the first
    step), `accumulated_bytes` (gradients kept on the host between micro-batches: the parameters that lie in this part,
    whole), `device_gradient_bytes` (of parameters, should be 0 between steps) and `full_gradient_bytes`.
    """
    zero = zero_optimizer(optimizer)
    parts = zero.single_partition_of_fp32_groups
    states = [state for part in parts for state in zero.optimizer.state.get(part, {}).values()]
    parameters = [parameter for group in zero.bit16_groups for parameter in group]
    return {
        "gradient_bytes": sum(_bytes(part.grad) for part in parts),
        "master_bytes": sum(_bytes(part) for part in parts),
        "optimizer_bytes": sum(_bytes(state) for state in states if torch.is_tensor(state) and state.ndim),
        "accumulated_bytes": sum(map(_bytes, getattr(zero, "accumulated_grads_in_cpu", {}).values())),
        "device_gradient_bytes": sum(_bytes(parameter.grad) for parameter in parameters),
        "full_gradient_bytes": 4 * sum(parameter.numel() for parameter in parameters),
    }


def _bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def check_zero2(optimizer, num_processes: int | None = None) -> dict[str, int]:
    """`zero2_bytes`, after making sure that this is ZeRO-2 over the whole world.

    Args:
        num_processes: how many were asked for; None takes what runs.

    Raises:
        NotSharded: if DeepSpeed is not active, the optimizer is not one that works on parts, the world is not as large
            as asked for, gradients are divided over a part of the world only (a mesh or sequence-parallel setting of
            DeepSpeed), or parts are larger than 1/N.
    """
    zero = zero_optimizer(optimizer)
    world = dist.get_world_size()
    if num_processes not in (None, world):
        raise NotSharded(
            f"{num_processes} processes were asked for and {world} run. Start them with `torchrun --nproc_per_node "
            f"{num_processes}` (WORLD_SIZE is {os.environ.get('WORLD_SIZE', 'not set')}; `accelerate launch` with "
            "MULTI_CPU starts one whatever num_processes says)."
        )
    kind, bits = type(zero.optimizer).__name__, getattr(getattr(zero.optimizer, "args", None), "optim_bits", 32)
    if kind not in _ELEMENTWISE or bits == 8:
        raise NotSharded(
            f"{kind}{' with blocks of 8 bits' * (bits == 8)} would run on a flat part of the weights of each process; "
            "one that looks at whole tensors (shapes, norms or blocks) then gives other weights, without an error. "
            f"Use one of {sorted(_ELEMENTWISE)}."
        )
    if not zero.partition_gradients:
        raise NotSharded("DeepSpeed runs ZeRO stage 1, which keeps whole gradients. Set `stage: 2`.")
    for number, (group, parameters) in enumerate(zip(zero.real_dp_process_group, zero.bit16_groups)):
        if dist.get_world_size(group) != world:
            raise NotSharded(
                f"gradients of parameter group {number} are divided over {dist.get_world_size(group)} of {world} "
                "processes, and the others would drift apart. Remove `mesh_param`, `sequence_parallel_size` and "
                "`data_parallel_size` from the DeepSpeed configuration: it need not know of sequence parallelism."
            )
        whole = sum(parameter.numel() for parameter in parameters)
        part = zero.single_partition_of_fp32_groups[number].numel()
        alignment = zero.nccl_start_alignment_factor * world  # the whole is padded to a multiple of it
        if part * world >= whole + alignment:
            raise NotSharded(f"parameter group {number}: {part} of {whole} elements on this process of {world}")
    return zero2_bytes(optimizer)


class Zero2Check(TrainerCallback):
    """Calls `check_zero2` when training begins, and reads the bytes after every optimizer step.

    Attributes:
        bytes: the latest `zero2_bytes`, None before training.

    Raises:
        NotSharded: see `check_zero2`; also if whole gradients are left on the device after a step.
    """

    def __init__(self, num_processes: int | None = None):
        self.num_processes = num_processes
        self.bytes: dict[str, int] | None = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self.bytes = check_zero2(optimizer, self.num_processes)

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.bytes = zero2_bytes(optimizer)
        if self.bytes["device_gradient_bytes"]:
            raise NotSharded(f"whole gradients are left on the device after a step: {self.bytes}")
