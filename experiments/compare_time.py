"""Step times of variants, measured in turn (A B A B ...) in one run, because machines are shared and noisy.

    python experiments/compare_time.py --variants baseline string-level --k 4 --workload cpu --pairs 5
    python experiments/compare_time.py --variants upstream string-level shared-prefix --k 8 --workload published

The last variant is compared with each of the others: the second line measures three runs a turn for two comparisons.

Every measurement is a fresh process without the live-bytes meter, with a C allocator that keeps what is freed, in huge
pages, as PyTorch's own does on a GPU (`ALLOCATORS`), and without the shared prefix's self-check, which a training pays
once. What is out of memory so may fit with `--allocator glibc`, which holds little more than is live and takes longer.
Its figure is the median of its steps after the first, or its only step with `--steps 1` (for steps of minutes, beside
which a warm-up is nothing). Quote the ratio, not the seconds. The pairs go to `<runs>/time_pairs.json`, one entry per
comparison and machine, as soon as they are measured; pairs that were made with the same settings, threads, trees and
library are not measured again. A peer that is out of memory is an outcome, recorded as `out_of_memory`, and the others
go on; the last variant runs only if a peer is left to compare it with. `completion_tokens` of an entry are those of
both variants: v0.20.0 samples every completion to its full length, v1.16.0 ends it at an end-of-sequence token.
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
from run_outcome import EXIT_CODES  # noqa: E402

# glibc's own settings map every large tensor anew, and the page faults are much of the time of a small model
# (docs/measuring.md). Elsewhere than on glibc this does nothing.
ALLOCATORS = {
    "keeping": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=17179869184",
    "glibc": None,
}


def measure(variant: str, k: int, config: Path, options: list[str], allocator: str | None) -> dict:
    """The record of one fresh run. Raises RuntimeError if it ended neither ok nor out of memory."""
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, str(HERE / "train.py"), "--config", str(config), "--variant", variant]
        command += ["--rloo_k", str(k), "--record", str(path), "--count_live_bytes", "False", "--self_check", "False"]
        command += options
        if allocator:
            env["GLIBC_TUNABLES"] = allocator
        result = subprocess.run(command, capture_output=True, text=True, env=env)
        if result.returncode not in (0, EXIT_CODES["oom"]):
            raise RuntimeError(f"{variant} at k = {k} did not run:\n{result.stderr[-2000:]}")
        return json.loads(path.read_text())


def measured(steps: list) -> list:
    """Without the first, which warms up; an only step is measured."""
    return steps[1:] or steps


def phase_medians_s(summary: dict) -> dict[str, float]:
    """Seconds by phase: the median of the measured steps."""
    steps = measured(summary["step_phase_time_s"])
    return {phase: statistics.median(step.get(phase, 0.0) for step in steps) for phase in steps[0]}


def step_time_s(record: dict) -> float:
    """The median of the measured steps."""
    return statistics.median(measured(record["summary"]["step_time_s"]))


def add_pair(entry: dict, peer: dict, compared: dict | None) -> None:
    """Adds the records of two runs of one turn to their comparison; `compared` may be None if the peer did not fit."""
    records = [record for record in (peer, compared) if record]
    entry |= {
        "lowmem_sha256": {name: sha for record in records for name, sha in record["env"]["lowmem_sha256"].items()},
        "env": records[-1]["env"],
        "measured_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if is_out_of_memory(peer):
        entry["out_of_memory"] = {"budget_gib": peer["config"]["budget_gib"], "error": peer["error"]}
        return
    entry["pairs_s"].append([step_time_s(record) for record in records])
    entry["phase_pairs_s"].append([phase_medians_s(record["summary"]) for record in records])
    ratios = sorted(compared_s / peer_s for peer_s, compared_s in entry["pairs_s"])
    entry |= {
        "ratio_min": ratios[0],
        "ratio_median": statistics.median(ratios),
        "ratio_max": ratios[-1],
        "tokens_per_row": [max(compared["tokens"][f"{part}_tokens_per_row"]) for part in ("prompt", "completion")],
        "completion_tokens": [sum(record["tokens"]["completion_tokens_per_row"]) for record in records],
    }


def is_out_of_memory(record: dict) -> bool:
    return record["status"] == "oom"


def wants_pairs(entry: dict, pairs: int) -> bool:
    return len(entry["pairs_s"]) < pairs and "out_of_memory" not in entry


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--variants", nargs="+", required=True, metavar="VARIANT", help="peers, then the compared one")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--workload")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--allocator", choices=[*ALLOCATORS], default="keeping", help="of C; see above")
    parser.add_argument("--runs", default="results/runs/local")
    args, options = parser.parse_known_args(argv)
    *peers, compared = args.variants
    if not peers or len(set(args.variants)) < len(args.variants):
        parser.error("--variants: one variant or more and then the one that is compared with them, each of them once")
    path = Path(args.runs) / "time_pairs.json"
    try:
        workload = args.workload or default_workload()
        config = workload_path(workload)
        env = environment()
        words = [word.removeprefix("--") for word in options]
        if args.allocator != "keeping":
            words += ["allocator", args.allocator]
        allocator = ALLOCATORS[args.allocator]
        entries = json.loads(path.read_text()) if path.exists() else {}
        in_common = {"options": options, "workload": yaml.safe_load(config.read_text())}
        in_common |= {"allocator": allocator, "machine": machine(env), "num_threads": env["num_threads"]}
        keys, current = {}, {}
        for peer in peers:
            key = "/".join([workload, f"{compared}_vs_{peer}_k{args.k}", *words, machine(env)])
            made_with = in_common | {"trees": [variants.tree_of(variant).commit for variant in (peer, compared)]}
            entry = entries.get(key)
            stale = entry is None or any(entry.get(name) != value for name, value in made_with.items())
            if stale or variants.lowmem_changed(entry["lowmem_sha256"]):
                entry = {**made_with, "pairs_s": [], "phase_pairs_s": []}
            keys[peer], current[peer] = key, entry
        while wanting := [peer for peer in peers if wants_pairs(current[peer], args.pairs)]:
            number = 1 + min(len(current[peer]["pairs_s"]) for peer in wanting)
            records = {peer: measure(peer, args.k, config, options, allocator) for peer in wanting}
            if not all(is_out_of_memory(record) for record in records.values()):
                records[compared] = measure(compared, args.k, config, options, allocator)
                if is_out_of_memory(records[compared]):
                    raise RuntimeError(f"{compared} at k = {args.k} did not run:\n{records[compared]['error']}")
            for peer in wanting:
                add_pair(current[peer], records[peer], records.get(compared))
            entries = json.loads(path.read_text()) if path.exists() else {}
            write_record(path, entries | {keys[peer]: current[peer] for peer in wanting})
            seconds = ", ".join(
                f"{name} " + ("out of memory" if is_out_of_memory(record) else f"{step_time_s(record):.2f} s")
                for name, record in records.items()
            )
            print(f"pair {number}/{args.pairs}: {seconds}", flush=True)
    except (ValueError, RuntimeError, variants.load_fork().ForkError) as error:
        print(f"compare_time.py: {error}", file=sys.stderr)
        return 1
    for peer, key in keys.items():
        if failed := current[peer].get("out_of_memory"):
            print(f"{peer}, {key}: out of memory ({failed['error']}); in {path}")
            continue
        low, middle, high = (current[peer][f"ratio_{name}"] for name in ("min", "median", "max"))
        print(f"{compared} / {peer}, {key}: {low:.2f} to {high:.2f}, median {middle:.2f}; in {path}")
    return 0


if __name__ == "__main__":
    os.chdir(HERE.parent)
    sys.exit(main())
