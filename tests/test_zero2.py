"""`lowmem.zero2` inside RLOOTrainer: bytes 1/N on every rank, weights of DDP, accumulation, resume, export, traps."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchrun import failing_probe, largest_difference, probe

from lowmem.zero2 import NotSharded, Zero2Check, check_compile_locks, check_zero2, zero2_config

# Two optimizer steps per generation, so that the ratio is not one; 2 x 4 rows in all, whatever the processes
COMMON = {"num_iterations": 2, "max_steps": 4}
SLOW = pytest.mark.slow


def rows(processes: int, accumulate: int = 1) -> dict:
    return {"per_device_train_batch_size": 8 // processes // accumulate, "gradient_accumulation_steps": accumulate}


def zero2(**settings) -> dict:
    return {"deepspeed": zero2_config(bucket_elements=100_000), "_hook": "test_zero2:watch"} | settings


def watch(trainer, result) -> None:
    """Called by memory_probe in every rank: what the engine holds, between micro-batches and after steps."""
    from transformers import TrainerCallback

    from lowmem.zero2 import zero2_bytes

    check = Zero2Check(trainer.accelerator.num_processes)

    class Bytes(TrainerCallback):
        def on_substep_end(self, args, state, control, optimizer=None, **kwargs):
            result["between"] = zero2_bytes(optimizer)
            result["bytes_in_part"] = bytes_in_part(optimizer)

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            result["bytes"] = check.bytes

        def on_train_end(self, args, state, control, **kwargs):
            export = Path(args.output_dir) / "export"
            trainer.save_model(str(export))
            result["export"] = str(export)

    trainer.add_callback(check)
    trainer.add_callback(Bytes())


def bytes_in_part(optimizer) -> list[int]:
    """Bytes of the parameters that lie in this process's part, those on its borders whole, and of the largest."""
    from lowmem.zero2 import zero_optimizer

    zero, found, largest = zero_optimizer(optimizer), 0, 0
    for parameters, part in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups):
        first = part.numel() * torch.distributed.get_rank()
        end = 0
        for parameter in parameters:
            start, end = end, end + parameter.numel()
            found += 4 * parameter.numel() * (start < first + part.numel() and end > first)
            largest = max(largest, 4 * parameter.numel())
    return [found, largest]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(processes, **settings)` -> results of every rank; every distinct call runs once."""
    folder, cache = tmp_path_factory.mktemp("zero2"), {}

    def run(processes: int, **settings):
        key = json.dumps([processes, settings])
        if key not in cache:
            cache[key] = probe(folder / str(len(cache)), COMMON | settings, processes, timeout_s=400)
        return cache[key]

    return run


def assert_same_training(ours, reference, tolerance=1e-5, metrics=("grad_norm", "reward", "entropy")):
    """Gradient norms before the weights: Adam and clipping hide gradients that are wrong by a factor."""
    for name in metrics:
        found, expected = ([log[name] for log in run["log"] if name in log] for run in (ours, reference))
        assert len(found) == len(expected) >= (4 if name == "grad_norm" else 2)  # one reward per generation
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance)
    assert largest_difference(ours["weights"], reference["weights"]) < tolerance


def assert_sharded(results):
    full = results[0]["bytes"]["full_gradient_bytes"]
    for result in results:
        held, part = result["bytes"], full // len(results)
        assert (held["gradient_bytes"], held["optimizer_bytes"], held["master_bytes"]) == (part, 2 * part, part)
        assert held["device_gradient_bytes"] == 0 and result["world_size"] == len(results)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=SLOW), 2, pytest.param(4, marks=SLOW)])
def test_bytes_are_one_nth_and_weights_are_those_of_ddp(runs, processes):
    results = runs(processes, **zero2(), **rows(processes))
    assert_sharded(results)
    reference = runs(processes, **rows(processes))[0]
    for result in results:
        assert_same_training(result, reference)
    log = reference["log"]
    assert max(abs(entry["grad_norm"] - log[0]["grad_norm"]) for entry in log[:-1]) > 0.01, "nothing is learned"


def test_exported_weights_are_a_plain_checkpoint(runs):
    from transformers import AutoModelForCausalLM

    result = runs(2, **zero2(), **rows(2))[0]
    exported = AutoModelForCausalLM.from_pretrained(result["export"], dtype=torch.float32)
    weights = {name: parameter.detach() for name, parameter in exported.named_parameters()}
    assert exported.config.tie_word_embeddings and "lm_head.weight" not in weights
    assert largest_difference(weights, result["weights"]) == 0


@SLOW
def test_untied_embeddings_match_ddp(runs):
    untied = {"_tied": False}
    assert_same_training(runs(2, **zero2(**untied), **rows(2))[1], runs(2, **untied, **rows(2))[0])


@SLOW
@pytest.mark.parametrize("processes", [2, 4])
def test_accumulation_does_not_bring_whole_gradients_back(runs, processes):
    """Between two micro-batches the device holds no gradient, and the host those of the parameters of this part."""
    wide = {"_shape": {"intermediate_size": 256}}  # no parameter is as large as a part
    settings = {**rows(processes, accumulate=2), "gradient_checkpointing": True, "selective_checkpointing": True}
    results = runs(processes, **zero2(**wide), **settings)
    assert_sharded(results)
    reference = runs(1, **rows(1, accumulate=2), **wide)[0]
    full = results[0]["bytes"]["full_gradient_bytes"]
    for result in results:
        assert_same_training(result, reference, metrics=("grad_norm", "reward"))  # entropy: other micro-batches
        in_part, largest = result["bytes_in_part"]
        assert result["between"]["device_gradient_bytes"] == 0
        assert result["between"]["accumulated_bytes"] == in_part < full / processes + 2 * largest
    assert sum(result["between"]["accumulated_bytes"] for result in results) < 1.6 * full


@SLOW
def test_accumulation_matches_ddp(runs):
    settings = rows(2, accumulate=2)
    reference = runs(2, **settings)
    for ours, theirs in zip(runs(2, **zero2(), **settings), reference):
        assert_same_training(ours, theirs)


@SLOW
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(runs, tmp_path):
    """Weights, AdamW's moments in parts, schedule: all that two more steps after a checkpoint depend on."""
    from transformers import AutoModelForCausalLM

    saving = {"output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 2}
    whole = runs(2, **zero2(**saving), **rows(2))
    checkpoint = tmp_path / "out/checkpoint-2"
    resumed = runs(2, **zero2(**saving, _resume=str(checkpoint)), **rows(2))
    assert [log["grad_norm"] for log in resumed[0]["log"] if "grad_norm" in log] == pytest.approx(
        [log["grad_norm"] for log in whole[0]["log"] if "grad_norm" in log][2:], rel=1e-5
    )
    for ours, reference in zip(resumed, whole):
        assert largest_difference(ours["weights"], reference["weights"]) < 1e-5
    saved = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)  # safetensors beside the parts
    halfway = {name: parameter.detach() for name, parameter in saved.named_parameters()}
    assert largest_difference(halfway, whole[0]["weights"]) > 1e-4, "nothing was trained after resuming"
    assert largest_difference(whole[0]["weights"], runs(2, **rows(2))[0]["weights"]) < 1e-5


@SLOW
def test_lora_matches_ddp(runs):
    lora = {"_lora": 4, "learning_rate": 1e-2}
    results = runs(2, **zero2(**lora), **rows(2))
    assert_same_training(results[0], runs(2, **lora, **rows(2))[0])
    assert results[0]["bytes"]["gradient_bytes"] < 1.01 * results[0]["bytes"]["full_gradient_bytes"] / 2


@SLOW
def test_gradients_that_are_too_small_are_seen(runs):
    """Negative control: what a loss that is divided by the processes once too often would give."""
    wrong = runs(2, **zero2(_fault="half the loss"), **rows(2))[0]
    with pytest.raises(AssertionError):
        assert_same_training(wrong, runs(2, **rows(2))[0])


def ask_for_two(trainer, result) -> None:
    """Hook of memory_probe."""
    trainer.add_callback(Zero2Check(2))


TWO = {"per_device_train_batch_size": 4}
STAGE_ONE = zero2_config() | {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    "processes, settings, reason",
    [
        pytest.param(2, {"per_device_train_batch_size": 4}, "without DeepSpeed's inside", id="DDP"),
        pytest.param(
            2, {"deepspeed": STAGE_ONE, "per_device_train_batch_size": 4}, "stage 1", id="stage 1", marks=SLOW
        ),
        pytest.param(1, {"deepspeed": zero2_config()}, "2 processes were asked for and 1 run", id="world", marks=SLOW),
    ],
)
def test_a_training_that_is_not_sharded_stops_at_its_start(tmp_path, processes, settings, reason):
    """Each of these would train to its end without an error."""
    said = failing_probe(tmp_path, COMMON | settings | {"_hook": "test_zero2:ask_for_two"}, processes)
    assert "NotSharded" in said and reason in said, said[-2000:]


def in_8_bits(parameters):
    """As bitsandbytes' AdamW says it of itself."""
    optimizer = torch.optim.AdamW(parameters)
    optimizer.args = SimpleNamespace(optim_bits=8)
    return optimizer


class Fake:
    """As much of DeepSpeed's optimizer as the check looks at."""

    def __init__(
        self, part: int, whole: int = 64, partition_gradients: bool = True, group=None, kind=torch.optim.AdamW
    ):
        self.single_partition_of_fp32_groups = [torch.zeros(part)]
        self.bit16_groups = [[torch.zeros(whole)]]
        self.real_dp_process_group = [group]
        self.partition_gradients = partition_gradients
        self.nccl_start_alignment_factor = 2
        self.optimizer = kind(self.single_partition_of_fp32_groups)


@pytest.fixture
def world_of_two(monkeypatch):
    monkeypatch.setattr("lowmem.zero2.dist.get_world_size", lambda group=None: 1 if group == "part" else 2)


def test_a_sharded_optimizer_passes(world_of_two):
    assert check_zero2(Fake(32), 2)["master_bytes"] == 32 * 4


@pytest.mark.parametrize(
    "optimizer, asked, reason",
    [
        (torch.optim.AdamW([torch.zeros(1)]), 2, "AdamW without DeepSpeed's inside"),
        (Fake(32), 4, "4 processes were asked for and 2 run.*torchrun"),
        (Fake(32, partition_gradients=False), 2, "stage 1"),
        (Fake(32, group="part"), 2, "1 of 2 processes.*drift apart"),
        (Fake(64), 2, "64 of 64 elements"),
        (Fake(32, kind=torch.optim.Adafactor), 2, "Adafactor would run on a flat part"),
        (Fake(32, kind=in_8_bits), 2, "AdamW with blocks of 8 bits would run on a flat part"),
    ],
)
def test_what_is_not_sharded_is_an_error(world_of_two, optimizer, asked, reason):
    with pytest.raises(NotSharded, match=reason):
        check_zero2(optimizer, asked)


@pytest.mark.parametrize("folder", ["deepspeed_shm_comm", "py311_cpu/deepspeed_shm_comm"])
def test_a_lock_that_a_killed_compilation_left_is_an_error(tmp_path, monkeypatch, folder):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / folder / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    check_compile_locks()  # a peer compiles
    os.utime(lock, (0, 0))
    with pytest.raises(RuntimeError, match="Delete that file"):
        check_compile_locks()
