"""The memory strategies inside RLOOTrainer (and GRPOTrainer) of the v1.16.0 series, against runs without them.

Every run is `memory_probe.py` in processes of its own. Compared: gradient norms, logged metrics and all weights after
four optimizer steps, two per generation. Completions are the same whatever the number of processes.
"""

import json
import sys

import pytest
import torch
from torchrun import ROOT, failing_probe, largest_difference, launch, probe

from lowmem.zero2 import zero2_config

SLOW = pytest.mark.slow
COMMON = {"num_iterations": 2, "max_steps": 4}
METRICS = ("grad_norm", "reward", "reward_std", "entropy", "num_tokens", "kl", "completions/mean_length")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(processes, **settings)` -> results of every rank; every distinct call runs once."""
    folder, cache = tmp_path_factory.mktemp("memory"), {}

    def run(processes: int = 1, **settings):
        key = json.dumps([processes, settings])
        if key not in cache:
            cache[key] = probe(folder / str(len(cache)), COMMON | settings, processes, timeout_s=300)
        return cache[key]

    return run


def assert_same_training(ours, reference, tolerance=1e-5, metrics=METRICS):
    """Gradient norms before the weights: Adam and clipping hide gradients that are wrong by a factor."""
    for name in metrics:
        found, expected = ([log[name] for log in run["log"] if name in log] for run in (ours, reference))
        assert len(found) == len(expected), name
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance)
    norms = [log["grad_norm"] for log in reference["log"] if "grad_norm" in log]
    assert len(norms) == 4 and min(norms) > 0.01 and max(norms) - min(norms) > 0.01, "nothing is learned"
    assert largest_difference(ours["weights"], reference["weights"]) < tolerance


def assert_identical(ours, reference):
    assert ours["weights"].keys() == reference["weights"].keys()
    assert all(torch.equal(ours["weights"][name], weight) for name, weight in reference["weights"].items())


# --- recomputation and offloading ------------------------------------------------------------------------------------


def count_ops(trainer, result) -> None:
    """Hook of memory_probe: attention operators in the backward passes of the run."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_recompute import CountOps

    backward, result["attention_in_backward"] = trainer.accelerator.backward, 0

    def counted(*args, **kwargs):
        with CountOps() as ops:
            backward(*args, **kwargs)
        result["attention_in_backward"] += ops.counts["attention"]

    trainer.accelerator.backward = counted


RECOMPUTED = {"gradient_checkpointing": True, "_hook": "test_memory_rloo:count_ops"}


@pytest.mark.parametrize("trainer", ["rloo", pytest.param("grpo", marks=SLOW)])
@pytest.mark.parametrize(
    "settings, recomputed_layers",
    [
        pytest.param({}, 4, marks=SLOW),
        pytest.param({"gradient_checkpointing_ratio": 0.5}, 2, marks=SLOW),
        ({"gradient_checkpointing_ratio": 0.75, "selective_checkpointing": True}, 0),
    ],
)
def test_recomputation_changes_nothing_but_what_is_recomputed(runs, trainer, settings, recomputed_layers):
    """The trainer switches checkpointing off for scoring and on again, so what counts is the second step."""
    ours = runs(_trainer=trainer, **RECOMPUTED, **settings)[0]
    assert_identical(ours, runs(_trainer=trainer)[0])
    assert ours["attention_in_backward"] == 4 * recomputed_layers  # per optimizer step


def offload_to_host(trainer, result) -> None:
    """Hook of memory_probe: TRL's own offloading, with the CPU taken for an accelerator, counted."""
    import contextlib
    from unittest import mock

    from trl.models.activation_offloading import OffloadActivations

    with mock.patch("torch.accelerator.current_accelerator", lambda: torch.device("cpu")):
        manager = OffloadActivations(use_pin_memory=False, use_streams=False)
    manager.update_model_params(trainer.model)
    pack, unpack = manager.pack_hook, manager.unpack_hook
    result |= {"offloaded": 0, "offloaded_bytes": 0, "restored_bytes": 0}

    def moved_bytes(key):
        held, is_moved = manager.tracker[key][:2]
        return held.numel() * held.element_size() if is_moved else 0

    def counted_pack(tensor):
        key = pack(tensor)
        if size := moved_bytes(key):
            assert manager.tracker[key][0].data_ptr() != tensor.data_ptr(), "the tensor itself is held, not a copy"
            result["offloaded"] += 1
            result["offloaded_bytes"] += size
        return key

    def counted_unpack(key):
        result["restored_bytes"] += moved_bytes(key)
        return unpack(key)

    manager.pack_hook, manager.unpack_hook = counted_pack, counted_unpack
    assert isinstance(trainer.maybe_activation_offload_context, contextlib.nullcontext)
    trainer.maybe_activation_offload_context = manager


@pytest.mark.parametrize("trainer", ["rloo", pytest.param("grpo", marks=SLOW)])
def test_offloaded_activations_change_nothing(runs, trainer):
    """The context that `activation_offloading=True` makes on an accelerator is entered by the training step."""
    ours = runs(_trainer=trainer, _hook="test_memory_rloo:offload_to_host")[0]
    assert_identical(ours, runs(_trainer=trainer)[0])
    assert ours["offloaded"] > 4 * 10 * 4  # in 4 steps, from 4 layers
    assert ours["offloaded_bytes"] == ours["restored_bytes"] > 4 * 4 * 8 * 13 * 64 * 4  # more than one MLP activation


# --- out of memory ---------------------------------------------------------------------------------------------------


def fail_above_two_rows(trainer, result) -> None:
    """Hook of memory_probe: a backward over more than two rows is out of memory after it has left its gradients."""
    backward = trainer.accelerator.backward

    def failing(loss, **kwargs):
        rows = sys._getframe(1).f_locals.get("logps")
        backward(loss, **kwargs)
        if rows is not None and len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    trainer.accelerator.backward = failing
    trainer.add_callback(_events(trainer, result))


def _events(trainer, result):
    from transformers import TrainerCallback

    class Events(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            result["events"] = trainer._oom_recovery.events

    return Events()


ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("settings", [ACCUMULATED, pytest.param(ACCUMULATED | {"_lora": 4}, marks=SLOW)], ids=str)
def test_split_training_steps_have_the_gradients_of_the_whole(runs, settings):
    ours = runs(oom_recovery=True, _hook="test_memory_rloo:fail_above_two_rows", **settings)[0]
    assert_same_training(ours, runs(**settings)[0])
    assert [(event["rows"], event["retry_rows"]) for event in ours["events"]] == [(4, 2)]
    assert sum(log.get("oom_events", 0) for log in ours["log"]) == 0.5  # the mean over two training steps


@SLOW
@pytest.mark.parametrize("settings", [{}, {"shared_prefix": True}], ids=str)
def test_out_of_memory_recovery_without_an_event_changes_nothing(runs, settings):
    tolerance = {} if not settings else {"tolerance": 1e-5}
    ours = runs(oom_recovery=True, **settings, **ACCUMULATED)[0]
    assert_same_training(ours, runs(**settings, **ACCUMULATED)[0], **tolerance)
    assert all(log["oom_events"] == 0 for log in ours["log"] if "grad_norm" in log)


@SLOW
def test_out_of_memory_recovery_in_two_processes_matches_ddp(runs):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    ours = runs(2, oom_recovery=True, **settings)
    reference = runs(2, **settings)
    for rank in range(2):
        assert_same_training(ours[rank], reference[rank])


def limit_memory(trainer, result) -> None:
    """Hook of memory_probe: a limit that the whole micro-batch exceeds, set after one step of a single row."""
    import resource

    from transformers import TrainerCallback

    class Limit(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                with open("/proc/self/status") as status:
                    used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
                resource.setrlimit(resource.RLIMIT_DATA, (used + 150 * 2**20, resource.RLIM_INFINITY))

        def on_train_end(self, args, state, control, **kwargs):
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    trainer.add_callback(Limit())
    if trainer.args.oom_recovery:
        trainer.add_callback(_events(trainer, result))


LARGE = {"_shape": {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 4}, "_prompt_tokens": 512}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@SLOW
def test_a_real_out_of_memory_of_a_training_step_is_survived(runs, tmp_path):
    settings = COMMON | LARGE | {"_hook": "test_memory_rloo:limit_memory", "beta": 0.0, "num_iterations": 4}
    script = [str(tmp_path / "plain-"), json.dumps(settings)]
    assert "can't allocate memory" in launch("tests/memory_probe.py", *script, ok=False, env=MALLOC)
    ours = probe(tmp_path / "recovered", settings | {"oom_recovery": True}, env=MALLOC)[0]
    assert ours["events"] and "can't allocate memory" in ours["events"][0]["error"]
    reference = runs(**LARGE, beta=0.0, num_iterations=4)[0]
    assert largest_difference(ours["weights"], reference["weights"]) < 1e-5


# --- sequence parallelism --------------------------------------------------------------------------------------------

SPLIT = {"sequence_parallel_size": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, marks=SLOW),
        pytest.param({"_lora": 4, "learning_rate": 3e-3}, marks=SLOW),
        pytest.param({"gradient_checkpointing": True}, marks=SLOW),
        pytest.param({"gradient_checkpointing": True, "selective_checkpointing": True}, marks=SLOW),
        pytest.param({"mask_truncated_completions": True, "normalize_advantages": True}, marks=SLOW),
        pytest.param({"num_generations": 8, "shuffle_groups": True}, marks=SLOW),  # a group on both processes
        pytest.param({"beta": 0.0, "_optimizer": "sgd", "max_grad_norm": 0.0}, marks=SLOW),
        pytest.param({"_prompt_tokens": 1, "pad_to_multiple_of": 8}, marks=SLOW),
    ],
    ids=str,
)
def test_split_sequences_train_as_one_process(runs, settings):
    one_process = runs(1, **settings)[0]
    results = runs(2, **SPLIT, **settings)
    # With accumulation, entropy is a mean over other micro-batches
    metrics = [m for m in METRICS if m in one_process["log"][0]]
    if "gradient_accumulation_steps" in settings:
        metrics.remove("entropy")
    for result in results:
        assert result["world_size"] == 2
        assert_same_training(result, one_process, metrics=metrics)
    assert sum(result["rows_scored"] for result in results) == one_process["rows_scored"], "rows were made twice"


@SLOW
def test_split_sequences_in_mixed_precision_are_not_refused(runs):
    """TRL's default: float32 weights under autocast, whose rounding the check has to know."""
    one_process, (result, _) = runs(1, bf16=True)[0], runs(2, bf16=True, **SPLIT)
    norms = [[log["grad_norm"] for log in run["log"] if "grad_norm" in log] for run in (result, one_process)]
    torch.testing.assert_close(torch.tensor(norms[0]), torch.tensor(norms[1]), rtol=0.1, atol=0.01)


@SLOW
@pytest.mark.parametrize(
    "settings",
    [
        SPLIT | {"per_device_train_batch_size": 4},
        SPLIT
        | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_generations": 8},  # straddles
        {"sequence_parallel_size": 4, "per_device_train_batch_size": 8},
    ],
    ids=str,
)
def test_split_sequences_train_as_one_process_in_four(runs, settings):
    accumulate = settings.get("gradient_accumulation_steps", 1)
    rows = {"per_device_train_batch_size": 8 // accumulate, "gradient_accumulation_steps": accumulate}
    rows |= {"num_generations": settings.get("num_generations", 4)}
    one_process = runs(1, **rows)[0]
    for result in runs(4, **settings):
        assert_same_training(result, one_process, metrics=[m for m in METRICS if m != "entropy" or accumulate == 1])


@SLOW
@pytest.mark.parametrize("processes, rows", [(2, 8), (4, 4)])
def test_split_sequences_and_sharded_gradients_train_as_one_process(runs, processes, rows):
    """Data parallel 2 x sequence 2 in four processes."""
    settings = {"deepspeed": zero2_config(bucket_elements=100_000), "_hook": "test_zero2:watch"}
    results = runs(processes, **SPLIT, **settings, per_device_train_batch_size=rows)
    for result in results:
        assert_same_training(result, runs(1)[0])
        full = result["bytes"]["full_gradient_bytes"]
        assert result["bytes"]["gradient_bytes"] == full // processes
        assert result["bytes"]["optimizer_bytes"] == 2 * full // processes


@SLOW
def test_a_split_run_resumes(runs, tmp_path):
    saving = {"output_dir": str(tmp_path / "out"), "save_strategy": "steps", "save_steps": 2}
    whole = runs(2, **SPLIT, **saving)
    checkpoint = tmp_path / "out/checkpoint-2"
    for ours, reference in zip(runs(2, **SPLIT, **saving, _resume=str(checkpoint)), whole):
        assert largest_difference(ours["weights"], reference["weights"]) < 1e-5
    assert largest_difference(whole[0]["weights"], runs(1)[0]["weights"]) < 1e-5
    config = (checkpoint / "config.json").read_text()
    assert "lowmem" not in config, "the checkpoint needs this library to be loaded"


@SLOW
def test_real_sampling_and_evaluation_run_split(runs):
    settings = {"_sampled": True, "_evaluate": True, "per_device_eval_batch_size": 4, "max_steps": 2}
    first, second = runs(2, **SPLIT, **settings)
    assert largest_difference(first["weights"], second["weights"]) == 0
    assert any("eval_reward" in log for log in first["log"])


@SLOW
def test_a_fourteen_thousand_token_sequence_trains_split(runs):
    """One layer, one optimizer step: no tensor is quadratic in the length."""
    settings = {"_prompt_tokens": 14_000, "_completion_tokens": 200, "_prompts": 1, "num_generations": 2, "beta": 0.1}
    settings |= {
        "_shape": {"num_hidden_layers": 1},
        "max_steps": 1,
        "num_iterations": 1,
        "gradient_checkpointing": True,
    }
    results = runs(2, **SPLIT, **settings, per_device_train_batch_size=2, _live=True)
    assert results[0]["log"][0]["num_tokens"] > 2 * 7_000
    quadratic = 14_000 * 14_000
    for result in results:  # ragged rows: scoring, the reference's too, where nobody splits them, included
        assert max(result["live_peak_bytes_by_phase"].values()) < quadratic


@SLOW
@pytest.mark.parametrize("fault", ["gradient of the own part only", "other rows on the peers"])
def test_a_fault_of_split_sequences_is_seen(runs, tmp_path, fault):
    """Negative control."""
    if fault == "other rows on the peers":
        output = failing_probe(tmp_path, COMMON | SPLIT | {"_fault": fault}, processes=2)
        assert "sequence peers hold different completions" in output
    else:
        with pytest.raises(AssertionError):
            assert_same_training(runs(2, **SPLIT, _fault=fault)[0], runs(1)[0])


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"activation_offloading": True}, "there is no accelerator"),
        ({"activation_offloading": True, "shared_prefix": True}, "does not support `shared_prefix=True`"),
        ({"selective_checkpointing": True}, "Set `gradient_checkpointing=True`"),
        ({"oom_recovery": True, "optim": "lomo"}, "steps in every backward pass"),
        pytest.param({"oom_recovery": True, "activation_offloading": True}, "a failed attempt", marks=SLOW),
        pytest.param({"sequence_parallel_size": 2}, "1 process.*torchrun", marks=SLOW),
        pytest.param({"_trainer": "grpo", "activation_offloading": True}, "there is no accelerator", marks=SLOW),
        pytest.param(
            {"gradient_checkpointing": True, "gradient_checkpointing_ratio": 2.0}, "between 0 and 1", marks=SLOW
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(tmp_path, settings, error):
    import re

    output = failing_probe(tmp_path, settings)
    assert re.search(error, " ".join(output.split())), output[-2000:]


@SLOW
@pytest.mark.parametrize(
    "settings, error",
    [
        (SPLIT | {"shared_prefix": True}, "does not support `shared_prefix=True`"),
        (SPLIT | {"oom_recovery": True}, "does not support `oom_recovery=True`"),
        (SPLIT | {"neftune_noise_alpha": 5.0}, "does not support `neftune_noise_alpha`"),
        (SPLIT | {"use_transformers_continuous_batching": True}, "needs an attention of its own"),
        (SPLIT | {"per_device_train_batch_size": 1}, "divisible by"),
    ],
    ids=str,
)
def test_what_cannot_be_split_is_refused(tmp_path, settings, error):
    output = failing_probe(tmp_path, settings, processes=2)
    assert error in output, output[-2000:]
