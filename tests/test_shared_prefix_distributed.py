"""The shared prefix in two processes with DDP, FSDP2 and DeepSpeed ZeRO-2 equals one process with stock forwards.

Compared, on both ranks, over 3 AdamW steps with clipping: the gradient norm, every gradient, every parameter. Rank 0
holds two groups of 4 and 3 completions, rank 1 one group of 3, so numbers of groups and micro-batches differ.

Run by torchrun, this file is one rank that runs every case of its engines.
"""

import datetime
import importlib.util
import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_shared_prefix_models import Float64Everywhere, Losses, make_groups, make_model, plain_scores
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torchrun import launch

from lowmem import shared_prefix_prompt
from lowmem.shared_prefix import BranchScores, PromptGroup, shared_prefix_backward, shared_prefix_scores
from lowmem.shared_prefix_distributed import gradients_stay_local, reduce_once
from lowmem.shared_prefix_packing import can_pack
from lowmem.shared_prefix_prompt import SharedPrompt

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = [[(23, (7, 12, 1, 5)), (9, (4, 9, 2))], [(14, (6, 3, 8))]]  # by rank: P and R_i of its groups
EQUAL_LENGTHS = [[(9, (4, 9, 2))], [(14, (6, 3, 8))]]
STEPS, MAX_GRAD_NORM = 3, 0.5
ADAM = {"lr": 1e-2, "eps": 1e-3}  # Adam at 1e-8 turns rounding of a near-zero gradient into a full step
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}
HANG_S, LAUNCH_S = 60, 400  # of one collective; of all cases, with DeepSpeed's first compilation

DDP, FSDP2 = {"engine": "ddp"}, {"engine": "fsdp2"}
ZERO2 = {"engine": "zero2"}
CHECKPOINTING, LORA, OFFLOAD = {"checkpointing": True}, {"lora": True}, {"offload": True}
FLOAT32 = {"dtype": "float32"}
TORCH_CASES = {
    "ddp": DDP,
    "ddp checkpointing": DDP | CHECKPOINTING,
    "ddp lora": DDP | LORA,
    "ddp lora checkpointing": DDP | LORA | CHECKPOINTING,
    "ddp in several calls": DDP | {"calls": True},
    "ddp float32": DDP | FLOAT32,
    "fsdp2": FSDP2,
    "fsdp2 checkpointing": FSDP2 | CHECKPOINTING,
    "fsdp2 without resharding": FSDP2 | {"reshard": False},
    "fsdp2 offload checkpointing float32": FSDP2 | OFFLOAD | CHECKPOINTING | FLOAT32,
    "fsdp2 lora": FSDP2 | LORA,
}
DEEPSPEED_CASES = {
    "zero2": ZERO2,
    "zero2 checkpointing": ZERO2 | CHECKPOINTING,
    "zero2 offload": ZERO2 | OFFLOAD | FLOAT32,
    "zero2 offload lora checkpointing": ZERO2 | OFFLOAD | LORA | CHECKPOINTING | FLOAT32,
    "zero2 in several calls": ZERO2 | {"calls": True},
}
# Wrong recipes that raise nothing when the refusals are switched off: negative controls of the comparison.
WRONG_CASES = {
    "not reduced": DDP | {"fault": "not reduced"},
    "every backward synchronises": DDP | {"fault": "every backward synchronises", "equal": True},
    "only the prompt's forward synchronises": DDP | {"fault": "only the prompt synchronises", "equal": True},
}
# name -> (fault, start of the error, way out); the last ones leave the engine in disorder
TORCH_REFUSALS = {
    "SharedPrompt of DDP": ("RuntimeError", "reduce_once(wrapper)"),
    "no wrapper": ("RuntimeError", "Wrap it in DDP"),
    "module inside DDP": ("RuntimeError", "give the wrapper"),
    "communication hook": ("NotImplementedError", "register_comm_hook"),
    "FSDP1": ("NotImplementedError", "fully_shard"),
    "DataParallel": ("NotImplementedError", "or DDP"),
    "DDP around a part": ("NotImplementedError", "Wrap the whole model"),
    "only layers sharded": ("NotImplementedError", "fully_shard(model)"),
    "no groups": ("ValueError", "at least one"),
    "one-token prompt on one rank of FSDP2": ("ValueError", "at least two tokens"),
    "weights changed in FSDP2": ("RuntimeError", "Step the optimizer"),
    "FSDP2 without reduction": ("NotImplementedError", "set_requires_gradient_sync"),
    "last layer not gathered in FSDP2": ("RuntimeError", ""),
}
DEEPSPEED_REFUSALS = {
    "ZeRO stage 1": ("NotImplementedError", "Use ZeRO-2"),
    "gradients in another type": ("NotImplementedError", "Leave `data_types.grad_accum_dtype` out"),
    "ZeRO-3": ("NotImplementedError", "Use ZeRO-2"),
    "accumulation in the engine": ("RuntimeError", "`gradient_accumulation_steps`"),
    "SharedPrompt of the engine": ("RuntimeError", "reduce_once(wrapper)"),
    "engine not stepped": ("RuntimeError", "engine.step()"),
}


