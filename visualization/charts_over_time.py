"""What happens during a run: memory over time, one small panel per run, and the reward over the steps of training."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from visualization import style
from visualization.combine_memory_data import GIB, RecordError, lookup, metrics_table, timeline_path
from visualization.comparison import COMPARED, budgets, compared, process_meter, reached_budgets
from visualization.smoothing import peak_preserving, trend

SAMPLES = {"rss_peak_bytes": "rss_bytes", "nvml_peak_bytes": "nvml_used_bytes"}
DRAWN_POINTS = 160  # per panel
TREND_SHARE = 12  # the rolling mean spans this fraction of a run
TREND_WARNING = "Trend only: smoothing hides peaks, do not read peak values."
LEARNING = "learning"
LEARNING_VARIANTS = ("baseline", "string-level")
REWARDS = ("objective/scores", "reward")  # what the reward function gave, in v0.20.0's words and in v1.16.0's


def load_timeline(record: dict) -> pd.DataFrame:
    """The samples of a run, its phase as text ("" between phases)."""
    path = timeline_path(record["path"])
    timeline = pd.read_csv(path, dtype={"phase": str}, keep_default_na=True)
    lacking = [name for name in ("t_s", *SAMPLES.values(), "phase") if name not in timeline]
    if lacking:
        raise RecordError(f"{path}: has no column {', '.join(lacking)}")
    return timeline.fillna({"phase": ""})


def individual_peak_preserving(records: list[dict], timelines: dict[str, pd.DataFrame], workload: str) -> Figure:
    """Memory over time with every peak kept; the recorded peak is marked where no sample reached it."""
    records = compared(records, workload)
    note = f"Workload {workload}: {process_meter(records)[1]}. Each drawn point is the largest sample of its window, "
    note += "so none of its peaks is lost. The short bar is the recorded peak, which may stand above every sample"
    if process_meter(records)[0] == "rss_peak_bytes":
        note += ": the kernel's high-water mark (VmHWM) misses nothing between two samples"
    note += "."
    figure = style.headed_figure("When does each run reach its peak?", records, panels_height(records), note)
    draw_panels(figure, records, timelines, exact=True)
    return figure


def individual_ultra_smooth(records: list[dict], timelines: dict[str, pd.DataFrame], workload: str) -> Figure:
    """The same panels as a rolling mean: the course of a run, not its peak."""
    records = compared(records, workload)
    note = f"Workload {workload}: rolling mean of {process_meter(records)[1]} over 1/{TREND_SHARE} of each run."
    question = "How does memory move during each run?"
    figure = style.headed_figure(question, records, panels_height(records), note, alarm=TREND_WARNING)
    draw_panels(figure, records, timelines, exact=False)
    return figure


def panels_height(records: list[dict]) -> float:
    return 2.2 + 1.75 * len({record["k"] for record in records})


def draw_panels(figure: Figure, records: list[dict], timelines: dict[str, pd.DataFrame], exact: bool) -> None:
    meter, _ = process_meter(records)
    ks = sorted({record["k"] for record in records})
    variants = [name for name in COMPARED if any(record["variant"] == name for record in records)]
    by_place = {(record["k"], record["variant"]): record for record in records}
    peaks = [lookup(record, f"summary.{meter}") for record in records]
    peaks += [timelines[record["run"]][SAMPLES[meter]].max() for record in records]
    highest = max((peak for peak in peaks if pd.notna(peak)), default=GIB) / GIB
    top = style.top_with_budget(highest, budgets(records), reached_budgets(records), 1.22)
    panels = figure.subplots(len(ks), len(variants), sharey=True, squeeze=False)
    for i, k in enumerate(ks):
        for j, variant in enumerate(variants):
            axes = panels[i, j]
            style.memory_axis(axes, top, f"k = {k}\nGiB" if j == 0 else "")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            if i == 0:
                axes.set_title(variant, color="black", fontweight="bold")
            if i == len(ks) - 1:
                axes.set_xlabel("time since start, s")
            if (k, variant) not in by_place:
                axes.text(0.5, 0.5, "no such run", ha="center", transform=axes.transAxes)
                axes.set_xticks([])
                continue
            record = by_place[k, variant]
            labelled = len(budgets(records)) > 1 or (i, j) == (0, 0)
            style.draw_budgets(axes, budgets([record]), labelled)
            draw_run(axes, record, timelines[record["run"]].set_index("t_s"), meter, exact)
    handles = [Patch(color=c, label=p) for p, c in style.PHASE_COLOURS.items()]
    if exact:
        handles.append(Line2D([], [], color="black", marker="_", markersize=14, linewidth=0, label="recorded peak"))
    if any(record["status"] == "oom" for record in records):
        mark = {"marker": "X", "color": style.ALARM, "markersize": 8, "linewidth": 0}
        handles.append(Line2D([], [], **mark, label="out of memory"))
    figure.legend(handles=handles, loc="outside lower center", ncols=7, columnspacing=1.2, handletextpad=0.5)


def draw_run(axes: Axes, record: dict, timeline: pd.DataFrame, meter: str, exact: bool) -> None:
    series = (timeline[SAMPLES[meter]] / GIB).dropna()
    if series.empty:
        axes.text(0.5, 0.5, f"no sample ({record['status']})", ha="center", transform=axes.transAxes)
        axes.set_xticks([])
        return
    shade_phases(axes, timeline["phase"])
    end = series.index[-1]
    axes.set_xlim(0, 1.06 * end)
    window = -(-len(series) // DRAWN_POINTS) if exact else max(3, len(series) // TREND_SHARE)
    drawn = peak_preserving(series, window) if exact else trend(series, window)
    colour = style.variant_colour(record["variant"])
    axes.plot(drawn.index, drawn, color=colour, linewidth=1.6, zorder=4)
    recorded = lookup(record, f"summary.{meter}")
    if exact and recorded is not None:
        at = series.idxmax()
        axes.plot(at, recorded / GIB, marker="_", markersize=16, color="black", markeredgewidth=1.4, zorder=5)
        style.value_label(axes, at, recorded / GIB + 0.02 * axes.get_ylim()[1], style.three_digits(recorded / GIB))
    if record["status"] == "oom":
        axes.plot(end, drawn.iloc[-1], marker="X", color=style.ALARM, markersize=9, zorder=8, clip_on=False)
        low = drawn.iloc[-1] < 0.5 * axes.get_ylim()[1]
        shift = {"xytext": (2, 8 if low else -8), "textcoords": "offset points", "va": "bottom" if low else "top"}
        look = {"color": style.ALARM, "fontweight": "bold", "ha": "right", "zorder": 8, "path_effects": style.HALO}
        axes.annotate("OOM", (end, drawn.iloc[-1]), **shift, **look)
    elif record["status"] != "ok":
        axes.text(0.97, 0.05, record["status"], ha="right", transform=axes.transAxes, color=style.MUTED)


def shade_phases(axes: Axes, phases: pd.Series) -> None:
    """A background span per stretch of equal phase, up to the sample that ends it."""
    starts = phases[phases != phases.shift()]
    ends = [*starts.index[1:], phases.index[-1]]
    for phase, colour in style.PHASE_COLOURS.items():
        spans = [(t, end - t) for (t, name), end in zip(starts.items(), ends) if name == phase]
        at = {"transform": axes.get_xaxis_transform(), "facecolors": colour, "linewidth": 0, "zorder": 0}
        axes.broken_barh(spans, (0, 1), **at)


def learning_needs(records: list[dict]) -> list[str]:
    """What the learning curves lack: a finished run of each variant."""
    done = {r["variant"] for r in records if r["workload"] == LEARNING and r["status"] == "ok"}
    return [f"{LEARNING}/{name}_k<k>_seed<s>" for name in LEARNING_VARIANTS if name not in done]


def rewards(records: list[dict]) -> pd.DataFrame:
    """Reward per run and step: columns variant, seed, step, value."""
    metrics = metrics_table(records)
    found = metrics[metrics["metric"].isin(REWARDS)]
    for record in records:
        if record["run"] not in set(found["run"]):
            raise RecordError(f"{record['path']}: its metrics have none of {', '.join(REWARDS)}")
    return found


def learning_curves(records: list[dict]) -> Figure:
    """Reward over the steps: mean over seeds, the band from the lowest to the highest seed, a thin line per seed.

    Baseline and string-level are expected to coincide, so ours is a thinner dashed line over a broad one.
    """
    records = [r for r in records if r["workload"] == LEARNING and r["status"] == "ok"]
    variants = [name for name in COMPARED if any(record["variant"] == name for record in records)]
    table = rewards(records)
    ks, seeds = sorted({record["k"] for record in records}), sorted({record["seed"] for record in records})
    note = f"k = {', '.join(map(str, ks))}; seeds {', '.join(map(str, seeds))}. Thick: mean over seeds. "
    note += "Band: lowest to highest seed. Thin: each seed."
    figure = style.headed_figure("Does the patched trainer learn the same?", records, 4.8, note=note)
    panels = figure.subplots(1, len(ks), sharey=True, squeeze=False)[0]
    looks = {name: {"linewidth": 3.4, "linestyle": "-"} for name in variants}
    looks |= {name: {"linewidth": 1.7, "linestyle": (0, (4, 2))} for name in ("string-level", "shared-prefix")}
    for axes, k in zip(panels, ks):
        for name in variants:
            mine = table[(table["variant"] == name) & (table["k"] == k)]
            curves = mine.pivot_table(index="step", columns="seed", values="value", aggfunc="mean").astype(float)
            colour = style.variant_colour(name)
            axes.fill_between(curves.index, curves.min(axis=1), curves.max(axis=1), color=colour, alpha=0.14, lw=0)
            thin = {"linewidth": 0.25 * looks[name]["linewidth"], "linestyle": looks[name]["linestyle"], "alpha": 0.55}
            axes.plot(curves.index, curves, color=colour, **thin)
            axes.plot(curves.index, curves.mean(axis=1), color=colour, **looks[name], zorder=5)
        axes.set_title(f"k = {k}", loc="left")
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
    panels[0].set_ylabel("reward")
    handles = []
    for name in variants:
        n = sum(record["variant"] == name for record in records)
        handles.append(Line2D([], [], color=style.variant_colour(name), **looks[name], label=f"{name} (n = {n})"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, handlelength=3)
    return figure
