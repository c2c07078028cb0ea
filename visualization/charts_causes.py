"""Which change saves what: the patches one after another, and where the published 55% comes from."""

import math
import re
import textwrap
from itertools import pairwise

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from visualization import style
from visualization.combine_memory_data import GIB, lookup, runs_table
from visualization.comparison import (
    EXTRAPOLATED_FROM,
    baseline_peak,
    budgets,
    compared,
    extrapolated_peaks,
    extrapolation_note,
    reached_budgets,
)

SERIES, UNPATCHED = "string-level", "baseline"
ORIGIN, PUBLISHED = "origin", "as-published"
ORIGIN_VARIANTS = (UNPATCHED, f"{SERIES}@1", PUBLISHED)
ORIGIN_LABELS = {UNPATCHED: "baseline", f"{SERIES}@1": "string repetition only", PUBLISHED: "as published"}


def stage_of(variant: str) -> int | None:
    """0 for the unpatched tree, n for the first n patches, None for another variant."""
    match = re.fullmatch(rf"{SERIES}@(\d+)", variant)
    return 0 if variant == UNPATCHED else int(match[1]) if match else None


def ablation_records(records: list[dict]) -> tuple[list[dict], list[str]]:
    """The records of the ablation in patch order, at the largest k that all of them finished; or what it needs.

    The workload is the one with the most stages measured; every stage from 0 to the last must be there.
    """
    staged = [record for record in records if stage_of(record["variant"]) is not None]
    stages = {}
    for record in staged:
        if record["workload"] != ORIGIN and "@" in record["variant"]:
            stages.setdefault(record["workload"], set()).add(stage_of(record["variant"]))
    if not stages:
        return [], [f"<workload>/{SERIES}@<patch>_k<k>"]
    workload = max(sorted(stages), key=lambda name: len(stages[name]))
    wanted = range(max(stages[workload]) + 1)
    here = [record for record in staged if record["workload"] == workload]
    done = [r for r in here if r["status"] == "ok" and lookup(r, "summary.live_peak_bytes") is not None]
    for k in sorted({record["k"] for record in done}, reverse=True):
        at_k = {stage_of(record["variant"]): record for record in done if record["k"] == k}
        if all(stage in at_k for stage in wanted):
            return [at_k[stage] for stage in wanted], []
    # none complete: ask for what the k with the most stages lacks
    counts = {k: {stage_of(r["variant"]) for r in done if r["k"] == k} for k in {r["k"] for r in here}}
    k = max(sorted(counts), key=lambda name: len(counts[name]))
    lacking = [UNPATCHED if stage == 0 else f"{SERIES}@{stage}" for stage in wanted if stage not in counts[k]]
    return [], [f"{workload}/{variant}_k{k} (finished)" for variant in lacking]


def patch_label(record: dict, patch_names: dict[str, str]) -> str:
    """The patch's name: given, else recorded (env.tree.stage_name), else the variant's."""
    if record["variant"] == UNPATCHED:
        return "unpatched"
    recorded = record["env"]["tree"].get("stage_name")  # finished runs only, so there is a tree
    name = patch_names.get(record["variant"]) or recorded or record["variant"]
    return f"{stage_of(record['variant'])}. {name}"


def wrapped(text: str, width: int = 30) -> str:
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=False))


