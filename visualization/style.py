"""How every chart looks: a colour per variant, the header that lets a picture stand alone, the marks for a budget and
for a run that did not finish, and saving."""

import math
import textwrap
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, NullLocator

from visualization.combine_memory_data import lookup, model_words, write_atomically
from visualization.comparison import ONE_ROW

# Okabe and Ito's palette: distinct for every common form of colour blindness
COLOURS = {
    "baseline": "#D55E00",
    "upstream": "#56B4E9",
    "string-level": "#009E73",
    "shared-prefix": "#0072B2",
    "as-published": "#CC79A7",
}
MARKERS = {"baseline": "o", "upstream": "s", "string-level": "^", "shared-prefix": "D"}
# Paul Tol's pale scheme, made for backgrounds
PHASE_COLOURS = {
    "generate": "#BBCCEE",
    "score": "#EEEEBB",
    "train_forward": "#CCDDAA",
    "train_backward": "#FFCCCC",
    "optimizer": "#CCCCCC",
}
ALARM = "#B00020"  # out of memory
MUTED = "#555555"
WIDTH_IN = 10.0  # 1,500 pixels at DPI, so a README shows it at half size and 10 pt stays readable
DPI = 150
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps a text readable across a line behind it
TITLE_PT, TEXT_PT, SMALL_PT = 15, 10, 8.5

matplotlib.rcParams.update(
    {
        "font.size": TEXT_PT,
        "axes.titlesize": TEXT_PT + 1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "#DDDDDD",
        "grid.linewidth": 0.6,
        "hatch.linewidth": 0.8,
        "legend.frameon": False,
    }
)


def three_digits(value: float) -> str:
    """Three significant digits, without an exponent and with at most four decimals."""
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(max(decimals, 0), 4)}f}"


def byte_size(size: float) -> str:
    """1536 -> "1.50 KiB"."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= scale:
            return f"{three_digits(size / scale)} {unit}"
    return f"{size:.0f} B"


def variant_colour(variant: str) -> str:
    """The colour of a variant; a stage of its series (`string-level@3`) and its run row by row share it."""
    return COLOURS[variant.removesuffix(ONE_ROW).partition("@")[0]]


def variant_line(variant: str) -> dict:
    """How the variant's line over k looks; row by row it is thin and dotted."""
    if variant.endswith(ONE_ROW):
        thin = {"linewidth": 1.1, "linestyle": ":", "marker": ".", "zorder": 3}
        return {"color": variant_colour(variant), **thin}
    return {"color": variant_colour(variant), "linewidth": 2, "marker": MARKERS[variant], "zorder": 4}


def commit_of(record: dict) -> str | None:
    commit = lookup(record, "env.repo_commit")
    return commit and f"commit {commit[:10]}" + ("+dirty" if record["env"]["repo_dirty"] else "")


def some(values: set[str | None], what: str) -> str:
    """Up to three distinct values, else how many there are."""
    known = sorted(value for value in values if value)
    return f"{len(known)} {what}s" if len(known) > 3 else ", ".join(known) or f"{what} not recorded"


def provenance(records: list[dict]) -> str:
    """Model, device, number of runs, dates and commit of the runs that a picture shows."""
    dates = sorted({record["started_at"][:10] for record in records})
    return " · ".join(
        [
            some({model_words(record) for record in records}, "model"),
            some({lookup(record, "env.device") for record in records}, "device"),
            f"n = {len(records)} run{'s' * (len(records) != 1)}",
            dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
            some({commit_of(record) for record in records}, "commit"),
        ]
    )


def headed_figure(question: str, records: list[dict], height_in: float, note: str = "", alarm: str = "") -> Figure:
    """An empty figure under its question, an alarm if any, the provenance of its runs and a note on how to read it."""
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    lines = [
        (alarm, ALARM, TEXT_PT + 1, "bold", 110),
        (provenance(records) if records else "", MUTED, SMALL_PT, "normal", 146),
    ]
    lines.append((note, MUTED, SMALL_PT, "normal", 146))
    down_in = 0.12
    figure.text(0.012, 1 - down_in / height_in, question, fontsize=TITLE_PT, fontweight="bold", va="top")
    down_in += 0.33
    for text, colour, size, weight, width in lines:
        for line in textwrap.wrap(text, width):
            at = {"x": 0.012, "y": 1 - down_in / height_in}
            figure.text(**at, s=line, fontsize=size, color=colour, fontweight=weight, va="top")
            down_in += size * 1.45 / 72
    figure.get_layout_engine().set(rect=(0.005, 0, 0.99, 1 - (down_in + 0.08) / height_in), h_pad=0.06, w_pad=0.06)
    return figure


def memory_axis(axes: Axes, top_gib: float, label: str) -> None:
    axes.set_ylim(0, top_gib)
    axes.set_ylabel(label)
    axes.grid(axis="y")


