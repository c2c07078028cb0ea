"""Peak memory and step time over k, one panel per workload: pure functions from records to a figure."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from visualization import style
from visualization.combine_memory_data import GIB, lookup, runs_table
from visualization.comparison import (
    COMPARED,
    EXTRAPOLATED_FROM,
    ONE_ROW,
    WITH_ONE_ROW,
    budgets,
    compared,
    extrapolated_peaks,
    extrapolation_note,
    process_meter,
    reached_budgets,
    runs_by_workload,
    workloads,
)

LIVE = ("live_peak_bytes", "live tensor bytes")
GROWTH_FROM_K = 2


def finite(values: pd.Series) -> list[float]:
    return values.dropna().astype(float).tolist()


def peak_memory_comparison(records: list[dict]) -> Figure:
    """Bars at every measured k, one colour per variant; per workload one panel per meter."""
    every, records = records, compared(records)
    names = workloads(records)
    groups = sum(len({record["k"] for record in compared(records, name)}) for name in names)
    columns = len(names) if groups <= 6 else 1
    rows = 2 * len(names) // columns
    question = "How much memory does one training step need at its peak?"
    note = token_note(records)
    if fit := extrapolation_note(every, names):
        note += f". * {fit}"
    if any(record["status"] == "oom" and not budgets([record]) for record in records):
        note += ". An OOM bar without a budget has no height of its own: it ends at the largest measured peak"
    figure = style.headed_figure(question, records, 1.6 + 2.7 * rows, note=note)
    panels = figure.subplots(rows, columns, squeeze=False).flatten(order="F" if columns > 1 else "C")
    for i, name in enumerate(names):
        mine = compared(records, name)
        for panel, meter in zip(panels[2 * i : 2 * i + 2], (LIVE, process_meter(mine))):
            baselines = runs_table(compared(every, name, EXTRAPOLATED_FROM))
            peak_panel(panel, mine, baselines, meter[0], style.WIDTH_IN / columns - 0.7)
            panel.set_title(f"{name}: {meter[1]}", loc="left")
    drawn = {record["variant"] for record in records}
    extra = []
    if any(record["status"] == "oom" for record in records):
        extra.append(Patch(facecolor="white", edgecolor=style.MUTED, hatch="////", label="OOM: out of memory"))
    style.variant_legend(figure, [name for name in COMPARED if name in drawn], extra)
    return figure


def token_note(records: list[dict]) -> str:
    """Prompt and completion tokens per row of each workload, beside every memory figure."""
    notes = []
    for name, runs in runs_by_workload(records).items():
        counts = [finite(runs[f"{part}_tokens_per_row"]) for part in ("prompt", "completion")]
        spans = [f"{min(c):,.0f}" + (f" to {max(c):,.0f}" if max(c) > min(c) else "") for c in counts if c]
        if len(spans) == 2:
            notes.append(f"{name}: {spans[0]} prompt + {spans[1]} completion tokens per row (the longest)")
    return "; ".join(notes)


def peak_panel(axes: Axes, records: list[dict], baselines: pd.DataFrame, meter: str, panel_in: float) -> None:
    """`baselines`: the runs that a baseline out of memory is extrapolated from, more than those drawn."""
    runs = runs_table(records)
    ks = sorted(runs["k"].unique())
    variants = [name for name in COMPARED if name in set(runs["variant"])]
    ran = runs[runs["status"] == "ok"]
    extrapolated = {k: peak / GIB for k, peak in extrapolated_peaks(baselines, meter).items()}
    highest = max(finite(ran[meter]), default=GIB) / GIB
    top = style.top_with_budget(highest, budgets(records), reached_budgets(records), 1.22)
    top = style.top_with_extrapolation(top, list(extrapolated.values()))
    style.memory_axis(axes, top, "GiB")
    width = 0.82 / len(variants)
    dense = width * panel_in / len(ks) < 0.5  # inches: a number lying on its bar would touch its neighbour's
    for row in runs.itertuples():
        x = ks.index(row.k) + (variants.index(row.variant) - (len(variants) - 1) / 2) * width
        colour = style.variant_colour(row.variant)
        peak = getattr(row, meter)
        if row.status == "oom":
            limit = row.budget_bytes / GIB if pd.notna(row.budget_bytes) else highest
            style.draw_oom_bar(axes, x, 0.9 * width, min(limit, top), colour)
            if row.variant == "baseline" and row.k in extrapolated:
                style.draw_extrapolated_bar(axes, x, 0.9 * width, extrapolated[row.k], colour)
        elif row.status == "ok" and pd.notna(peak):
            axes.bar(x, peak / GIB, 0.9 * width, color=colour, zorder=2)
            text = f" {style.three_digits(peak / GIB)}" if dense else style.three_digits(peak / GIB)
            style.value_label(axes, x, peak / GIB, text, rotation=90 if dense else 0)
        else:
            style.draw_unfinished(axes, x, "not measured" if row.status == "ok" else row.status)
    axes.set_xticks(range(len(ks)), [f"k = {k}" for k in ks])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.55, len(ks) - 0.45)
    style.draw_budgets(axes, budgets(records))


def spread(values: list[float], gap: float) -> list[float]:
    """The values moved apart to at least `gap`, order and centre kept as far as that allows."""
    order = np.argsort(values)
    placed = np.asarray(values, dtype=float)[order]
    for _ in range(50):
        for i in range(len(placed) - 1):
            overlap = gap - (placed[i + 1] - placed[i])
            if overlap > 1e-9:
                placed[i] -= overlap / 2
                placed[i + 1] += overlap / 2
    result = np.empty(len(placed))
    result[order] = placed
    return result.tolist()


def growth_with_k(records: list[dict]) -> Figure:
    """Peak over k; the number at the end of a line is peak(its last k) / peak(2). Dotted: a variant row by row."""
    names = workloads(records)
    records = compared(records, variants=WITH_ONE_ROW)
    drawn = [name for name in WITH_ONE_ROW if any(record["variant"] == name for record in records)]
    question = "How does peak memory grow with k completions per prompt?"
    note = f"× at the end of a line: its last peak over its own peak at k = {GROWTH_FROM_K}. "
    if any(name.endswith(ONE_ROW) for name in drawn):
        note += f"Dotted line, hollow cross ({ONE_ROW}): one row per micro-batch. "
    figure = style.headed_figure(question, records, 7.6, note=note + token_note(records))
    panels = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        mine = compared(records, name, WITH_ONE_ROW)
        for row, meter in enumerate((LIVE, process_meter(mine))):
            growth_panel(panels[row, column], mine, meter[0])
            panels[row, column].set_title(f"{name}: {meter[1]}", loc="left")
            panels[row, column].set_xlabel("k" if row else "")
    style.variant_legend(figure, drawn)
    return figure


def growth_panel(axes: Axes, records: list[dict], meter: str) -> None:
    runs = runs_table(records)
    ran = runs[(runs["status"] == "ok") & runs[meter].notna()]
    ks = sorted(int(k) for k in runs["k"].unique())
    highest = max(finite(ran[meter]), default=GIB) / GIB
    top = style.top_with_budget(highest, budgets(records), reached_budgets(records), 1.15)
    style.memory_axis(axes, top, "peak, GiB")
    style.measured_ks(axes, ks)
    ends = []
    for variant in [name for name in WITH_ONE_ROW if name in set(runs["variant"])]:
        points = ran[ran["variant"] == variant].sort_values("k")
        peaks = points[meter].astype(float) / GIB
        axes.plot(points["k"].astype(float), peaks, **style.variant_line(variant))
        if len(points) > 1 and points["k"].iloc[0] == GROWTH_FROM_K and variant in COMPARED:
            growth = peaks.iloc[-1] / peaks.iloc[0]
            ends.append((int(points["k"].iloc[-1]), peaks.iloc[-1], growth, style.variant_colour(variant)))
    for k in {end[0] for end in ends}:
        here = [end for end in ends if end[0] == k]
        heights = spread([end[1] for end in here], 0.062 * top)
        for (_, _, ratio, colour), height in zip(here, heights):
            text = f"×{ratio:.2f}"
            # a line that ends early comes from the lower left and has OOM marks above: its lower right is free, unless
            # that is the axis
            beside = -9 if height > 0.06 * top else 9
            at = {"xytext": (8, 0 if k == ks[-1] else beside), "textcoords": "offset points", "va": "center"}
            look = {"color": colour, "fontweight": "bold", "fontsize": style.SMALL_PT + 0.5, "zorder": 8}
            look["path_effects"] = style.HALO
            axes.annotate(text, (k, height), **look, **at)
    marks = oom_marks(runs, top)
    style.draw_oom_marks(axes, marks)
    near_left = marks and ks.index(min(marks)[0]) < len(ks) - 1 - ks.index(max(marks)[0])
    style.draw_budgets(axes, budgets(records), side="right" if near_left else "left")


def oom_marks(runs: pd.DataFrame, top: float) -> list[tuple[int, float, str]]:
    """(k, height, variant) of every run out of memory: at its budget, or at the top where it had none."""
    marks = []
    for variant in WITH_ONE_ROW:
        for row in runs[(runs["variant"] == variant) & (runs["status"] == "oom")].itertuples():
            height = min(row.budget_bytes / GIB if pd.notna(row.budget_bytes) else top, 0.92 * top)
            marks.append((row.k, height, variant))
    return marks


def step_time(records: list[dict]) -> Figure:
    """Median step time over k on two logarithmic axes, every timed step as a small dot."""
    records = compared(records)
    names = workloads(records)
    note = "Line: median of a run's steps. Dots: each of its steps. The first step of a run is left out of both. "
    counted = sum(lookup(record, "config.count_live_bytes") is True for record in records)
    note += f"Live tensor bytes, whose counting takes time, were counted in {counted} of the {len(records)} runs."
    figure = style.headed_figure("How long does one training step take?", records, 4.9, note=note)
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, (name, runs) in zip(panels, runs_by_workload(records).items()):
        style.measured_ks(axes, sorted(int(k) for k in runs["k"].unique()))
        axes.set_yscale("log")
        for variant in [name for name in COMPARED if name in set(runs["variant"])]:
            for record in compared(records, name):
                steps = lookup(record, "summary.step_time_s") or []
                if record["variant"] == variant and record["status"] == "ok":
                    at = {"s": 12, "color": style.variant_colour(variant), "alpha": 0.45, "linewidths": 0, "zorder": 3}
                    axes.scatter([record["k"]] * len(steps[1:]), steps[1:], **at)
            points = runs[(runs["variant"] == variant) & (runs["status"] == "ok")].dropna(subset="step_time_median_s")
            medians = points["step_time_median_s"].astype(float)
            axes.plot(points["k"].astype(float), medians, **style.variant_line(variant))
        low, high = axes.get_ylim()
        axes.set_ylim(low, 1.6 * high)
        style.draw_oom_marks(axes, [(k, 1.2 * high, variant) for k, _, variant in oom_marks(runs, 0)])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y")
        axes.set_title(name, loc="left")
        axes.set_xlabel("k")
        axes.set_ylabel("step time, s")
    drawn = {record["variant"] for record in records}
    style.variant_legend(figure, [name for name in COMPARED if name in drawn])
    return figure