def ablation(records: list[dict], patch_names: dict[str, str]) -> Figure:
    """Left: live peak after each patch, with what it took away. Right: the bytes each patch saves, log scale."""
    peaks = [lookup(record, "summary.live_peak_bytes") for record in records]
    labels = [wrapped(patch_label(record, patch_names)) for record in records]
    workload, k = records[0]["workload"], records[0]["k"]
    prompt, completion = (runs_table(records)[f"{part}_tokens_per_row"].max() for part in ("prompt", "completion"))
    note = f"Workload {workload}, k = {k}, {prompt:,} prompt + {completion:,} completion tokens per row (the longest)"
    note += ". Each row has its patch and all before it; the pale part is what it took away."
    figure = style.headed_figure("What does each patch save?", records, 1.9 + 0.55 * len(records), note=note)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
    colour = style.variant_colour(SERIES)
    for i, peak in enumerate(peaks):
        shade = style.variant_colour(UNPATCHED) if i == 0 else colour
        left.barh(i, peak / GIB, 0.62, color=shade, zorder=3)
        reach = max(peaks[max(i - 1, 0)], peak)
        if i and peaks[i - 1] > peak:
            left.barh(i, (peaks[i - 1] - peak) / GIB, 0.62, left=peak / GIB, color=shade, alpha=0.22, zorder=2)
        left.text(reach / GIB, i, f" {style.three_digits(peak / GIB)}", va="center", fontsize=style.TEXT_PT)
    left.set_xlim(0, 1.12 * max(peaks) / GIB)
    left.set_yticks(range(len(peaks)), labels)
    left.set_ylim(len(peaks) - 0.5, -0.5)
    left.tick_params(axis="y", length=0)
    left.grid(axis="x")
    left.set_xlabel("live tensor bytes at the peak, GiB")
    savings_panel(right, [before - after for before, after in pairwise(peaks)], peaks[0], colour)
    return figure


def savings_panel(axes: Axes, saved: list[int], unpatched: int, colour: str) -> None:
    sizes = [abs(size) for size in saved if size]
    low = 2 ** (10 * math.floor(math.log2(min(sizes, default=1)) / 10))
    axes.set_xscale("log", base=2)
    axes.set_xlim(low / 2, 2**12 * max(sizes, default=1024))  # room for the labels at the right of the bars
    for i, size in enumerate(saved, start=1):
        if size == 0:
            axes.text(low / 2, i, " 0 B: saves nothing", va="center")
            continue
        fill = {"color": colour} if size > 0 else {"facecolor": "white", "edgecolor": colour, "hatch": "////"}
        axes.barh(i, abs(size) - low / 2, 0.62, left=low / 2, zorder=3, **fill)
        share = f"{size / unpatched:.1%}" if size / unpatched >= 0.001 else "<0.1%"
        text = f" {style.byte_size(size)} ({share})" if size > 0 else f" costs {style.byte_size(-size)}"
        axes.text(abs(size), i, text, va="center")
    units = [2**power for power in range(0, 50, 10) if low <= 2**power <= max(sizes, default=1024)]
    axes.xaxis.set_major_locator(FixedLocator(units))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(units, [style.byte_size(unit).replace(".00", "") for unit in units])
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("bytes saved by the patch alone, log scale\n(share of the unpatched peak)")


def origin_needs(records: list[dict]) -> list[str]:
    """The runs that the chart of the 55% lacks: it wants all three variants at every k that is there."""
    here = {(record["variant"], record["k"]) for record in records if record["workload"] == ORIGIN}
    ks = sorted({k for variant, k in here if variant in ORIGIN_VARIANTS}) or ["<k>"]
    return [f"{ORIGIN}/{name}_k{k}" for k in ks for name in ORIGIN_VARIANTS if (name, k) not in here]


