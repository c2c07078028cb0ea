"""One reduction for the several backwards of a shared prefix: DDP, FSDP2 and DeepSpeed ZeRO-2.

The obvious way, calling the wrapper as usual, is silently wrong. DDP arms its reducer in a forward and disarms it in
the next backward, so of m branches and a prompt some parts are never averaged, and ranks drift apart. Here each engine
gets the recipe that equals one process:

    DDP     forwards and backwards run on the module inside; `.grad` is averaged once at the end. Ranks may hold
            different numbers of groups and completions. (Letting the last backward synchronise instead needs a joint
            backward of the last branch and the prompt, which holds all gradients twice under checkpointing.)
    FSDP2   every backward reduces its shards. Each forward gathers weights, so ranks agree on the number of forwards
            beforehand and idle ranks run a branch with a loss of zero; the prompt's backward enters through the
            model's output, which gathers the last layer.
    ZeRO-2  forwards and backwards run on the module while the engine reduces nothing, as with DDP. Until the
            end every rank holds all gradients; afterwards its part.

`shared_prefix_backward(wrapper, ...)` does it by itself. Several calls before one optimizer step share a block:

    with reduce_once(engine) as module:
        for groups in accumulation:
            shared_prefix_backward(module, groups, loss_fn)
    engine.step()

All three average over ranks. So the loss of a rank is that of its rows times the number of ranks, divided by the rows
of all ranks.
"""

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

