"""Recorded runs of the memory strategies -> a table, and memory of one process against their number.

    python -m visualization.memory_strategies --runs results/memory/cpu-2core --out results/memory

Reads what experiments/run_memory_strategies.py wrote: one record per process.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from visualization import style
from visualization.combine_memory_data import write_atomically

MIB = 2**20
PHASES = ("generate", "score", "train_forward", "train_backward", "optimizer")
# file name without its number of processes -> (words, colour, marker); the order of the table
STRATEGIES = {
    "none": ("no strategy", "#000000", "o"),
    "ratio-half": ("half of the layers recomputed", None, None),
    "ratio-all": ("all layers recomputed", None, None),
    "selective-half": ("half of the layers, attention kept", None, None),
    "selective-all": ("all layers, attention kept", None, None),
    "oom-recovery": ("4 rows at once, out of memory, repeated in parts", None, None),
    "activations-offloaded": ("activations on the host", None, None),
    "ddp": ("DDP", "#000000", "o"),
    "zero2": ("ZeRO-2 with offload", "#0072B2", "s"),
    "split": ("split sequences", "#009E73", "^"),
    "split-zero2": ("split sequences and ZeRO-2", "#D55E00", "D"),
    "long": ("long sequences, chosen automatically", None, None),
}
NOTES = """
- Peaks: live bytes of one process, the largest of the processes, in MiB. On a CPU they hold what an offloading engine
  keeps on the host as well, and DeepSpeed's flat buffers.
- Gradients, AdamW: bytes that stay in one process; with ZeRO-2 they are on the host.
- Activations: what the forward of training adds to what is live between training steps, gathered keys and values
  included; of the process that holds most.
- Predicted: the largest peak of any phase by the planner, before the run.
- Work: floating-point operations of matrix products of all processes together, rollout included, against the run with
  no strategy. Attention calls: of one process, in all steps; those of a recomputation are among them, and a split
  attention is two calls on a CPU.
