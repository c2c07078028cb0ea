"""What the shared prefix saves, as a chart: training peaks over k, and time saved beside the token ratio."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from visualization import style
from visualization.combine_memory_data import GIB

WAY_COLOURS = {"all rows": "#D55E00", "row by row": "#56B4E9", "shared": "#0072B2"}
WAY_MARKERS = {"all rows": "o", "row by row": "s", "shared": "D"}
PHASES = {"step": "whole step", "generate": "generation", "score": "scoring", "train": "training"}
PHASE_COLOURS = {"step": "#0072B2", "generate": "#BBCCEE", "score": "#EEEEBB", "train": "#CCDDAA"}


def shared_prefix(peaks: pd.DataFrame, times: pd.DataFrame) -> Figure:
    """Above: a panel of training peaks per workload. Below: times saved at the largest measured k of each workload."""
    names = [name for name in peaks["workload"].unique() if name.startswith("layers_")]
    devices = ", ".join(sorted(set(times["device"])))
    note = (
        "Above: live tensor bytes of one training forward and backward, weights and gradients included, 57 million "
        "parameters, the same LM head in all ways; dashed: gradient checkpointing. Below: time of upstream@1 over "
        f"ours, both trainers in turn on {devices}; line: token ratio k (P + R) / (P + k R)."
    )
    figure = style.headed_figure("What does it save to compute every prompt once?", [], 7.6, note=note)
    grid = figure.add_gridspec(2, len(names))
    for column, name in enumerate(names):
        peaks_panel(figure.add_subplot(grid[0, column]), peaks[peaks["workload"] == name])
    times_panel(figure.add_subplot(grid[1, :]), times)
    handles = [Line2D([], [], color=c, marker=WAY_MARKERS[w], label=w, linewidth=2) for w, c in WAY_COLOURS.items()]
    handles += [Patch(facecolor=PHASE_COLOURS[phase], label=words) for phase, words in PHASES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=7)
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
    shown = times[(times["peer"] == "upstream@1") & ~times["checkpointing"]].reset_index(drop=True)
    order = ["prompt_tokens", "completion_tokens", "workload", "k"]
    shown = shown.sort_values(order, ascending=[False, True, True, True])
    width = 0.8 / len(PHASES)
    for place, row in enumerate(shown.itertuples()):
        for i, phase in enumerate(PHASES):
            x, value = place + (i - (len(PHASES) - 1) / 2) * width, getattr(row, phase)
            axes.bar(x, value, width * 0.92, color=PHASE_COLOURS[phase], zorder=2)
            style.value_label(axes, x, value, f"{value:.1f}", fontsize=7)
        axes.plot([place - 0.42, place + 0.42], [row.token_ratio] * 2, color=style.ALARM, linewidth=1.4, zorder=5)
    axes.axhline(1, color=style.MUTED, linewidth=0.8)
    words = [
        f"{'57M' if row.workload.startswith('layers_') else 'tiny'}, k = {row.k}\n"
        f"{row.prompt_tokens:,} + {row.completion_tokens:,}"
        for row in shown.itertuples()
    ]
    axes.set_xticks(range(len(shown)), words, fontsize=style.SMALL_PT)
    axes.set_ylabel("times less time")
    axes.grid(axis="y")
