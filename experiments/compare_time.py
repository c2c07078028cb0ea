"""Step times of two variants, measured in turn (A B A B ...) in one run, because machines are shared and noisy.

    python experiments/compare_time.py --variants baseline string-level --k 4 --workload cpu --pairs 5

Every measurement is a fresh process without the live-bytes meter, with the C allocator's own settings, which
run_matrix.py changes for its meters, and without the shared prefix's self-check, which a training pays once. Its
figure is the median of its steps after the first, or its only step with `--steps 1` (for steps of minutes, beside
which a warm-up is nothing). Quote the ratio, not the seconds. The pairs go to `<runs>/time_pairs.json`, one entry per
comparison and machine, as soon as they are measured; pairs that were made with the same settings, threads, trees and
library are not measured again. `completion_tokens` of an entry are those of both variants: v0.20.0 samples every
completion to its full length, v1.16.0 ends it at an end-of-sequence token.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import yaml  # noqa: E402
from run_matrix import default_workload, workload_path  # noqa: E402
from train import environment, machine, write_record  # noqa: E402

import variants  # noqa: E402


def measure(variant: str, k: int, config: Path, options: list[str]) -> dict:
    """The record of one fresh run. Raises RuntimeError if it did not end ok."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, str(HERE / "train.py"), "--config", str(config), "--variant", variant]
        command += ["--rloo_k", str(k), "--record", str(path), "--count_live_bytes", "False", "--self_check", "False"]
        command += options
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise RuntimeError(f"{variant} at k = {k} did not run:\n{result.stderr[-2000:]}")
        return json.loads(path.read_text())


def measured(steps: list) -> list:
    """Without the first, which warms up; an only step is measured."""
    return steps[1:] or steps


def phase_medians_s(summary: dict) -> dict[str, float]:
    """Seconds by phase: the median of the measured steps."""
    steps = measured(summary["step_phase_time_s"])
    return {phase: statistics.median(step.get(phase, 0.0) for step in steps) for phase in steps[0]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variants", nargs=2, required=True, metavar=("A", "B"))
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--workload")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--runs", default="results/runs/local")
    args, options = parser.parse_known_args(argv)
    a, b = args.variants
    path = Path(args.runs) / "time_pairs.json"
    try:
        workload = args.workload or default_workload()
        config = workload_path(workload)
        env = environment()
        made_with = {
            "options": options,
            "trees": [variants.tree_of(variant).commit for variant in args.variants],
            "workload": yaml.safe_load(config.read_text()),
            "machine": machine(env),
            "num_threads": env["num_threads"],
        }
        words = [word.removeprefix("--") for word in options]
        key = "/".join([workload, f"{b}_vs_{a}_k{args.k}", *words, machine(env)])
        entries = json.loads(path.read_text()) if path.exists() else {}
        entry = entries.get(key)
        stale = entry is None or any(entry.get(name) != value for name, value in made_with.items())
        if stale or variants.lowmem_changed(entry["lowmem_sha256"]):
            entry = {**made_with, "pairs_s": [], "phase_pairs_s": []}
        while len(entry["pairs_s"]) < args.pairs:
            records = [measure(variant, args.k, config, options) for variant in args.variants]
            entry["pairs_s"].append([statistics.median(measured(r["summary"]["step_time_s"])) for r in records])
            entry["phase_pairs_s"].append([phase_medians_s(record["summary"]) for record in records])
            ratios = sorted(b_s / a_s for a_s, b_s in entry["pairs_s"])
            entry |= {
                "ratio_min": ratios[0],
                "ratio_median": statistics.median(ratios),
                "ratio_max": ratios[-1],
                "tokens_per_row": [
                    max(records[-1]["tokens"][f"{part}_tokens_per_row"]) for part in ("prompt", "completion")
                ],
                "completion_tokens": [sum(record["tokens"]["completion_tokens_per_row"]) for record in records],
                "lowmem_sha256": records[0]["env"]["lowmem_sha256"] | records[1]["env"]["lowmem_sha256"],
                "env": records[-1]["env"],
                "measured_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            }
            entries = json.loads(path.read_text()) if path.exists() else {}
            write_record(path, entries | {key: entry})
            seconds = ", ".join(f"{t:.2f} s" for t in entry["pairs_s"][-1])
            print(f"pair {len(entry['pairs_s'])}/{args.pairs}: {seconds}", flush=True)
    except (ValueError, RuntimeError, variants.load_fork().ForkError) as error:
        print(f"compare_time.py: {error}", file=sys.stderr)
        return 1
    low, middle, high = (entry[f"ratio_{name}"] for name in ("min", "median", "max"))
    print(f"{b} / {a}, {key}: {low:.2f} to {high:.2f}, median {middle:.2f}; in {path}")
    return 0


if __name__ == "__main__":
    os.chdir(HERE.parent)
    sys.exit(main())