# --- one rank, as a script -------------------------------------------------------------------------------------------


def build(case: dict) -> torch.nn.Module:
    dtype = getattr(torch, case.get("dtype", "float64"))
    model = make_model("qwen3", dtype)
    if case.get("checkpointing"):
        model.activation_checkpointing_enable()
    if case.get("lora"):
        torch.manual_seed(0)
        config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4, init_lora_weights=False)
        model = get_peft_model(model, config).to(dtype)
    return model


def groups_by_rank(case: dict) -> list[list[PromptGroup]]:
    lengths = EQUAL_LENGTHS if case.get("equal") else LENGTHS
    groups = make_groups([length for of_rank in lengths for length in of_rank])
    return [groups[: len(lengths[0])], groups[len(lengths[0]) :]]


def trainable(model) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double().clone()


def named(step: int, kind: str, tensors) -> dict[str, torch.Tensor]:
    return {f"{step}.{kind}.{number}": whole(tensor) for number, tensor in enumerate(tensors)}


def reference_steps(case: dict) -> dict[str, torch.Tensor]:
    """One process, all groups, stock forwards of one row at a time."""
    model, groups, result = build(case), sum(groups_by_rank(case), []), {}
    loss_fn = Losses(model, groups).grpo
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters, **ADAM)
    for step in range(STEPS):
        loss_fn(plain_scores(model, groups)).backward()
        result |= named(step, "grad", [parameter.grad for parameter in parameters])
        result |= named(step, "norm", [torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)])
        optimizer.step()
        optimizer.zero_grad()
        result |= named(step, "param", parameters)
    return result


def rank_loss(case: dict):
    """This rank's groups, and the loss of its rows times the number of ranks, because engines average."""
    by_rank, rank = groups_by_rank(case), dist.get_rank()
    losses = Losses(build(case), sum(by_rank, []))
    rows_before = sum(len(group.completions) for groups in by_rank[:rank] for group in groups)

    def loss_fn(scores: BranchScores, rows_before=rows_before) -> torch.Tensor:
        rows = BranchScores(scores.rows + rows_before, scores.logps, scores.entropies, scores.mask)
        return losses.grpo(rows) * dist.get_world_size()

    return by_rank[rank], loss_fn


def wrap(case: dict, model):
    if case["engine"] == "ddp":
        return DistributedDataParallel(model)
    options = {"mesh": init_device_mesh("cpu", (2,)), "reshard_after_forward": case.get("reshard", True)}
    if case.get("offload"):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    layers = model.base_model.model.model.layers if case.get("lora") else model.model.layers
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def make_engine(case: dict, model):
    import deepspeed

    zero = {"stage": case.get("stage", 2), "overlap_comm": False, "reduce_bucket_size": 3000}  # several buckets
    if case.get("offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case.get("gradient_accumulation_steps", 1),
        "gradient_clipping": MAX_GRAD_NORM,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "data_types": {"grad_accum_dtype": case.get("grad_accum_dtype")},
    }
    optimizer = torch.optim.AdamW(trainable(model), **ADAM)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def steps_of_rank(case: dict) -> dict[str, torch.Tensor]:
    """What `reference_steps` returns, from this rank of the case's engine; and that scoring equals stock forwards."""
    groups, loss_fn = rank_loss(case)
    is_engine = case["engine"] == "zero2"
    model = make_engine(case, build(case)) if is_engine else wrap(case, build(case))
    assert all(isinstance(parameter, DTensor) == (case["engine"] == "fsdp2") for parameter in model.parameters())
    assert can_pack(model.module if is_engine else model) == can_pack(
        build(case)
    )  # FSDP2 puts classes over the model's
    optimizer = None if is_engine else torch.optim.AdamW(trainable(model), **ADAM)
    result = {}
    with torch.no_grad():
        plain = plain_scores(build(case), groups).logps
        shared = shared_prefix_scores(model, groups, max_branches=2).logps
    torch.testing.assert_close(shared, plain, rtol=0, atol=TOLERANCE[case.get("dtype", "float64")])
    for step in range(STEPS):
        train(case, model, groups, loss_fn)
        parameters = trainable(model)
        if is_engine:
            from deepspeed.utils import safe_get_full_grad

            result |= named(step, "grad", [safe_get_full_grad(parameter) for parameter in parameters])
            model.step()
            result |= named(step, "norm", [torch.as_tensor(model.get_global_grad_norm())])
        else:
            result |= named(step, "grad", [parameter.grad for parameter in parameters])
            result |= named(step, "norm", [torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)])
            optimizer.step()
            optimizer.zero_grad()
        result |= named(step, "param", parameters)
    return result


