"""Runs settings one after another, each in a fresh process under the memory monitor, and skips what is done.

    python experiments/run_matrix.py --variants baseline string-level --k 2 4 8 --workload cpu

Options that this program does not know go to experiments/train.py (`--steps 5`, `--budget_gib 12`, ...). A run counts
as done when its record is whole, ended ok or out of memory, and was made with the same settings on the same fork tree.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import variants  # noqa: E402
from config import GIB, ExperimentConfig  # noqa: E402
from memory_monitor import run_monitored  # noqa: E402

DONE = ("ok", "oom")
FOR_A_GPU = ("published_32gb", "published")
# glibc keeps freed memory and raises the size from which it gives memory back; fixed sizes make resident memory follow
# what is live (docs/measuring.md).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def default_workload() -> str:
    """The largest of `published_32gb`, `published` (16 GiB) and `cpu` whose budget the CUDA device has, else `cpu`."""
    try:
        import torch
    except ImportError:
        return "cpu"
    if not torch.cuda.is_available():
        return "cpu"
    total_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    budgets_gib = {name: yaml.safe_load(workload_path(name).read_text())["budget_gib"] for name in FOR_A_GPU}
    return next((name for name in FOR_A_GPU if budgets_gib[name] <= total_gib), "cpu")


def workload_path(name: str) -> Path:
    path = HERE / "configs" / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ValueError(f"unknown workload {name!r}; known: {known} (experiments/configs/)")
    return path


def unfinished_reason(path: Path, command: list[str], workload: dict, commit: str) -> str | None:
    """Why the run of `path` has to be made, or None if it is done."""
    if not path.exists():
        return "missing"
    try:
        record = json.loads(path.read_text())
        stage = record["env"]["tree"] if record.get("env") else None
    except (ValueError, AttributeError, KeyError):
        return "its record is half-written"
    if record.get("status") == "oom" and record.get("config") is None:  # ended by the kernel, which left the command
        return None if record["command"][1:] == command[1:] else "its settings were others"
    # The as-published exhibit always ends as an error, because it changes prompts; it is done when it was measured.
    measured = bool((record.get("summary") or {}).get("step_time_s"))
    if record.get("status") not in DONE and not (measured and stage["stage"] == "as-published"):
        return f"ended as {record.get('status')}"
    config = record["config"]
    overridden = {word.removeprefix("--").partition("=")[0] for word in command if word.startswith("--")}
    # A default of None may be filled in, and a setting that is newer than the record did not exist.
    fields = dataclasses.fields(ExperimentConfig)
    defaults = {f.name: f.default for f in fields if f.default is not None and f.name in config}
    settings = defaults | workload
    changed = [key for key, value in settings.items() if key not in overridden and config.get(key) != value]
    if record["command"][1:] != command[1:] or changed:
        return "its settings were others"
    if stage["commit"] != commit:
        return "it was made with another fork tree"
    uses_lowmem = stage["stage"].isdigit() and stage["stage"] != "0"
    if uses_lowmem and variants.lowmem_changed(record["env"].get("lowmem_sha256")):
        return "lowmem has changed since"
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--variants", nargs="+", required=True, help=f"of {', '.join(variants.VARIANTS)}, string-level@N"
    )
    parser.add_argument("--k", nargs="+", type=int, default=[2, 4, 8], help="values of rloo_k; default 2 4 8")
    parser.add_argument(
        "--workload", help="a file of experiments/configs; default cpu; on a GPU published_32gb or published"
    )
    parser.add_argument("--runs", default="results/runs/local", help="folder of the records")
    parser.add_argument("--seeds", nargs="+", type=int, help="one run per seed, named ..._seedN")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds after which a run is ended")
    parser.add_argument("--force", action="store_true", help="make runs again that are done")
    args, train_options = parser.parse_known_args(argv)
    for word in train_options:
        if word.partition("=")[0] in ("--variant", "--rloo_k", "--config", "--record", "--seed"):
            parser.error(f"{word} is decided here: use --variants, --k, --workload, --runs or --seeds")
    try:
        workload = args.workload or default_workload()
        config = workload_path(workload)
        workload_settings = yaml.safe_load(config.read_text())
        commits = {variant: variants.tree_of(variant).commit for variant in args.variants}
    except (ValueError, variants.load_fork().ForkError) as error:
        print(f"run_matrix.py: {error}", file=sys.stderr)
        return 2

    settings = [(v, k, seed) for v in args.variants for k in args.k for seed in (args.seeds or [None])]
    start, failed = time.monotonic(), []
    for number, (variant, k, seed) in enumerate(settings, start=1):
        name = f"{variant}_k{k}" + ("" if seed is None else f"_seed{seed}")
        path = Path(args.runs) / workload / f"{name}.json"
        options = ["--config", os.path.relpath(config, HERE.parent), "--variant", variant, "--rloo_k", str(k)]
        options += [] if seed is None else ["--seed", str(seed)]
        options += ["--record", str(path), *train_options]
        command = [sys.executable, "experiments/train.py", *options]
        label = f"[{number}/{len(settings)}] {workload}/{name}"
        reason = "--force" if args.force else unfinished_reason(path, command, workload_settings, commits[variant])
        if reason is None:
            print(f"{label}: done before", flush=True)
            continue
        print(f"{label}: {'starting' if reason == 'missing' else f'running again ({reason})'}", flush=True)
        timeline = path.with_suffix(".timeline.csv")
        record = run_monitored(
            command, path, timeline, timeout_s=args.timeout, label=f"{workload}/{name}", env=dict(os.environ) | MALLOC
        )
        if unfinished_reason(path, command, workload_settings, commits[variant]) is not None:
            failed.append(f"{workload}/{name}: {record['status']}: {record['error']}")
    print(f"{len(settings)} settings, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    os.chdir(HERE.parent)
    sys.exit(main())
