"""Every table and chart of one set of runs, with one command.

Combines the records first (combine_memory_data.py), then draws. Every workload with a baseline (but for origin and
learning) is compared and needs baseline, string-level, upstream and shared-prefix at k = 2, 4 and 8, with whatever
outcome: one that is not there is an error which names it. Another chart whose runs are not there is listed as not
drawn (--strict: an error).

    python visualization/create_charts.py --runs results/runs/local --out results/local
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, it still imports visualization.*

from matplotlib.figure import Figure

from visualization import style
from visualization.charts_by_k import growth_with_k, peak_memory_comparison, step_time
from visualization.charts_causes import ablation, ablation_records, origin_needs, published_origin
from visualization.charts_over_time import (
    individual_peak_preserving,
    individual_ultra_smooth,
    learning_curves,
    learning_needs,
    load_timeline,
)
from visualization.charts_shared_prefix import shared_prefix
from visualization.combine_memory_data import (
    RecordError,
    combine,
    load_records,
    lookup,
    make_command,
    timeline_path,
)
from visualization.comparison import (
    EXPECTED_KS,
    FIRST_WORKLOADS,
    compared,
    expected_in,
    expected_runs,
    missing_runs,
    tabled,
    workloads,
)
from visualization.results_table import write_table
from visualization.shared_prefix_table import (
    read_out_of_memory,
    read_time_ratios,
    read_training_peaks,
    write_shared_prefix_table,
)


def read_expected(path: Path) -> list[str]:
    """Run names (`cpu/baseline_k4`), one per line; # begins a comment."""
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def require_expected(records: list[dict], expected: list[str], runs_dir: Path) -> None:
    absent = missing_runs(records, expected)
    if absent:
        lines = [f"  {run}: make it with {make_command(runs_dir, run)}" for run in absent]
        raise RecordError(f"{runs_dir} lacks {len(absent)} expected run(s):\n" + "\n".join(lines))


def create_charts(records: list[dict], out: Path, workload: str | None, patch_names: dict[str, str]) -> list[str]:
    """Draws every chart whose records exist into `out`; returns a line for each one that is not drawn."""
    not_drawn = []

    def draw(name: str, needs: list[str], figure: Callable[[], Figure]) -> None:
        if not needs:
            style.save(figure(), out / f"{name}.png")
            return
        stale = f" ({out}/{name}.png is of an earlier call)" if (out / f"{name}.png").exists() else ""
        not_drawn.append(f"not drawn: {name}: needs {', '.join(needs)}{stale}")

    peaks = compared(records)
    expected = expected_runs(records) or expected_in(FIRST_WORKLOADS[0])
    some_peak = [] if peaks else expected
    draw("peak_memory_comparison", some_peak, lambda: peak_memory_comparison(records))
    draw("growth_with_k", some_peak, lambda: growth_with_k(records))
    timed = any(lookup(record, "summary.step_time_median_s") is not None for record in peaks)
    draw("step_time", [] if timed else expected, lambda: step_time(records))

    stages, needs = ablation_records(records)
    draw("ablation", needs, lambda: ablation(stages, patch_names))
    draw("published_origin", origin_needs(records), lambda: published_origin(records))

    name = workload or next(iter(workloads(records)), None)
    # A panel per run: the values of k that every variant is expected at, or the chart would be mostly empty.
    individual = [record for record in compared(records, name) if record["k"] in EXPECTED_KS] if name else []
    needs = [str(path) for record in individual if not (path := timeline_path(record["path"])).exists()]
    needs = needs if individual else some_peak or [f"{name}/<variant>_k<k>"]
    timelines = {} if needs else {record["run"]: load_timeline(record) for record in individual}
    for title, chart in (
        ("rloo_individual_peak_preserving", individual_peak_preserving),
        ("rloo_individual_ultra_smooth", individual_ultra_smooth),
    ):
        draw(title, needs, lambda chart=chart: chart(individual, timelines, name))
    draw("learning_curves", learning_needs(records), lambda: learning_curves(records))
    if tabled(records):
        write_table(records, out)
    else:
        not_drawn.append(f"not written: peak_memory.md: needs {', '.join(expected)}")
    return not_drawn


def create_shared_prefix_charts(runs_dir: Path, out: Path) -> list[str]:
    """The table and the chart of the shared prefix; returns a line if its measurements are not there."""
    peaks, times = read_training_peaks(runs_dir), read_time_ratios(runs_dir)
    if peaks.empty or times.empty:
        needed = "training_peaks.csv and time_pairs.json (experiments/training_peaks.py, experiments/compare_time.py)"
        return [f"not drawn: shared_prefix: needs {needed} in {runs_dir}"]
    write_shared_prefix_table(peaks, times, read_out_of_memory(runs_dir), out)
    style.save(shared_prefix(peaks, times), out / "shared_prefix.png")
    return []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of one set: results/runs/<set>")
    parser.add_argument("--out", type=Path, required=True, help="folder the charts and tables are written to")
    parser.add_argument("--expect", type=Path, help="file of the run names that must be there (default: see above)")
    parser.add_argument("--strict", action="store_true", help="a chart that cannot be drawn is an error")
    parser.add_argument("--patch-names", type=Path, help='JSON of names for the ablation: {"string-level@1": "..."}')
    parser.add_argument("--workload", help="workload of the charts over time (default: the first of cpu, published)")
    args = parser.parse_args(argv)
    patch_names = json.loads(args.patch_names.read_text(encoding="utf-8")) if args.patch_names else {}
    try:
        records = load_records(args.runs)
        combine(records, args.out)
        expected = expected_runs(records) if args.expect is None else read_expected(args.expect)
        require_expected(records, expected, args.runs)
        not_drawn = create_charts(records, args.out, args.workload, patch_names)
        not_drawn += create_shared_prefix_charts(args.runs, args.out)
    except RecordError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{len(records)} runs -> {args.out}")
    if not_drawn and args.strict:
        raise SystemExit("\n".join(f"error: {line}" for line in not_drawn))
    for line in not_drawn:
        print(line)


if __name__ == "__main__":
    main()