_in_care: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # modules whose gradients `reduce_once` or the caller reduces
_steps_at_reduction: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()  # by DeepSpeed engine


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_deepspeed_engine(model: nn.Module) -> bool:
    deepspeed = sys.modules.get("deepspeed")  # whoever holds an engine has imported it
    return deepspeed is not None and isinstance(model, deepspeed.DeepSpeedEngine)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 (`fully_shard`) shards the model."""
    return isinstance(model, FSDPModule)


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def without_wrapper(model: nn.Module, *, gradients: bool = True) -> nn.Module:
    """The module on which prompt and branches run: that inside DDP or DeepSpeed, else the model itself.

    Raises:
        NotImplementedError: if the wrapper has no exact recipe; says why and what to do.
    """
    reasons = _why_no_forward(model) + (_why_no_reduction(model) if gradients else [])
    if reasons:
        raise NotImplementedError("The shared prefix would not be exact here. " + " ".join(reasons))
    is_wrapper = isinstance(model, DistributedDataParallel) or is_deepspeed_engine(model)
    return model.module if is_wrapper else model


def _why_no_forward(model: nn.Module) -> list[str]:
    reasons = []
    inside = {type(module) for module in model.modules() if module is not model}
    if any(issubclass(kind, (FullyShardedDataParallel, DataParallel)) for kind in (*inside, type(model))):
        reasons.append(
            "FSDP1 and DataParallel tie parameters to one forward and backward at a time. Use FSDP2 (`fully_shard`) "
            "or DDP."
        )
    if any(issubclass(kind, DistributedDataParallel) for kind in inside):
        reasons.append("A module inside the model is wrapped in DDP. Wrap the whole model, outermost.")
    if _sharded_modules(model) and not is_sharded(model):
        reasons.append("Modules inside are sharded by FSDP2, the model is not. Call `fully_shard(model)` on it too.")
    if not is_sharded(model) and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        reasons.append("Parameters are distributed otherwise than by FSDP2 (tensor parallel?). Use FSDP2 or DDP.")
    if isinstance(model, DistributedDataParallel) and model.mixed_precision is not None:
        reasons.append("DDP's `mixed_precision` would be ignored. Use autocast, or load the model in that precision.")
    if is_deepspeed_engine(model) and model.zero_optimization_stage() == 3:
        reasons.append(
            "DeepSpeed ZeRO-3 releases a layer's weights when a backward has passed it, but the prompt's graph still "
            "needs them. Use ZeRO-2 (with `offload_optimizer` if memory is short) or FSDP2."
        )
    if is_deepspeed_engine(model) and model.torch_autocast_enabled():
        reasons.append("DeepSpeed's `torch_autocast` acts in the engine's forward, which is not called. Use `bf16`.")
    return reasons


def _why_no_reduction(model: nn.Module) -> list[str]:
    if isinstance(model, DistributedDataParallel) and model._comm_hooks:
        return ["DDP has a communication hook, which would be ignored. Do without `register_comm_hook`."]
    if is_sharded(model) and not _every_backward_reduces(model):
        return [
            "FSDP2's reduction is switched off, and gradients of several backwards would wait in places that the "
            "shared prefix does not look at. Leave `set_requires_gradient_sync` at True: every backward reduces its "
            "shards."
        ]
    if not is_deepspeed_engine(model):
        return []
    reasons = []
    stage = int(model.zero_optimization_stage())
    if stage < 2:
        reasons.append(f"DeepSpeed runs ZeRO stage {stage}, for which no recipe is tested. Use ZeRO-2, or plain DDP.")
    elif not hasattr(model.optimizer, "_coalesce_grad_reduction"):
        reasons.append(
            "This DeepSpeed or its optimizer cannot put off the reduction. Use DeepSpeed 0.19.8 and ZeRO-2."
        )
    if model.fp16_enabled():
        reasons.append("DeepSpeed scales an fp16 loss inside `engine.backward`, which is not called. Use `bf16`.")
    if len(set(model.get_data_types())) > 1:
        reasons.append(
            "DeepSpeed is to accumulate gradients in a type of their own, but those of a step of the shared prefix "
            "add up in the type of the weights. Leave `data_types.grad_accum_dtype` out."
        )
    if not model.managed_gradient_accumulation():
        reasons.append("DeepSpeed's `managed_gradient_accumulation` is false. Leave it at true.")
    return reasons


def _every_backward_reduces(model: nn.Module) -> bool:
    groups = [group for module in _sharded_modules(model) for group in module._get_fsdp_state()._fsdp_param_groups]
    return all(group.reduce_grads and group.all_reduce_grads for group in groups)


@contextmanager
def reduce_once(model: nn.Module) -> Iterator[nn.Module]:
    """All backwards of an optimizer step go inside; after the block gradients are averaged over ranks.

    With one process, and with FSDP2, which reduces every backward, the block does nothing. Under `ddp.no_sync()` the
    reduction is left out, as DDP does. When an exception leaves the block nothing is reduced.

    Yields:
        The module to call inside the block, in the place of `model`.

    Raises:
        NotImplementedError: see `without_wrapper`.
        RuntimeError: if several processes run and nothing says who reduces the gradients; if DeepSpeed would not step
            after the block, or did not since the last one.
    """
    if model in _in_care:  # inside a block already
        yield model
        return
    module = without_wrapper(model)
    if module is model:
        refuse_unreduced(model)
        yield model
        return
    is_engine = is_deepspeed_engine(model)
    if is_engine:
        _refuse_lost_engine_steps(model)
    with _engine_keeps_gradients(model) if is_engine else nullcontext(), gradients_stay_local(module):
        yield module
    if is_engine:
        _agree_on_gradients(list(module.parameters()), model.data_parallel_group)
        with model.coalesce_grad_reduction():
            pass  # reduces what the parameters hold
        _steps_at_reduction[model] = model.micro_steps
    elif model.require_backward_grad_sync:
        ignored = model.parameters_to_ignore
        _average([p for name, p in module.named_parameters() if name not in ignored], model.process_group)


@contextmanager
def _engine_keeps_gradients(engine) -> Iterator[None]:
    """`engine.coalesce_grad_reduction()` without its reduction at the end, which would hang if only one rank fails."""
    engine.inside_no_sync_ctxt = engine.optimizer._coalesce_grad_reduction = True
    try:
        yield
    finally:
        engine.inside_no_sync_ctxt = engine.optimizer._coalesce_grad_reduction = False


@contextmanager
def gradients_stay_local(model: nn.Module) -> Iterator[None]:
    """Says that gradients are meant to differ between ranks inside the block, because the caller reduces them."""
    was_in_care = model in _in_care
    _in_care.add(model)
    try:
        yield
    finally:
        if not was_in_care:
            _in_care.discard(model)


def refuse_unreduced(model: nn.Module) -> None:
    """Raises RuntimeError if backwards through `model` would leave every rank with gradients of its own."""
    if model in _in_care or is_sharded(model):
        return
    block = "with lowmem.shared_prefix_distributed.reduce_once(wrapper) as module:"
    if isinstance(model, DistributedDataParallel) or is_deepspeed_engine(model):
        raise RuntimeError(
            f"{type(model).__name__} expects one backward per forward and would reduce some of the shared prefix's "
            f"gradients and not others. Give it to `shared_prefix_backward`, or write `{block}` and use `module`."
        )
    if num_ranks() > 1:
        raise RuntimeError(
            f"{num_ranks()} processes run, and nothing would reduce the gradients of this {type(model).__name__} over "
            f"them: ranks would drift apart. Wrap it in DDP, FSDP2 or DeepSpeed ZeRO-2 and give the wrapper to "
            f"`shared_prefix_backward`, or write `{block}`. If you reduce them yourself, write `with "
            "gradients_stay_local(model):`."
        )


def _refuse_lost_engine_steps(engine) -> None:
    if _steps_at_reduction.get(engine) == engine.micro_steps:
        raise RuntimeError(
            "DeepSpeed holds reduced gradients of an earlier call that would be overwritten: `engine.step()` was not "
            "called since. Put all calls of an optimizer step into one `with reduce_once(engine) as module:`."
        )
    if not engine.is_gradient_accumulation_boundary():
        raise RuntimeError(
            f"DeepSpeed's `gradient_accumulation_steps` is {engine.gradient_accumulation_steps()}: `engine.step()` "
            "would not update the weights, but the shared prefix takes all backwards of a step at once. Set it to 1, "
            "or call `engine.set_gradient_accumulation_boundary(True)`."
        )


def _agree_on_gradients(parameters: Sequence[nn.Parameter], group) -> list[nn.Parameter]:
    """Parameters that have a gradient on some rank; on the others it becomes zero (an expert no token chose there)."""
    has_gradient = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
    has_gradient = has_gradient.to(parameters[0].device)
    dist.all_reduce(has_gradient, dist.ReduceOp.MAX, group)
    parts = [p for p, has in zip(parameters, has_gradient.tolist()) if has]
    for parameter in parts:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return parts


def _average(parameters: Sequence[nn.Parameter], group) -> None:
    grads = []
    for parameter in _agree_on_gradients(parameters, group):
        parameter.grad = parameter.grad.contiguous()
        grads.append(parameter.grad)
    for work in [dist.all_reduce(grad, group=group, async_op=True) for grad in grads]:
        work.wait()
    for grad in grads:
        grad /= dist.get_world_size(group)


def reshard(model: nn.Module) -> None:
    """Puts FSDP2's parameters, to which `.grad` and the optimizer belong, in the place of gathered ones."""
    for module in _sharded_modules(model):
        module.reshard()