def train(case, model, groups, loss_fn) -> None:
    """The gradients of one step; wrong ones if the case has a fault."""
    if case.get("fault") == "not reduced":
        with gradients_stay_local(model.module):
            shared_prefix_backward(model.module, groups, loss_fn, max_branches=2)
    elif case.get("fault"):
        first_row = 0
        for group in groups:
            with gradients_stay_local(model), SharedPrompt(model, group.prompt_ids) as prompt:
                if case["fault"] == "only the prompt synchronises":
                    model.require_backward_grad_sync = False  # as `no_sync` does
                for number, ids in enumerate(group.completions):
                    logps, _, mask = prompt.score([ids])
                    loss_fn(BranchScores(torch.tensor([first_row + number]), logps, None, mask)).backward()
            model.require_backward_grad_sync = True
            first_row += len(group.completions)
    elif case.get("calls"):
        first_row = 0
        with reduce_once(model) as module:
            for group in groups:

                def group_loss(scores, first_row=first_row):
                    return loss_fn(BranchScores(scores.rows + first_row, scores.logps, None, scores.mask))

                shared_prefix_backward(module, [group], group_loss, max_branches=2)
                first_row += len(group.completions)
    else:
        shared_prefix_backward(model, groups, loss_fn, max_branches=2)


def refused(name: str) -> None:
    """Does what must raise."""
    case = {"engine": "ddp", "dtype": "float32", "equal": True}
    groups, loss_fn = rank_loss(case)
    model = build(case)
    if name == "SharedPrompt of DDP":
        model = wrap(DDP, model)
        with SharedPrompt(model, groups[0].prompt_ids):
            pass
    elif name == "no wrapper":
        shared_prefix_backward(model, groups, loss_fn)
    elif name == "module inside DDP":
        shared_prefix_backward(wrap(DDP, model).module, groups, loss_fn)
    elif name == "communication hook":
        model = wrap(DDP, model)
        model.register_comm_hook(None, lambda state, bucket: bucket.buffer())
        shared_prefix_backward(model, groups, loss_fn)
    elif name == "FSDP1":
        shared_prefix_backward(FullyShardedDataParallel(model, device_id="cpu"), groups, loss_fn)
    elif name == "DataParallel":
        shared_prefix_backward(DataParallel(model), groups, loss_fn)
    elif name == "DDP around a part":
        model.model.layers[0] = wrap(DDP, model.model.layers[0])
        shared_prefix_backward(model, groups, loss_fn)
    elif name == "only layers sharded":
        for layer in model.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        shared_prefix_backward(model, groups, loss_fn)
    elif name == "no groups":
        shared_prefix_backward(wrap(DDP, model), [], loss_fn)
    elif name == "one-token prompt on one rank of FSDP2":
        one_token = PromptGroup(groups[0].prompt_ids[-1:], groups[0].completions)
        shared_prefix_backward(wrap(FSDP2, model), [one_token] if dist.get_rank() else groups, loss_fn)
    elif name == "weights changed in FSDP2":
        model = wrap(FSDP2, model)
        weight = model.get_parameter("model.norm.weight")
        with SharedPrompt(model, groups[0].prompt_ids) as prompt:
            with torch.no_grad():
                weight.mul_(1.1)
            prompt.score(groups[0].completions)
    elif name == "FSDP2 without reduction":
        model = wrap(FSDP2, model)
        model.set_requires_gradient_sync(False)
        shared_prefix_backward(model, groups, loss_fn)
    elif name == "last layer not gathered in FSDP2":
        shared_prefix_prompt.is_sharded = lambda model: False
        shared_prefix_backward(wrap(FSDP2, model), groups, loss_fn, self_check=False)
    elif name in ("ZeRO stage 1", "ZeRO-3"):
        engine = make_engine({"stage": 1 if name == "ZeRO stage 1" else 3}, model)
        shared_prefix_backward(engine, groups, loss_fn)
    elif name == "gradients in another type":
        shared_prefix_backward(make_engine({"grad_accum_dtype": "bf16"}, model), groups, loss_fn)
    elif name == "accumulation in the engine":
        shared_prefix_backward(make_engine({"gradient_accumulation_steps": 2}, model), groups, loss_fn)
    elif name == "SharedPrompt of the engine":
        with SharedPrompt(make_engine({}, model), groups[0].prompt_ids):
            pass
    elif name == "engine not stepped":
        engine = make_engine({}, model)
        shared_prefix_backward(engine, groups, loss_fn)
        shared_prefix_backward(engine, groups, loss_fn)
    else:
        raise ValueError(name)