- Time is not compared: the processes share two cores.
"""


def read_runs(folder: Path) -> dict[str, list[dict]]:
    """Records by run, one per process.

    Raises:
        ValueError: if a process's record is missing or did not end ok.
    """
    runs = {}
    for path in sorted(folder.glob("*.json")):
        if ".rank" in path.name:
            continue
        first = json.loads(path.read_text())
        if first["status"] != "ok":
            raise ValueError(f"{path} ended as {first['status']}: {first['error']}")
        others = [path.with_suffix(f".rank{rank}.json") for rank in range(1, first["memory"]["num_processes"])]
        missing = [other.name for other in others if not other.exists()]
        if missing:
            raise ValueError(f"{path}: the records of other processes are missing: {missing}")
        runs[path.stem] = [first, *(json.loads(other.read_text()) for other in others)]
    if not runs:
        raise ValueError(f"no records in {folder}; make them with experiments/run_memory_strategies.py")
    return runs


def activation_bytes(record: dict, full_gradient_bytes: int) -> int:
    """What the forward of training adds to what is live when it begins."""
    peaks, config, memory = record["summary"]["live_peak_bytes_by_phase"], record["config"], record["memory"]
    before = peaks["other"]
    pools = memory["num_processes"] // int(memory["settings"]["sequence_parallelism"] or 1)
    rows = config["rloo_k"] * config["prompts_per_step"] // pools
    if rows == config["rows_per_micro_batch"] and memory["zero2_bytes"] is None:
        before -= full_gradient_bytes  # without accumulation there are none yet
    return peaks["train_forward"] - before


def peak_and_prediction(records: list[dict]) -> tuple[float, float | None]:
    """Largest peak of the processes and what was predicted for it, in MiB."""
    predicted = records[0]["memory"]["predicted_peak_bytes"]
    return max(r["summary"]["live_peak_bytes"] for r in records) / MIB, None if predicted is None else predicted / MIB


def long_table(runs: dict[str, list[dict]]) -> pd.DataFrame:
    """One row per run of long sequences: the choice, and the activations of the first and the last process, in MiB."""
    rows = []
    for name in sorted(name for name in runs if name.startswith("long_")):
        records = runs[name]
        held = [activation_bytes(record, 0) / MIB for record in records]
        row = {"processes": len(records), "chosen": records[0]["memory"]["strategies"]}
        row["peak"], row["predicted"] = peak_and_prediction(records)
        rows.append(row | {"first": held[0], "last": held[-1], "reason": records[0]["memory"]["reason"]})
    frame = pd.DataFrame(rows)
    whole = frame[frame["processes"] == 1]["first"].max() if rows else None  # nan without a run of one process
    for name in ("first", "last"):
        frame[f"{name}_share"] = frame[name] / whole if rows else None
    return frame


def table(runs: dict[str, list[dict]]) -> pd.DataFrame:
    """One row per run, sizes in MiB.

    Raises:
        ValueError: if the run that work is compared with, or one that knows the size of the gradients, is missing.
    """
    runs = {name: records for name, records in runs.items() if not name.startswith("long_")}
    parts = {name: [record["memory"]["zero2_bytes"] for record in records] for name, records in runs.items()}
    full = [part["full_gradient_bytes"] for part in sum(parts.values(), []) if part]
    if "none_1" not in runs or not full:
        raise ValueError("the table needs the run none_1, and one with ZeRO-2")
    work = sum(record["memory"]["product_flops"] for record in runs["none_1"])
    rows = []
    for name, records in runs.items():
        strategy, _, processes = name.rpartition("_")
        row = {"strategy": STRATEGIES[strategy][0], "processes": int(processes)}
        for phase in PHASES:
            peaks = [record["summary"]["live_peak_bytes_by_phase"].get(phase, 0) for record in records]
            row[phase] = max(peaks) / MIB
        sharded = parts[name][0] is not None
        row["gradients"] = (max(p["gradient_bytes"] for p in parts[name]) if sharded else full[0]) / MIB
        row["adamw"] = (max(p["optimizer_bytes"] for p in parts[name]) if sharded else 2 * full[0]) / MIB
        held = max(activation_bytes(record, full[0]) for record in records) / MIB
        row["activations"] = None if strategy == "oom-recovery" else held  # of a failed attempt as well
        row["work"] = sum(record["memory"]["product_flops"] for record in records) / work
        row["peak"], row["predicted"] = peak_and_prediction(records)
        row["attention_calls"] = max(record["memory"]["attention_calls"] for record in records)
        row["place"] = (row["processes"], list(STRATEGIES).index(strategy))
        rows.append(row)
    return pd.DataFrame(rows).sort_values("place").drop(columns="place").reset_index(drop=True)


def markdown(frame: pd.DataFrame, runs: dict[str, list[dict]]) -> str:
    records = [record for name, found in runs.items() if not name.startswith("long_") for record in found]
    tokens, config = runs["none_1"][0]["tokens"], runs["none_1"][0]["config"]
    lines = [
        "# Memory strategies",
        "",
        f"{config['prompt_tokens']} + {max(tokens['completion_tokens_per_row'])} tokens per row, {config['rloo_k']} "
        f"rows per step, {config['rows_per_micro_batch']} at once.",
        style.provenance(records),
        "",
        "| processes | strategy | peak: generate | train forward | train backward | optimizer | gradients | AdamW | "
        "activations | predicted / peak | work | attention calls |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in frame.itertuples():
        sizes = (row.generate, row.train_forward, row.train_backward, row.optimizer, row.gradients, row.adamw)
        cells = ["–" if pd.isna(size) else f"{size:,.0f}" for size in (*sizes, row.activations)]
        cells.append("–" if pd.isna(row.predicted) else f"{row.predicted / row.peak:.2f}")
        lines.append(
            f"| {row.processes} | {row.strategy} | {' | '.join(cells)} | {row.work:.2f} | {row.attention_calls} |"
        )
    return "\n".join(lines) + "\n" + NOTES + long_markdown(runs)


def long_markdown(runs: dict[str, list[dict]]) -> str:
    records = [record for name, found in runs.items() if name.startswith("long_") for record in found]
    if not records:
        return ""
    config = records[0]["config"]
    lines = [
        "",
        "## Long sequences",
        "",
        f"{config['prompt_tokens']:,} + {max(records[0]['tokens']['completion_tokens_per_row'])} tokens per row, "
        f"{config['rloo_k']} rows per step, 1 at once; a Qwen3 with {config['num_hidden_layers']} layers of "
        f"{config['hidden_size']}. What to use was left to `auto_memory_strategy`.",
        style.provenance(records),
        "",
        "| processes | chosen | peak, MiB | predicted | activations: first process | last | of one process |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in long_table(runs).itertuples():
        sizes = " | ".join(f"{size:,.0f}" for size in (row.peak, row.predicted, row.first, row.last))
        share = "–" if pd.isna(row.first_share) else f"{row.first_share:.3f}, {row.last_share:.3f}"
        lines.append(f"| {row.processes} | {row.chosen} | {sizes} | {share} |")
    return "\n".join(lines) + "\n"


def chart(runs: dict[str, list[dict]]):
    """What stays in a process and what training adds, against the number of processes."""
    records = [record for records in runs.values() for record in records]
    note = "Live bytes of one process; one row of every pool of processes at once. Dotted: 1/N of the first point."
    figure = style.headed_figure("What one process holds, against the number of processes", records, 4.6, note)
    frame, long = table(runs), long_table(runs)
    frame["strategy"] = frame["strategy"].replace(STRATEGIES["none"][0], STRATEGIES["ddp"][0])
    frame["states"] = frame["gradients"] + frame["adamw"]
    tokens = runs["none_1"][0]["config"]["prompt_tokens"]
    panels = [
        (frame, "states", "gradients and AdamW's state", ("ddp", "zero2")),
        (frame, "activations", f"activations, {tokens:,} + 16 tokens", ("ddp", "split")),
    ]
    if "long_1" in runs:
        long["strategy"], long["activations"] = STRATEGIES["split"][0], long[["first", "last"]].max(axis=1)
        title = f"activations, {runs['long_1'][0]['config']['prompt_tokens']:,} + 100 tokens"
        panels.append((long, "activations", title, ("split",)))
    for axes, (data, column, title, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            words, colour, marker = STRATEGIES[name]
            line = data[(data["strategy"] == words) | (data["processes"] == 1)]
            line = line[line["strategy"].isin([words, STRATEGIES["ddp"][0]])].sort_values("processes")
            axes.plot(line["processes"], line[column], color=colour, marker=marker, linewidth=2, label=words)
            if name != "ddp":
                first = line.iloc[0]
                shares = [first[column] * first["processes"] / n for n in line["processes"]]
                axes.plot(line["processes"], shares, color=style.MUTED, linestyle=":", linewidth=1, zorder=1)
            for point in line.itertuples():
                if name == names[0] or point.processes > 1:
                    at = (point.processes, getattr(point, column))
                    look = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center", "color": colour}
                    text = f"{getattr(point, column):,.0f}"
                    axes.annotate(text, at, **look, fontsize=style.SMALL_PT, path_effects=style.HALO)
        axes.set_title(title)
        axes.set_xticks(sorted(data["processes"].unique()))
        axes.set_xlabel("processes N")
        axes.set_ylabel("MiB per process")
        axes.set_ylim(0, 1.4 * data[column].max())
        axes.grid(axis="y")
        axes.legend(loc="upper right")
    return figure


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="results/memory/cpu-2core", help="folder of the records")
    parser.add_argument("--out", default="results", help="folder of the table and the chart")
    args = parser.parse_args(argv)
    try:
        runs = read_runs(Path(args.runs))
    except ValueError as error:
        print(f"memory_strategies.py: {error}", file=sys.stderr)
        return 1
    out = Path(args.out)
    text = markdown(table(runs), runs)
    write_atomically(out / "memory_strategies.md", lambda path: path.write_text(text))
    style.save(chart(runs), out / "memory_per_process.png")
    print(f"{out / 'memory_strategies.md'}, {out / 'memory_per_process.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
