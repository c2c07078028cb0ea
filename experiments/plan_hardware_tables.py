"""The guideline's hardware tables (T5-small to mT5-XL on 24 GB) made again by the planner, beside the guideline's
figures.

    python experiments/plan_hardware_tables.py         # writes results/planner/hardware.json and hardware.md

The guideline names batch sizes and an expected use, and neither lengths nor precision: 512 + 128 tokens are taken
here, float32 with AdamW, and beside it bfloat16 with recomputed activations. Every peak and every largest batch is
simulated in full; lines through small batches and few layers propose the batch (`line_bytes` is what they say at the
guideline's batch). Nothing of this was run on a card.
"""

import functools
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from lowmem.devices import device_bytes  # noqa: E402
from lowmem.plan_config import PlanConfig  # noqa: E402
from lowmem.plan_models import hidden_layers, load_config, with_layers  # noqa: E402
from lowmem.plan_search import line, phase_bytes  # noqa: E402
from lowmem.plan_step import simulate  # noqa: E402
from lowmem.plan_verdict import CUDA, FITS, judge  # noqa: E402
from memory_samples import write_atomically  # noqa: E402

GIB = 2**30
LARGEST = 256  # batches that are looked at
INPUT_TOKENS, TARGET_TOKENS = 512, 128
# device, model, the guideline's training batch and expected use in GB
GUIDELINE = [
    ("RTX 3090", "t5-small", 32, 16),
    ("RTX 3090", "t5-base", 20, 20),
    ("RTX 3090", "t5-large", 12, 18),
    ("RTX 3090", "mt5-xl", 8, 22),
    ("RTX 4090", "t5-base", 24, 20),
    ("RTX 4090", "t5-large", 16, 19),
    ("RTX 4090", "mt5-xl", 12, 20),
]
SETTINGS = {
    "float32": {"dtype": "float32"},
    "bfloat16, recomputed": {"dtype": "bfloat16", "gradient_checkpointing": True},
}


def plan(model: str, batch: int, **settings) -> PlanConfig:
    lengths = {"prompt_tokens": INPUT_TOKENS, "response_tokens": TARGET_TOKENS}
    return PlanConfig(model=model, method="sft", prompts_per_step=batch, **lengths, **settings)


def phases_by_batch(model: str, settings: dict):
    """batch -> bytes by phase, on lines through batches 2 and 4 and layers 2 and 4 of each phase."""
    config = load_config(model)
    depth = hidden_layers(config)
    points = {}
    for batch in (2, 4):
        shallow = [
            phase_bytes(simulate(plan(model, batch, **settings), with_layers(config, layers), cuda=True))
            for layers in (2, 4)
        ]
        points[batch] = {p: shallow[0][p] + (shallow[1][p] - shallow[0][p]) * (depth - 2) / 2 for p in shallow[0]}
    return line(2, points[2], 4, points[4])


@functools.cache
def largest_batch(model: str, name: str, limit: int, guess: int) -> int:
    """The largest batch up to LARGEST that fits, by full simulations around the line's guess."""

    def fits(batch: int) -> bool:
        peak = simulate(plan(model, batch, **SETTINGS[name]), cuda=True).peak_bytes
        return judge(peak, limit, CUDA).verdict == FITS

    while guess and not fits(guess):
        guess -= 1
    while guess < LARGEST and fits(guess + 1):
        guess += 1
    return guess


def rows() -> list[dict]:
    peaks = {
        (model, name): phases_by_batch(model, settings)
        for model in dict.fromkeys(row[1] for row in GUIDELINE)
        for name, settings in SETTINGS.items()
    }
    table = []
    for device, model, batch, expected in GUIDELINE:
        row = {"device": device, "model": model, "batch": batch, "guideline_gb": expected}
        hidden, limit = load_config(model).hidden_size, device_bytes(device)
        for name, settings in SETTINGS.items():
            step = simulate(plan(model, batch, **settings), cuda=True)
            width = 4 if settings["dtype"] == "float32" else 2
            peak = peaks[model, name]
            fitting = [b for b in range(1, LARGEST + 1) if judge(peak(b), limit, CUDA).verdict == FITS]
            row["parameters"] = step.parameters
            row[name] = {
                "peak_bytes": step.peak_bytes,
                "line_bytes": peak(batch),
                "rule_bytes": int(step.parameters * width * 3.5 + batch * (INPUT_TOKENS + TARGET_TOKENS) * hidden * 4),
                "verdict": judge(step.peak_bytes, limit, CUDA).verdict,
                "largest_batch": largest_batch(model, name, limit, max(fitting, default=0)),
            }
        print(json.dumps(row), flush=True)
        table.append(row)
    return table


def markdown(table: list[dict]) -> str:
    errors = [abs(row[name]["line_bytes"] / row[name]["peak_bytes"] - 1) for row in table for name in SETTINGS]
    lengths = f"{INPUT_TOKENS} + {TARGET_TOKENS}"
    lines = [
        f"Peaks of one SFT step, {lengths} tokens, AdamW, kernels of CUDA, GiB of live tensors: simulated in full",
        'at the guideline\'s batch. "Guideline" is its expected use in GB, "rule" its formula. Lines through small',
        f"batches and few layers (at most {max(errors):.2%} from the full ones) propose the largest batch that fits,",
        "full simulations confirm it and refute the next.",
        "Not run on a card.",
        "",
        "| device | model | batch | guideline | "
        + " | ".join(f"{name}: rule | simulated | verdict | largest batch" for name in SETTINGS)
        + " |",
        "|" + "---|" * (4 + 4 * len(SETTINGS)),
    ]
    for row in table:
        cells = [row["device"], row["model"], str(row["batch"]), f"~{row['guideline_gb']}"]
        for name in SETTINGS:
            found = row[name]
            cells += [f"{found['rule_bytes'] / GIB:.1f}", f"{found['peak_bytes'] / GIB:.1f}", found["verdict"]]
            largest = found["largest_batch"]
            cells.append(f"{LARGEST} or more" if largest == LARGEST else str(largest or "none"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    folder = ROOT / "results" / "planner"
    folder.mkdir(parents=True, exist_ok=True)
    table = rows()
    write_atomically(folder / "hardware.json", json.dumps(table, indent=1) + "\n")
    write_atomically(folder / "hardware.md", markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
