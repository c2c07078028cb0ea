"""Step times of two variants, measured in turn (A B A B ...) in one run, because machines are shared and noisy.

    python experiments/compare_time.py --variants baseline string-level --k 4 --workload cpu --pairs 5

Every measurement is a fresh process without the live-bytes meter; its figure is the median of its steps after the
first. Quote the ratio, not the seconds. The pairs go to `<runs>/time_pairs.json`, one entry per comparison.
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

from run_matrix import MALLOC, default_workload, workload_path  # noqa: E402
from train import write_record  # noqa: E402


def measure(variant: str, k: int, config: Path, options: list[str]) -> dict:
    """The record of one fresh run. Raises RuntimeError if it did not end ok."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, str(HERE / "train.py"), "--config", str(config), "--variant", variant]
        command += ["--rloo_k", str(k), "--record", str(path), "--count_live_bytes", "False", *options]
        result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ) | MALLOC)
        if result.returncode:
            raise RuntimeError(f"{variant} at k = {k} did not run:\n{result.stderr[-2000:]}")
        return json.loads(path.read_text())


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
    try:
        workload = args.workload or default_workload()
        config = workload_path(workload)
        pairs = []
        for number in range(args.pairs):
            records = [measure(variant, args.k, config, options) for variant in args.variants]
            pairs.append([record["summary"]["step_time_median_s"] for record in records])
            print(f"pair {number + 1}/{args.pairs}: " + ", ".join(f"{t:.2f} s" for t in pairs[-1]), flush=True)
    except (ValueError, RuntimeError) as error:
        print(f"compare_time.py: {error}", file=sys.stderr)
        return 1
    ratios = sorted(b / a for a, b in pairs)
    a, b = args.variants
    path = Path(args.runs) / "time_pairs.json"
    entries = json.loads(path.read_text()) if path.exists() else {}
    entries[f"{workload}/{b}_vs_{a}_k{args.k}"] = {
        "pairs_s": pairs,
        "ratio_min": ratios[0],
        "ratio_median": statistics.median(ratios),
        "ratio_max": ratios[-1],
        "options": options,
        "env": records[-1]["env"],
        "measured_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    write_record(path, entries)
    print(f"{b} / {a}: {ratios[0]:.2f} to {ratios[-1]:.2f}, median {statistics.median(ratios):.2f}; in {path}")
    return 0


if __name__ == "__main__":
    os.chdir(HERE.parent)
    sys.exit(main())
