"""Predicted against executed peaks of the planner, with the rules of thumb beside.

python -m visualization.charts_plan         # results/planner/validation.json -> results/planner/validation.png
"""

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from visualization.style import MUTED, SMALL_PT, TITLE_PT, WIDTH_IN, save

ROOT = Path(__file__).resolve().parent.parent
KINDS = {
    "trainer": ("whole trainers of both trees", "#0072B2", "o"),
    "recorded": ("recorded trainer runs", "#56B4E9", "s"),
    "step": ("the planner's own step", "#009E73", "^"),
}
ESTIMATES = (
    ("predicted_bytes", "the planner"),
    ("rule_bytes", "rule of thumb: weights x 3.5 + batch"),
    ("accelerate_bytes", "accelerate estimate-memory: weights x 4"),
)


def relative_errors(rows: list[dict], column: str) -> list[float]:
    return [row[column] / row["measured_bytes"] - 1 for row in rows]


def draw_validation(rows: list[dict]) -> Figure:
    """Three panels with the same axes: what each estimate says over what was executed.

    Raises:
        ValueError: if a row has no measured peak; its run has to be made again.
    """
    missing = [row["name"] for row in rows if not row["measured_bytes"]]
    if missing or not rows:
        raise ValueError(f"no measured peak of {missing or 'any configuration'}: run experiments/validate_planner.py")
    figure = Figure(figsize=(WIDTH_IN, 4.9), layout="constrained")
    panels = figure.subplots(1, len(ESTIMATES), sharex=True, sharey=True)
    mib = 2**20
    sizes = [row[column] / mib for row in rows for column in ("measured_bytes", *(name for name, _ in ESTIMATES))]
    low, high = min(sizes) / 1.6, max(sizes) * 1.6
    for axes, (column, title) in zip(panels, ESTIMATES):
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, zorder=1)
        for kind, (label, colour, marker) in KINDS.items():
            of_kind = [row for row in rows if row["kind"] == kind]
            if not of_kind:
                continue
            axes.plot(
                [row["measured_bytes"] / mib for row in of_kind],
                [row[column] / mib for row in of_kind],
                linestyle="none",
                marker=marker,
                markersize=5,
                alpha=0.75,
                color=colour,
                label=f"{label} ({len(of_kind)})",
                zorder=3,
            )
        errors = [abs(error) for error in relative_errors(rows, column)]
        axes.set_title(title, fontsize=10)
        axes.text(
            0.04,
            0.96,
            f"median error {statistics.median(errors):.2%}\nworst {max(errors):.1%}",
            transform=axes.transAxes,
            va="top",
            fontsize=SMALL_PT,
        )
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("executed peak, MiB")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))
        axes.grid(True)
    panels[0].set_ylabel("predicted peak, MiB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    wrong = sum(row["status"] == "oom" for row in rows)
    limited = sum(bool(row["budget_bytes"]) for row in rows)
    figure.suptitle(
        "Does the planner know the peak before the run?", fontsize=TITLE_PT, fontweight="bold", x=0.012, ha="left"
    )
    note = (
        f"live tensor bytes on a CPU, n = {len(rows)} configurations; {limited} of them were run with no more "
        f"memory than the plan calls enough, {wrong} of these ran out"
    )
    figure.text(0.012, 0.925, note, fontsize=SMALL_PT, color=MUTED, va="top")
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.93))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "planner")
    folder = parser.parse_args().folder
    save(draw_validation(json.loads((folder / "validation.json").read_text())), folder / "validation.png")
    print(f"{folder / 'validation.png'}")


if __name__ == "__main__":
    main()
