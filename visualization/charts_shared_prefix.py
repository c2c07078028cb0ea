"""What the shared prefix saves, as a chart: training peaks over k, and time saved beside the token ratio."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from visualization import style
from visualization.combine_memory_data import GIB
from visualization.comparison import ONE_ROW
from visualization.shared_prefix_table import preferred

WAY_COLOURS = {"all rows": "#D55E00", "row by row": "#56B4E9", "shared": "#0072B2", "shared, k branches": "#CC79A7"}
WAY_MARKERS = {"all rows": "o", "row by row": "s", "shared": "D", "shared, k branches": "v"}
PHASE_LOOKS = {
    "step": {"label": "whole step", "color": "#0072B2", "linewidth": 2},
    "generate": {"label": "generation", "color": "#AA3377", "linewidth": 1},
    "score": {"label": "scoring", "color": "#BBAA33", "linewidth": 1},
    "train": {"label": "training", "color": "#228833", "linewidth": 1},
}
WORK_COLOUR = PHASE_LOOKS["train"]["color"]
PEERS = ("upstream@1", f"upstream@1{ONE_ROW}")


def shared_prefix(peaks: pd.DataFrame, times: pd.DataFrame) -> Figure:
    """A column per workload: training peaks above, times saved below."""
    names = [name for name in peaks["workload"].unique() if name.startswith("layers_")]
    times = times[times["workload"].isin(names) & (times["branches"] == 1)]
    if not times.empty:
        times = times[times["machine"] == times["machine"].mode()[0]]  # the one with the most measurements
    machines = ", ".join(sorted(set(times["machine"])))
    note = (
        "57 million parameters. Above: live tensor bytes of one training forward and backward, weights and gradients "
        "included, the same LM head in all ways; dashed: gradient checkpointing. Below: time of TRL v1.16.0 with its "
        f"LM head on the completions over ours, whole optimizer steps in turn on {machines}; filled: all rows at "
        "once, hollow: one row per micro-batch; dashed: token ratio k (P + R) / (P + k R); dotted: ratio of the "
        "training's floating-point operations; *: with glibc's own allocator settings, page faults in it."
    )
    figure = style.headed_figure("What does it save to compute every prompt once?", [], 7.6, note=note)
    grid = figure.add_gridspec(2, len(names))
    for column, name in enumerate(names):
        peaks_panel(figure.add_subplot(grid[0, column]), peaks[peaks["workload"] == name])
        times_panel(figure.add_subplot(grid[1, column]), times[times["workload"] == name])
    handles = [Line2D([], [], color=c, marker=WAY_MARKERS[w], label=w, linewidth=2) for w, c in WAY_COLOURS.items()]
    handles += [Line2D([], [], **look) for look in PHASE_LOOKS.values()]
    handles.append(Line2D([], [], color=style.ALARM, linestyle=(0, (4, 2)), label="token ratio"))
    handles.append(Line2D([], [], color=WORK_COLOUR, linestyle=(0, (1, 2)), label="training: operations"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def peaks_panel(axes: Axes, peaks: pd.DataFrame) -> None:
    for (way, checkpointing), part in peaks.groupby(["way", "gradient_checkpointing"]):
        look = {"color": WAY_COLOURS[way], "marker": WAY_MARKERS[way], "markersize": 5}
        look |= {"linestyle": "--" if checkpointing else "-", "linewidth": 1.5 if checkpointing else 2}
        axes.plot(part["k"], part["peak_live_bytes"] / GIB, **look)
    axes.set_yscale("log")
    style.measured_ks(axes, sorted(int(k) for k in peaks["k"].unique()))
    axes.set_xlabel("k")
    axes.set_ylabel("training peak, GiB")
    axes.grid(axis="y")
    tokens = f"{peaks['prompt_tokens'].iloc[0]:,} + {peaks['completion_tokens'].iloc[0]:,} tokens"
    axes.set_title(tokens, loc="left")


def times_panel(axes: Axes, times: pd.DataFrame) -> None:
    """Times saved over k, a line for each peer: all rows at once as far as they were measured, and row by row."""
    shown = preferred(times[times["peer"].isin(PEERS) & ~times["checkpointing"]]).sort_values("k")
    if shown.empty:
        axes.set_axis_off()
        return
    by_k = shown.drop_duplicates("k")
    axes.plot(by_k["k"], by_k["token_ratio"], color=style.ALARM, linewidth=1.2, linestyle=(0, (4, 2)))
    axes.plot(by_k["k"], by_k["work_ratio"], color=WORK_COLOUR, linewidth=1.2, linestyle=(0, (1, 2)))
    for peer, part in shown.groupby("peer"):
        colour = PHASE_LOOKS["step"]["color"]
        fill, side = ("white", "top") if peer.endswith(ONE_ROW) else (colour, "bottom")
        for phase, look in PHASE_LOOKS.items():
            axes.plot(part["k"], part[phase], zorder=5 if phase == "step" else 3, **look)
        axes.plot(part["k"], part["step"], "o", color=colour, markerfacecolor=fill, zorder=6)
        for row in part.itertuples():
            text = f"{row.step:.1f}" + ("" if row.keeps_memory else "*")
            style.value_label(axes, row.k, row.step, text, fontsize=7.5, va=side)
    axes.axhline(1, color=style.MUTED, linewidth=0.8)
    style.measured_ks(axes, [int(k) for k in by_k["k"]])
    axes.set_ylim(0, None)
    axes.set_xlabel("k")
    axes.set_ylabel("times less time")
    axes.grid(axis="y")
