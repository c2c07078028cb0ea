"""One run of one variant: trains a few RLOO steps and writes one JSON record, on failure too.

    python experiments/train.py --config experiments/configs/cpu.yaml --variant string-level --rloo_k 8

Every setting of experiments/config.py is an option and a YAML key. Run it under experiments/memory_monitor.py (the
shell scripts do) to have resident and device memory sampled from outside as well. Exit status: 0 ok, 1 error, 2 bad
settings, 3 out of memory.
"""

import contextlib
import datetime
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if "LOCAL_RANK" not in os.environ:  # one process uses one GPU; with several, TRL would split batches over all of them
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

import variants  # noqa: E402  (the tree has to be chosen before anything imports TRL)
from config import GIB, ExperimentConfig  # noqa: E402
from memory_samples import status_kib, write_atomically  # noqa: E402
from run_outcome import EXIT_CODES, OUT_OF_MEMORY, SUMMARY_KEYS  # noqa: E402


def parse_config(argv: list[str]):
    """`(config, stage)`. The variant decides which tree's `TrlParser` reads the rest."""
    variant = ExperimentConfig.variant
    for position, word in enumerate(argv):
        if word == "--config" and position + 1 < len(argv):
            import yaml

            try:
                settings = yaml.safe_load(Path(argv[position + 1]).read_text()) or {}
            except yaml.YAMLError as error:
                raise ValueError(f"{argv[position + 1]} is not valid YAML: {' '.join(str(error).split())}") from error
            variant = settings.get("variant", variant)
    for position, word in enumerate(argv):
        if word == "--variant" and position + 1 < len(argv):
            variant = argv[position + 1]
        elif word.startswith("--variant="):
            variant = word.partition("=")[2]
    stage = variants.activate(variant)
    from trl import TrlParser

    (config,) = TrlParser(ExperimentConfig, allow_abbrev=False).parse_args_and_config(argv)
    if config.variant != variant:  # read twice, and the first reading chose the tree
        raise ValueError(f"the variant {config.variant!r} was not given as --variant or `variant:`; write it in full")
    return config, stage


def set_budget(config: ExperimentConfig, parameters: int) -> None:
    """Limits what the process may allocate to `budget_gib`, so that an out-of-memory is an outcome.

    Raises:
        ValueError: if the weights, reference, gradients and AdamW's state alone need more.
    """
    if config.budget_gib is None:
        return
    budget = int(config.budget_gib * GIB)
    width = {"float32": 4, "bfloat16": 2, "float64": 8}[config.dtype]
    # Policy, reference; gradients, two moments. Memory strategies may keep the latter elsewhere
    needed = parameters * width * (2 if config.lora_rank or config.memory is not None else 5)
    if needed > budget:
        raise ValueError(
            f"budget_gib is {config.budget_gib}, but {parameters:,} parameters need {needed / GIB:.2f} GiB "
            "for weights, reference, gradients and optimizer alone. Raise the budget or take a smaller model."
        )
    limit_memory(config.budget_gib)


def limit_memory(budget_gib: float) -> None:
    """Limits what this process may allocate from now on: the CUDA allocator's share, or address space on a CPU."""
    import torch

    budget = int(budget_gib * GIB)
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        if budget > total:
            raise ValueError(
                f"budget_gib is {budget_gib:g}, but the device has {total / GIB:.1f} GiB. Pass --budget_gib "
                f"{0.95 * total / GIB:.0f} to find out what this device holds, or --workload cpu for a smaller one."
            )
        torch.cuda.set_per_process_memory_fraction(budget / total)
    else:
        # The limit counts address space; what is reserved and never touched (thread stacks, heap arenas) is added.
        reserved = (status_kib("VmData") - status_kib("VmRSS")) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (budget + max(reserved, 0), resource.RLIM_INFINITY))


def environment(stage=None) -> dict:
    """Machine, packages and commit; `stage` is the fork tree of a run that uses one."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    with open("/proc/cpuinfo") as cpuinfo:
        cpu = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), None)

    def git(*args: str) -> str | None:
        result = subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else None

    # The records of earlier runs are no change of what is measured.
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": stage and stage.pin[1:],
        "tree": stage
        and {
            "pin": stage.pin,
            "stage": stage.name,
            "stage_name": stage.subject,
            "commit": stage.commit,
            "series_sha256": stage.series_sha256,
        },
        "repo_commit": git("rev-parse", "HEAD"),
        "repo_dirty": None if changes is None else bool(changes),
        "device": torch.cuda.get_device_name(0) if cuda else "cpu",
        "driver": driver_version() if cuda else None,
        "lowmem_sha256": None,
        "cpu": cpu,
        "cpu_count": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "ram_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def machine(env: dict) -> str:
    """What an `environment()` was measured on: the name of the GPU, or of the processor."""
    return env["device"] if env["device"] != "cpu" else env["cpu"] or "cpu"


def driver_version() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


def write_record(path: Path, record: dict) -> None:
    """Atomic: a reader sees the whole record or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")