def published_origin(records: list[dict]) -> Figure:
    """Live peak of the baseline, of string repetition alone and of the change as published, with the prompts' tokens.

    A run of the change as published has the status "error", since the harness fails a run whose prompts changed; its
    peak is drawn hatched.
    """
    baselines = runs_table(compared(records, ORIGIN, EXTRAPOLATED_FROM))
    fit = extrapolation_note(records, [ORIGIN])
    records = compared(records, ORIGIN, ORIGIN_VARIANTS)
    runs = runs_table(records)
    note = "Below each bar: prompt tokens per row that the step used (the longest row), and prompt tokens lost over "
    note += "all its rows. Above it: change against the baseline at the same k."
    note += f" * {fit}." if fit else ""
    figure = style.headed_figure("Where do the published 55% come from?", records, 5.4, note=note)
    axes = figure.subplots()
    ks = sorted(runs["k"].unique())
    limits = budgets(records)
    guesses = extrapolated_peaks(baselines, "live_peak_bytes")
    cut = {record["run"] for record in records if was_cut(record)}
    drawn = runs[(runs["status"] == "ok") | runs["run"].isin(cut)]
    heights = drawn["live_peak_bytes"].dropna().astype(float).tolist()
    guessed_gib = [peak / GIB for peak in guesses.values()]
    top = style.top_with_budget(1.1 * max(heights, default=GIB) / GIB, limits, reached_budgets(records), 1.22)
    top = style.top_with_extrapolation(top, guessed_gib)
    style.memory_axis(axes, top, "live tensor bytes at the peak, GiB")
    ticks = {}
    for row in runs.itertuples():
        x = ks.index(row.k) * (len(ORIGIN_VARIANTS) + 0.6) + ORIGIN_VARIANTS.index(row.variant)
        ticks[x] = origin_tick(row)
        colour = style.variant_colour(row.variant)
        if row.status == "oom":
            limit = row.budget_bytes if pd.notna(row.budget_bytes) else max(heights, default=GIB)
            style.draw_oom_bar(axes, x, 0.8, min(limit / GIB, top), colour)
            if row.variant == UNPATCHED and row.k in guesses:
                style.draw_extrapolated_bar(axes, x, 0.8, guesses[row.k] / GIB, colour)
        elif pd.isna(row.live_peak_bytes) or (row.status != "ok" and row.run not in cut):
            style.draw_unfinished(axes, x, "not measured" if row.status == "ok" else row.status)
        else:
            baseline, extrapolated = baseline_peak(baselines, "live_peak_bytes", row.k)
            text = style.three_digits(row.live_peak_bytes / GIB)
            if row.variant != UNPATCHED and baseline:
                change = signed_percent(row.live_peak_bytes / baseline - 1)
                text += f"\n{change}{'*' if extrapolated else ''}"
            origin_bar(axes, x, row.live_peak_bytes / GIB, text, colour, row.run in cut)
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=style.SMALL_PT)
    axes.tick_params(axis="x", length=0)
    for i, k in enumerate(ks):
        x = i * (len(ORIGIN_VARIANTS) + 0.6) + 1
        at = {"ha": "center", "va": "top", "fontweight": "bold", "transform": axes.get_xaxis_transform()}
        axes.text(x, -0.17, f"k = {k}", **at)
    style.draw_budgets(axes, limits)
    handles = [Patch(facecolor=style.variant_colour(v), label=ORIGIN_LABELS[v]) for v in ORIGIN_VARIANTS[:2]]
    look = {"facecolor": "white", "edgecolor": style.variant_colour(PUBLISHED), "hatch": "xxx"}
    handles.append(Patch(**look, label="as published: prompts cut (a failed run)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def origin_tick(row: tuple) -> str:
    used = "tokens\nnot recorded" if pd.isna(row.prompt_tokens_per_row) else f"{row.prompt_tokens_per_row:,} tokens"
    return used if pd.isna(row.prompt_tokens_lost) else f"{used}\n{row.prompt_tokens_lost:,} lost"


def signed_percent(change: float) -> str:
    text = f"{change:+.1%}".replace("-", "−")
    return "0.0%" if text in ("+0.0%", "−0.0%") else text


def was_cut(record: dict) -> bool:
    """Whether the run of the change as published made all its steps and failed for nothing but the prompts it cut."""
    steps = lookup(record, "summary.step_time_s") or []
    cut = record["variant"] == PUBLISHED and bool(lookup(record, "tokens.prompts_changed"))
    return cut and record["status"] == "error" and len(steps) == record["config"]["steps"]


def origin_bar(axes: Axes, x: float, height: float, text: str, colour: str, cut: bool) -> None:
    look = {"facecolor": "white", "edgecolor": colour, "hatch": "xxx", "gid": "prompts cut"}
    axes.bar(x, height, 0.8, zorder=2, **(look if cut else {"color": colour}))
    text += "\nprompts cut" if cut else ""
    style.value_label(axes, x, height, text, fontsize=style.TEXT_PT - 0.5)
