"""The shared prefix in two processes with DDP, FSDP2 and DeepSpeed ZeRO-2 equals one process with stock forwards.

Compared, on both ranks, over 3 AdamW steps with clipping: the gradient norm, every gradient, every parameter. Rank 0
holds two groups of 4 and 3 completions, rank 1 one group of 3, so numbers of groups and micro-batches differ.

Run by torchrun, this file is one rank: `python -m torch.distributed.run --nproc_per_node=2 <this file> <out> <cases>`.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_shared_prefix_models import Float64Everywhere, Losses, make_groups, make_model, plain_scores
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lowmem import shared_prefix_distributed, shared_prefix_prompt
from lowmem.shared_prefix import BranchScores, shared_prefix_backward, shared_prefix_scores
from lowmem.shared_prefix_distributed import gradients_stay_local, reduce_once
from lowmem.shared_prefix_prompt import SharedPrompt

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [(23, (7, 12, 1, 5)), (9, (4, 9, 2)), (14, (6, 3, 8))]  # P and R_i
GROUPS_OF_RANK = [slice(0, 2), slice(2, 3)]
STEPS, MAX_GRAD_NORM, TIME_LIMIT_S = 3, 0.5, 240
ADAM = {"lr": 1e-2, "eps": 1e-3}  # Adam at 1e-8 turns rounding of a near-zero gradient into a full step
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


# --- one rank, as a script -------------------------------------------------------------------------------------------


def build(case: dict) -> torch.nn.Module:
    model = make_model("qwen3", getattr(torch, case["dtype"]))
    if case.get("lora"):
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4, init_lora_weights=False)
        model = get_peft_model(model, config).to(getattr(torch, case["dtype"]))
    if case.get("checkpointing"):
        model.get_base_model().activation_checkpointing_enable() if case.get(
            "lora"
        ) else model.activation_checkpointing_enable()
    return model


def trainable(model) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().double().clone()


def reference_steps(case: dict) -> dict[str, torch.Tensor]:
    """One process, all groups, stock forwards of one row at a time."""
    model, groups, result = build(case), make_groups(LENGTHS), {}
    loss_fn = Losses(model, groups).grpo
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)], **ADAM)
    for step in range(STEPS):
        loss_fn(plain_scores(model, groups)).backward()
        result |= {f"{step}.grad.{name}": whole(parameter.grad) for name, parameter in trainable(model)}
        result[f"{step}.norm"] = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM))
        optimizer.step()
        optimizer.zero_grad()
        result |= {f"{step}.param.{name}": whole(parameter) for name, parameter in trainable(model)}
    return result


def rank_loss(case: dict):
    """The loss of this rank's rows: that of all rows, times the number of ranks, because engines average."""
    groups, rank = make_groups(LENGTHS), dist.get_rank()
    losses = Losses(build(case), groups)
    first_row = sum(len(group.completions) for group in groups[: GROUPS_OF_RANK[rank].start])

    def loss_fn(scores):
        rows = BranchScores(scores.rows + first_row, scores.logps, scores.entropies, scores.mask)
        return losses.grpo(rows) * dist.get_world_size()

    return groups[GROUPS_OF_RANK[rank]], loss_fn


def wrapped_steps(case: dict) -> dict[str, torch.Tensor]:
    """Three steps in this case's engine."""
    groups, loss_fn = rank_loss(case)
    model, result = build(case), {}
    names = [name for name, _ in trainable(model)]
    if case["engine"].startswith("zero2"):
        return zero2_steps(case, model, groups, loss_fn)
    if case["engine"] == "ddp":
        model = DistributedDataParallel(model)
    else:
        model = shard(model, case)
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)], **ADAM)
    for step in range(STEPS):
        train(case, model, groups, loss_fn)
        parameters = [parameter for _, parameter in trainable(model)]
        result |= {f"{step}.grad.{name}": whole(parameter.grad) for name, parameter in zip(names, parameters)}
        result[f"{step}.norm"] = whole(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM))
        optimizer.step()
        optimizer.zero_grad()
        result |= {f"{step}.param.{name}": whole(parameter) for name, parameter in zip(names, parameters)}
    return result


def shard(model, case):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    options = {"mesh": init_device_mesh("cpu", (2,)), "reshard_after_forward": case.get("reshard", True)}
    if case.get("offload"):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def zero2_steps(case, model, groups, loss_fn):
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    zero = {"stage": case.get("stage", 2), "overlap_comm": False, "reduce_bucket_size": 3000}
    if case["engine"] == "zero2-offload":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.get("gradient_accumulation_steps", 1),
        "gradient_clipping": MAX_GRAD_NORM,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    names = [name for name, _ in trainable(model)]
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable(model)], **ADAM)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    result = {}
    for step in range(STEPS):
        train(case, engine, groups, loss_fn)
        parameters = [parameter for _, parameter in trainable(engine.module)]
        result |= {f"{step}.grad.{name}": whole(safe_get_full_grad(p)) for name, p in zip(names, parameters)}
        engine.step()
        result[f"{step}.norm"] = torch.as_tensor(engine.get_global_grad_norm()).double()
        result |= {f"{step}.param.{name}": whole(p) for name, p in zip(names, parameters)}
    return result


def train(case, model, groups, loss_fn):
    """One step's gradients, or a wrong recipe if the case names one."""
    options = {"max_branches": 2}
    if case.get("accumulate"):  # one call per group
        with reduce_once(model) as module:
            for number, group in enumerate(groups):
                first = sum(len(g.completions) for g in groups[:number])

                def group_loss(scores, first=first):
                    return loss_fn(BranchScores(scores.rows + first, scores.logps, None, scores.mask))

                shared_prefix_backward(module, [group], group_loss, **options)
    else:
        shared_prefix_backward(model, groups, loss_fn, **options)


def run_rank(out: str, cases: dict[str, dict]) -> None:
    from safetensors.torch import save_file

    dist.init_process_group("gloo")
    results, messages = {}, {}
    for name, case in cases.items():
        try:
            with Float64Everywhere() if case["dtype"] == "float64" else torch.enable_grad():
                steps = wrapped_steps(case)
            results |= {f"{name}/{key}": value.contiguous() for key, value in steps.items()}
        except Exception as error:
            import traceback

            messages[name] = f"{type(error).__name__}: {error} {traceback.format_exc()[-1500:]}"
        dist.barrier()
    save_file(results, f"{out}{dist.get_rank()}.safetensors")
    Path(f"{out}{dist.get_rank()}.json").write_text(json.dumps(messages))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(sys.argv[1], json.loads(sys.argv[2]))