def train(config: ExperimentConfig, stage, record: dict) -> None:
    """Runs the training and fills `record`; raises what the training raises."""
    import torch
    from transformers import AutoModelForCausalLM, logging

    from data import load_prompts, load_tokenizer, model_config
    from instrument import RunWatch, check_prompts
    from lowmem.live_bytes import LiveBytes

    logging.set_verbosity_error()
    tokenizer = load_tokenizer(config)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(model_config(config, tokenizer))
    prompts = load_prompts(config, tokenizer)

    import memory
    from trainers import build_trainer

    set_budget(config, sum(p.numel() for p in shape.parameters()))

    device = "cuda" if torch.cuda.is_available() else None  # what is offloaded from a GPU is not live there
    meter = LiveBytes(device=device) if config.count_live_bytes else None
    watch = RunWatch(config.steps, meter, tokenizer.pad_token_id)
    trainer, policy, ref_policy = build_trainer(config, stage, tokenizer, prompts, [watch])
    processes = trainer.accelerator.num_processes
    watch.watch(policy, ref_policy, trainer.accelerator)
    summary = record["summary"]
    summary["rss_start_bytes"] = status_kib("VmRSS") * 1024
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    products = memory.ProductFlops()
    try:
        if meter is None:
            trainer.train()
        else:
            for model in filter(None, (policy, ref_policy)):
                meter.track(model.parameters())
                meter.track(model.buffers())
            with meter, products if config.memory is not None else contextlib.nullcontext():
                trainer.train()
    finally:
        lift_budget()  # what is left allocates for the record only
        watch.enter("other")
        summary |= {
            "rss_peak_bytes": status_kib("VmHWM") * 1024,
            "step_time_s": watch.step_time_s,
            "step_time_median_s": statistics.median(watch.step_time_s[1:]) if len(watch.step_time_s) > 1 else None,
            "phase_time_s": dict(watch.phase_time_s),
            "step_phase_time_s": watch.step_phase_time_s,
            "metrics": watch.metrics,
        }
        if meter is not None:
            summary |= {
                "live_peak_bytes": meter.peak_bytes,
                "live_peak_phase": meter.peak_phase,
                "live_peak_bytes_by_phase": meter.peak_bytes_by_phase,
            }
        if torch.cuda.is_available():
            summary["cuda_peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
            summary["cuda_peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
        record["memory"] = memory.record_of(getattr(trainer, "memory_choice", None), trainer, products)
        expected = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        record["tokens"] = {
            "prompt_tokens_per_row": [len(ids) for ids in watch.prompts],
            "completion_tokens_per_row": [len(ids) for ids in watch.completions],
            "rows_per_step": config.rows_per_step,
            **check_prompts(
                watch.all_prompts,
                expected,
                config.rows_per_step // processes,  # those of this process; a group may lie on several
                math.gcd(config.rloo_k, config.rows_per_step // processes),
                tiled=stage.pin == "v0.20.0",
            ),
        }
    tokens = record["tokens"]
    if tokens["prompts_changed"] or tokens["groups_mixed"]:
        raise RuntimeError(
            f"the run is not valid: {tokens['prompts_changed']} of {len(watch.all_prompts)} rows had another prompt "
            f"than the data set's (first step: {sum(tokens['prompt_tokens_per_row'])} tokens, expected "
            f"{sum(filter(None, tokens['expected_prompt_tokens_per_row']))}), and {tokens['groups_mixed']} groups of "
            "the leave-one-out baseline mixed prompts"
        )
    if not watch.all_prompts or len(watch.step_time_s) != config.steps:
        raise RuntimeError(f"{len(watch.step_time_s)} of {config.steps} steps were made")


def main(argv: list[str]) -> int:
    started, start = datetime.datetime.now(datetime.timezone.utc), time.perf_counter()
    try:
        config, stage = parse_config(argv)
    except (ValueError, RuntimeError, OSError, variants.load_fork().ForkError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    path = Path(config.record or HERE.parent / f"results/runs/local/{config.workload}/{config.run_name}.json")
    if rank := int(os.environ.get("RANK", 0)):  # every process writes what it held; the run's record is the first's
        path = path.with_suffix(f".rank{rank}.json")
    record = {
        "schema": 1,
        "run": f"{config.workload}/{path.stem}",
        "status": "ok",
        "error": None,
        "command": ["python", "experiments/train.py", *argv],
        "config": asdict(config),
        "env": environment(stage),
        "seed": config.seed,
        "started_at": started.isoformat(timespec="seconds"),
        "wall_s": None,
        "tokens": None,
        "summary": dict.fromkeys(SUMMARY_KEYS),
    }
    try:
        train(config, stage, record)
    except Exception as error:  # the outcome is recorded, whatever it is
        lift_budget()
        text = f"{type(error).__name__}: {error}"
        record["status"] = "oom" if OUT_OF_MEMORY.search(text) else "error"
        record["error"] = " ".join(text.split())[:1000]
        traceback.print_exc()
        print(f"train.py: {record['error']}", file=sys.stderr)
    record["env"]["lowmem_sha256"] = variants.lowmem_sha256(variants.loaded_lowmem())
    record["wall_s"] = time.perf_counter() - start
    write_record(path, record)
    print(f"train.py: {record['status']}, record in {path}")
    return EXIT_CODES[record["status"]]


def lift_budget() -> None:
    """Room to write the record after an out-of-memory."""
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