def agree_on_micro_batches(model: nn.Module, counts: Sequence[int], has_prefix: Sequence[bool], device) -> list[int]:
    """Micro-batches that this rank runs for its first, second, ... group: `counts`; with FSDP2 the most of any rank.

    Args:
        counts: of this rank's groups.
        has_prefix: by group, whether a prompt forward precedes its micro-batches.

    Raises:
        ValueError: on all ranks, if groups at the same place differ in `has_prefix`.
    """
    if not is_sharded(model) or num_ranks() == 1:
        return list(counts)
    num_groups = torch.tensor(len(counts), device=device)
    dist.all_reduce(num_groups, dist.ReduceOp.MAX)
    plan = torch.zeros(3, int(num_groups), dtype=torch.int64, device=device)  # count, some with, some without prefix
    for place, (count, prefix) in enumerate(zip(counts, has_prefix)):
        plan[:, place] = torch.tensor([count, prefix, not prefix])
    some_with, some_without = plan[1, len(counts) :], plan[2, len(counts) :]  # idle groups repeat the last one
    (some_with if has_prefix[-1] else some_without).fill_(1)
    dist.all_reduce(plan, dist.ReduceOp.MAX)
    if (plan[1] + plan[2] > 1).any():
        raise ValueError(
            "FSDP2 gathers weights in every forward, so ranks must run the same ones, but some prompts have one token "
            "(nothing to share, no forward) and others more. Give every prompt at least two tokens."
        )
    return plan[0].tolist()


def least_of_ranks(model: nn.Module, count: int, device) -> int:
    """The least `count` of all ranks with FSDP2, which must run the same forwards; else `count`."""
    if not is_sharded(model) or num_ranks() == 1:
        return count
    least = torch.tensor(count, device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)
