"""Runs every memory strategy on one model, the three cases of the automatic choice, and rows of 14,100 tokens, each in
fresh processes.

    python experiments/run_memory_strategies.py --runs results/memory/cpu-2core

A run whose record is there and ended ok is skipped. Draw the table and the chart with
`python -m visualization.memory_strategies`.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from run_matrix import MALLOC  # noqa: E402

from memory_monitor import run_monitored  # noqa: E402

CONFIGS = Path("experiments/configs/memory")
OFFLOAD = {"grad_offload": True, "zero2_gradient_sharding": True}
# Four rows at once do not fit, two do: on a CPU the interpreter is in the budget
OOM_OPTIONS = ["--rows_per_micro_batch=4", "--budget_gib=" + ("1.25" if torch.cuda.is_available() else "1.75")]
# name -> (processes, `memory:` section on top of layers.yaml, or a file of its own)
RUNS = {
    "none_1": (1, {}),
    "ratio-half_1": (1, {"gradient_checkpointing_ratio": 0.5}),
    "ratio-all_1": (1, {"gradient_checkpointing_ratio": 1.0}),
    "selective-half_1": (1, {"gradient_checkpointing_ratio": 0.5, "selective_checkpointing": True}),
    "selective-all_1": (1, {"selective_checkpointing": True}),
    "oom-recovery_1": (1, {"oom_recovery": True}),
    "zero2_1": (1, "one_process_long"),
    "ddp_2": (2, {}),
    "zero2_2": (2, "two_processes_short"),
    "split_2": (2, {"sequence_parallelism": 2}),
    "split-zero2_2": (2, "two_processes_long"),
    "ddp_4": (4, {}),
    "zero2_4": (4, OFFLOAD),
    "split_4": (4, {"sequence_parallelism": 4}),
    "split-zero2_4": (4, "four_processes_both"),
    "long_1": (1, "fourteen_thousand_tokens"),
    "long_2": (2, "fourteen_thousand_tokens"),
    "long_4": (4, "fourteen_thousand_tokens"),
}
if torch.cuda.is_available():
    RUNS["activations-offloaded_1"] = (1, {"activation_offloading": True})


def command_of(name: str, record: Path) -> list[str]:
    processes, memory = RUNS[name]
    config = memory if isinstance(memory, str) else "layers"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = words if processes > 1 else [sys.executable]
    words += ["experiments/train.py", "--config", str(CONFIGS / f"{config}.yaml"), "--record", str(record)]
    words += OOM_OPTIONS if name == "oom-recovery_1" else []
    return words if isinstance(memory, str) else [*words, "--memory", json.dumps(memory)]


def is_done(path: Path, processes: int) -> bool:
    """Whether every process has left a record that ended ok, that of oom-recovery with an out-of-memory in it."""
    paths = [path, *(path.with_suffix(f".rank{rank}.json") for rank in range(1, processes))]
    try:
        records = [json.loads(p.read_text()) for p in paths]
        shows = path.stem != "oom-recovery_1" or bool(records[0]["memory"]["oom_events"])
        return shows and all(record["status"] == "ok" for record in records)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", default="results/memory/local", help="folder of the records")
    parser.add_argument("--only", nargs="+", choices=sorted(RUNS), help="these runs; default all")
    parser.add_argument("--timeout", type=float, default=900, help="seconds after which a run is ended")
    parser.add_argument("--force", action="store_true", help="make runs again that are done")
    args = parser.parse_args(argv)
    failed, start = [], time.monotonic()
    names = args.only or list(RUNS)
    for number, name in enumerate(names, start=1):
        path = Path(args.runs) / f"{name}.json"
        if not args.force and is_done(path, RUNS[name][0]):
            print(f"[{number}/{len(names)}] {name}: done before", flush=True)
            continue
        print(f"[{number}/{len(names)}] {name}: starting", flush=True)
        for old in path.parent.glob(f"{name}.rank*.json"):
            old.unlink()
        record = run_monitored(
            command_of(name, path),
            path,
            path.with_suffix(".timeline.csv"),
            timeout_s=args.timeout,
            label=f"memory/{name}",
            env=dict(os.environ) | MALLOC | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            quiet=True,
        )
        path.with_suffix(".timeline.csv").unlink()  # the samples add up all processes; the records have them apart
        if not is_done(path, RUNS[name][0]):
            failed.append(f"{name}: {record['status']}: {record['error'] or 'nothing ran out of memory'}")
    print(f"{len(names)} runs, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    os.chdir(HERE.parent)
    sys.exit(main())
