"""The time line of one simulated step: live bytes by category, stacked, with its phases and the device's limit."""

from pathlib import Path

from lowmem.plan_memory import CATEGORIES
from lowmem.plan_step import StepMemory

# Okabe and Ito's palette
COLOURS = {
    "weights": "#999999",
    "gradients": "#E69F00",
    "optimizer": "#CC79A7",
    "activations": "#56B4E9",
    "logits": "#D55E00",
    "cache": "#009E73",
}


def draw_step(step: StepMemory, title: str, path: str | Path, device_bytes: int | None = None) -> None:
    """Writes a PNG. The horizontal axis is the order of operators, not time: a simulation has no clock."""
    from matplotlib.figure import Figure

    line = step.timeline
    start = max(
        (i for i in range(1, len(line)) if line[i][0] != "optimizer" and line[i - 1][0] == "optimizer"), default=0
    )
    first = next((i for i in range(len(line)) if i and line[i - 1][0] == "optimizer" and line[i][0] != "optimizer"), 0)
    line = line[first:start] if start > first + 1 else line[first:]  # the second step: the state exists
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots()
    shown = [name for name in CATEGORIES if any(categories.get(name) for _, categories in line)]
    heights = [[categories.get(name, 0) / 2**30 for _, categories in line] for name in shown]
    axes.stackplot(range(len(line)), heights, labels=shown, colors=[COLOURS[name] for name in shown], step="post")
    if "logits" in shown:  # they live for a few operators of thousands: no area that could be seen
        row = shown.index("logits")
        points = [i for i, height in enumerate(heights[row]) if height]
        bottoms = [sum(height[i] for height in heights[:row]) for i in points]
        tops = [bottom + heights[row][i] for bottom, i in zip(bottoms, points)]
        axes.vlines([i + 0.5 for i in points], bottoms, tops, color=COLOURS["logits"], linewidth=2)
    totals = [sum(categories.values()) / 2**30 for _, categories in line]
    top, at = max(totals), totals.index(max(totals))
    largest = sorted(line[at][1].items(), key=lambda item: -item[1])[:3]
    parts = ", ".join(f"{name} {held / 2**30:.2f}" for name, held in largest)
    axes.plot(at + 0.5, top, marker="v", markersize=6, color="black", clip_on=False, zorder=4)
    side = "right" if at > len(line) / 2 else "left"
    axes.annotate(
        f"{top:.2f} GiB: {parts}",
        (at + 0.5, top),
        xytext=(-8 if side == "right" else 8, 3),
        textcoords="offset points",
        ha=side,
        fontsize=9,
    )
    if device_bytes and device_bytes / 2**30 <= 2.5 * top:
        top = max(top, device_bytes / 2**30)
        axes.axhline(device_bytes / 2**30, color="#B00020", linestyle="--", linewidth=1.1)
        axes.text(
            0.005,
            device_bytes / 2**30,
            f"device {device_bytes / 2**30:g} GiB",
            color="#B00020",
            va="bottom",
            transform=axes.get_yaxis_transform(),
        )
    axes.set_ylim(0, 1.15 * top)
    axes.set_xlim(0, max(len(line) - 1, 1))
    begin = 0
    for i in range(1, len(line) + 1):
        if i == len(line) or line[i][0] != line[begin][0]:
            if begin:
                axes.axvline(begin, color="#666666", linewidth=0.6, linestyle=":", zorder=0)
            if i - begin > 0.06 * len(line) and line[begin][0] != "other":
                axes.text((begin + i) / 2, 1.1 * top, line[begin][0], ha="center", va="center", fontsize=9)
            begin = i
    axes.set_ylabel("live tensors, GiB")
    axes.set_xlabel("operators of one step, in order (points where memory moved by 1 MiB)")
    axes.set_xticks([])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{title}: {step.peak_bytes / 2**30:.2f} GiB in {step.peak_phase}, simulated", loc="left", fontsize=12
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})
