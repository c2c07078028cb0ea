"""Draws docs/shared_prefix.png: the three stages of a shared-prefix step beside k plain rows.

python visualization/method_picture.py --out docs/shared_prefix.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, it still imports visualization.*

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from visualization import style

PROMPT, KEYS_VALUES, COMPLETION, GRADIENT = "#BBCCEE", "#FFE0A3", "#CCDDAA", "#B00020"
P, R, K = 6.0, 1.9, 4  # lengths on paper


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str, height: float = 0.62, **look) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="#333333", linewidth=0.9, **look))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple, end: tuple, colour: str = "#333333", **look) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, linewidth=1.4, **look)
    )


def plain_rows(axes: Axes) -> None:
    axes.set_title("k plain rows: k (P + R) tokens, k graphs", loc="left")
    for i in range(K):
        y = 3.6 - i
        box(axes, 0, y, P, "prompt, P tokens", PROMPT)
        box(axes, P, y, R, f"completion {i + 1}", COMPLETION)
    axes.text(0, -0.05, "every row computes the prompt again, in generation,\nscoring, forward and backward", va="top")


def shared(axes: Axes) -> None:
    axes.set_title("shared prefix: P + k R tokens, one graph and one branch at a time", loc="left")
    axes.text(-0.1, 4.62, "1  forward once", fontsize=9.5, fontweight="bold")
    box(axes, 0, 3.75, P, "prompt without its last token, graph kept", PROMPT)
    box(axes, 0, 2.65, P, "keys and values of every layer, as leaves", KEYS_VALUES, height=0.5)
    arrow(axes, (1.2, 3.75), (1.2, 3.18))
    for i in range(K):
        y = 3.6 - i
        box(axes, P + 2.0, y, 0.55, "p", PROMPT)
        box(axes, P + 2.55, y, R, f"completion {i + 1}", COMPLETION)
        arrow(axes, (P, 2.98), (P + 1.96, y + 0.42))
        arrow(axes, (P + 1.96, y + 0.2), (P, 2.76), GRADIENT, linestyle=(0, (4, 2)))
    axes.text(P + 2.0, 4.62, "2  branches, one after the other:", fontsize=9.5, fontweight="bold")
    axes.text(P + 2.0, 4.32, "forward and backward, then freed", fontsize=9)
    arrow(axes, (4.8, 3.18), (4.8, 3.75), GRADIENT, linestyle=(0, (4, 2)))
    axes.text(-0.1, 1.9, "3  one backward through the prompt", fontsize=9.5, fontweight="bold", color=GRADIENT)
    words = "the branches' gradients of keys and values\nadd up in the leaves (red, dashed)"
    axes.text(-0.1, 1.0, words, fontsize=9, va="bottom")


def draw() -> Figure:
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[8.2, 10.8])
    plain_rows(left)
    shared(right)
    for axes, right_end in ((left, P + R + 0.1), (right, P + 2.6 + R)):
        axes.set_xlim(-0.15, right_end)
        axes.set_ylim(-0.9, 5.0)
        axes.axis("off")
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/shared_prefix.png"))
    style.save(draw(), parser.parse_args().out)