def measured_ks(axes: Axes, ks: list[int]) -> None:
    """A logarithmic k axis with ticks at the measured values only."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.set_xlim(min(ks) / 1.25, max(ks) * 1.25)


def top_with_budget(highest_gib: float, budgets_gib: list[float], reached_gib: list[float], headroom: float) -> float:
    """The upper end of a memory axis: above what is drawn, above every budget that a run reached (it was out of memory
    there) and above any other that would not flatten the rest."""
    near = [budget for budget in budgets_gib if budget <= 2.5 * highest_gib]
    return max([highest_gib, *near, *reached_gib, 1e-3]) * headroom


def top_with_extrapolation(top: float, extrapolated_gib: list[float]) -> float:
    """`top` with room for extrapolated bars, which are cut where they would flatten what was measured."""
    return max(top, min(1.3 * max(extrapolated_gib), 1.55 * top)) if extrapolated_gib else top


def value_label(axes: Axes, x: float, y: float, text: str, **look) -> None:
    """A number on top of its bar."""
    look = {"ha": "center", "va": "bottom", "fontsize": SMALL_PT, "zorder": 6, "linespacing": 1.05} | look
    axes.text(x, y, text, path_effects=HALO, **look)


def draw_budgets(axes: Axes, budgets_gib: list[float], labelled: bool = True, side: str = "left") -> None:
    """Each budget as a dashed line, labelled at its `side` end; one beyond the axis as a line of text. Set the axis
    first."""
    top = axes.get_ylim()[1]
    x = 0.008 if side == "left" else 0.992
    look = {"fontsize": SMALL_PT, "color": ALARM, "ha": side, "transform": axes.get_yaxis_transform()}
    for budget in budgets_gib:
        if budget <= top:
            axes.axhline(budget, color=ALARM, linestyle="--", linewidth=1.1, zorder=3)
            if labelled:
                value_label(axes, x, budget + 0.015 * top, f"budget {budget:g} GiB", **look)
        elif labelled:
            value_label(axes, x, 0.98 * top, f"budget {budget:g} GiB, above this axis", **(look | {"va": "top"}))


def draw_oom_bar(axes: Axes, x: float, width: float, height: float, colour: str) -> None:
    """A hatched hollow bar up to the budget, crossed and named: the run asked for more than this."""
    axes.bar(x, height, width, facecolor="white", edgecolor=colour, hatch="////", linewidth=1.2, zorder=2, gid="oom")
    axes.plot(x, height, marker="X", markersize=8, color=ALARM, markeredgecolor="white", zorder=7, clip_on=False)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 1.2}
    look = {"color": ALARM, "fontweight": "bold", "rotation": 90, "ha": "center", "zorder": 6}
    if height > 0.3 * axes.get_ylim()[1]:
        axes.text(x, height / 2, "OOM", va="center", bbox=box, **look)
    else:
        axes.annotate("OOM", (x, height), xytext=(0, 7), textcoords="offset points", va="bottom", **look)


def draw_extrapolated_bar(axes: Axes, x: float, width: float, height: float, colour: str) -> None:
    """A hollow dotted bar, named: nothing was measured here. One that leaves the axis is cut and has an arrow."""
    axes.bar(x, height, width, facecolor="none", edgecolor=colour, linestyle=":", linewidth=1.6, zorder=4)
    top = axes.get_ylim()[1]
    cut = height > 0.86 * top  # no room for the label above it
    text = f"{'↑ ' if height > top else ''}{three_digits(height)}*\nextrapolated"
    value_label(axes, x, 0.995 * top if cut else height, text, va="top" if cut else "bottom", color=colour)


def draw_unfinished(axes: Axes, x: float, status: str) -> None:
    """A run without a value: a cross on the axis and the word for its outcome."""
    axes.plot(x, 0, marker="x", markersize=7, color=MUTED, zorder=7, clip_on=False)
    value_label(axes, x, 0, f"   {status}", rotation=90, color=MUTED)


def draw_oom_marks(axes: Axes, marks: list[tuple[int, float, str]]) -> None:
    """Crosses at (k, height) in the variant's colour, side by side where they meet, one "OOM" over each heap.

    The cross of a variant row by row is hollow.
    """
    for k, height in sorted({mark[:2] for mark in marks}):
        variants = [variant for *place, variant in marks if place == [k, height]]
        for i, variant in enumerate(variants):
            x = k * 2 ** (0.13 * (i - (len(variants) - 1) / 2))  # the axis is logarithmic
            colour = variant_colour(variant)
            fill = {"color": "white", "markeredgecolor": colour} if variant.endswith(ONE_ROW) else {"color": colour}
            look = {"marker": "X", "markersize": 10, "markeredgecolor": ALARM} | fill
            axes.plot(x, height, zorder=7, clip_on=False, **look)
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate("OOM", (k, height), color=ALARM, fontweight="bold", fontsize=SMALL_PT, **above)


def variant_legend(figure: Figure, variants: list[str], extra: list[Patch] = ()) -> None:
    handles = [
        Line2D([], [], label=name, **variant_line(name))
        if name.endswith(ONE_ROW)
        else Patch(facecolor=variant_colour(name), label=name)
        for name in variants
    ]
    figure.legend(handles=[*handles, *extra], loc="outside lower center", ncols=6)


def save(figure: Figure, path: Path) -> None:
    """Writes the PNG so that a reader never sees half of it; the same figure gives the same bytes."""
    metadata = {"Software": None}
    write_atomically(path, lambda target: figure.savefig(target, dpi=DPI, format="png", metadata=metadata))