def run_rank(out: str, engines: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=HANG_S))
    cases = DEEPSPEED_CASES if engines == "deepspeed" else TORCH_CASES | WRONG_CASES
    results, messages = {}, {}
    for name, case in cases.items():
        if case.get("dtype", "float64") == "float64":
            with Float64Everywhere():
                steps = steps_of_rank(case)
        else:
            steps = steps_of_rank(case)
        results |= {f"{name}/{key}": value.contiguous() for key, value in steps.items()}
    for name in DEEPSPEED_REFUSALS if engines == "deepspeed" else TORCH_REFUSALS:
        try:
            refused(name)
            messages[name] = None
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    save_file(results, f"{out}{dist.get_rank()}.safetensors")
    Path(f"{out}{dist.get_rank()}.json").write_text(json.dumps(messages))
    os._exit(0)  # the last refusals leave collectives behind, for which a tidy exit may wait


# --- tests -----------------------------------------------------------------------------------------------------------


def launch_ranks(out: Path, engines: str):
    """`(tensors, messages)` of both ranks. A hang is a failure."""
    launch("tests/test_shared_prefix_distributed.py", f"{out}/", engines, processes=2, timeout_s=LAUNCH_S)
    tensors = [load_file(f"{out}/{rank}.safetensors") for rank in range(2)]
    return tensors, [json.loads(Path(f"{out}/{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def torch_ranks(tmp_path_factory):
    return launch_ranks(tmp_path_factory.mktemp("torch-ranks"), "torch")


@pytest.fixture(scope="module")
def deepspeed_ranks(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed (requirements.txt)")
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles its CPU communication on first use and finds no g++")
    return launch_ranks(tmp_path_factory.mktemp("deepspeed-ranks"), "deepspeed")


def errors(name: str, case: dict, tensors: list[dict]) -> list[float]:
    """By rank, the largest difference from one process: absolute up to 1, relative above."""
    if case.get("dtype", "float64") == "float64":
        with Float64Everywhere():
            reference = reference_steps(case)
    else:
        reference = reference_steps(case)
    by_rank = []
    for of_rank in tensors:
        ours = {key.partition("/")[2]: tensor for key, tensor in of_rank.items() if key.startswith(f"{name}/")}
        assert ours.keys() == reference.keys()
        by_rank.append(max(((ours[k] - r).abs() / r.abs().clamp(min=1)).max().item() for k, r in reference.items()))
    print(f"{name}: {by_rank[0]:.1e} {by_rank[1]:.1e}")
    return by_rank


@pytest.mark.parametrize("name", TORCH_CASES)
def test_ddp_and_fsdp2_match_one_process(torch_ranks, name):
    case = TORCH_CASES[name]
    assert max(errors(name, case, torch_ranks[0])) <= TOLERANCE[case.get("dtype", "float64")]


@pytest.mark.parametrize("name", DEEPSPEED_CASES)
def test_deepspeed_zero2_matches_one_process(deepspeed_ranks, name):
    case = DEEPSPEED_CASES[name]
    assert max(errors(name, case, deepspeed_ranks[0])) <= TOLERANCE[case.get("dtype", "float64")]


@pytest.mark.parametrize("name", WRONG_CASES)
def test_a_wrong_recipe_is_seen(torch_ranks, name):
    """Negative control: without the refusals these raise nothing, but the ranks' gradient norms differ, or both do."""
    assert min(errors(name, WRONG_CASES[name], torch_ranks[0])) > 1e-3


def test_gradient_norms_of_ranks_agree(torch_ranks, deepspeed_ranks):
    for name in TORCH_CASES | DEEPSPEED_CASES:
        tensors = (torch_ranks if name in TORCH_CASES else deepspeed_ranks)[0]
        for step in range(STEPS):
            assert torch.equal(tensors[0][f"{name}/{step}.norm.0"], tensors[1][f"{name}/{step}.norm.0"]), name


@pytest.mark.parametrize("name", TORCH_REFUSALS)
def test_what_would_be_silently_wrong_is_refused(torch_ranks, name):
    assert_refused(torch_ranks[1], name, *TORCH_REFUSALS[name])


@pytest.mark.parametrize("name", DEEPSPEED_REFUSALS)
def test_what_deepspeed_would_lose_is_refused(deepspeed_ranks, name):
    assert_refused(deepspeed_ranks[1], name, *DEEPSPEED_REFUSALS[name])


def assert_refused(messages: list[dict], name: str, error: str, way_out: str) -> None:
    for of_rank in messages:
        assert of_rank[name] is not None, "it trains"
        assert of_rank[name].startswith(f"{error}: ") and way_out in of_rank[name], of_rank[name]


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
