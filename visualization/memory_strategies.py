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
    "ddp": ("DDP", "#000000", "o"),
    "zero2": ("ZeRO-2 with offload", "#0072B2", "s"),
    "split": ("split sequences", "#009E73", "^"),
    "split-zero2": ("split sequences and ZeRO-2", "#D55E00", "D"),
}
NOTES = """
- Peaks: live bytes of one process, the largest of the processes, in MiB. On a CPU they hold what an offloading engine
  keeps on the host as well, and DeepSpeed's flat buffers.
- Gradients, AdamW: bytes that stay in one process; with ZeRO-2 they are on the host.
- Activations: what the forward of training adds to what is live between training steps. On a CPU a split attention
  pads the queries of the last process, which an accelerator does not; gathered keys and values are in it.
- Work: floating-point operations of matrix products of all processes together, rollout included, against the run with
  no strategy. Attention calls: of one process, in all steps; those of a recomputation are among them.
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


def table(runs: dict[str, list[dict]]) -> pd.DataFrame:
    """One row per run, sizes in MiB.

    Raises:
        ValueError: if the run that work is compared with, or one that knows the size of the gradients, is missing.
    """
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
        row["activations"] = max(activation_bytes(record, full[0]) for record in records) / MIB
        row["work"] = sum(record["memory"]["product_flops"] for record in records) / work
        row["attention_calls"] = max(record["memory"]["attention_calls"] for record in records)
        row["place"] = (row["processes"], list(STRATEGIES).index(strategy))
        rows.append(row)
    return pd.DataFrame(rows).sort_values("place").drop(columns="place").reset_index(drop=True)


def markdown(frame: pd.DataFrame, runs: dict[str, list[dict]]) -> str:
    records = [record for records in runs.values() for record in records]
    tokens, config = records[0]["tokens"], records[0]["config"]
    lines = [
        "# Memory strategies",
        "",
        f"{config['prompt_tokens']} + {max(tokens['completion_tokens_per_row'])} tokens per row, {config['rloo_k']} "
        f"rows per step, {config['rows_per_micro_batch']} at once.",
        style.provenance(records),
        "",
        "| processes | strategy | peak: generate | train forward | train backward | optimizer | gradients | AdamW | "
        "activations | work | attention calls |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in frame.itertuples():
        sizes = (row.generate, row.train_forward, row.train_backward, row.optimizer, row.gradients, row.adamw)
        cells = [f"{size:,.0f}" for size in (*sizes, row.activations)]
        lines.append(
            f"| {row.processes} | {row.strategy} | {' | '.join(cells)} | {row.work:.2f} | {row.attention_calls} |"
        )
    return "\n".join(lines) + "\n" + NOTES


def chart(runs: dict[str, list[dict]]):
    """What stays in a process and what training adds, against the number of processes."""
    records = [record for records in runs.values() for record in records]
    note = "Live bytes of one process; one row of every pool of processes at once. Dotted: 1/N of the first point."
    figure = style.headed_figure("What one process holds, against the number of processes", records, 4.6, note)
    frame = table(runs)
    frame["strategy"] = frame["strategy"].replace(STRATEGIES["none"][0], STRATEGIES["ddp"][0])
    frame["states"] = frame["gradients"] + frame["adamw"]
    panels = (
        ("states", "gradients and AdamW's state", ("ddp", "zero2")),
        ("activations", "activations of the training forward", ("ddp", "split")),
    )
    for axes, (column, title, names) in zip(figure.subplots(1, 2), panels, strict=True):
        for name in names:
            words, colour, marker = STRATEGIES[name]
            line = frame[frame["strategy"].isin([words] + [STRATEGIES["ddp"][0]] * (name == "split"))]
            line = line[(line["strategy"] == words) | (line["processes"] == 1)].sort_values("processes")
            axes.plot(line["processes"], line[column], color=colour, marker=marker, linewidth=2, label=words)
            if name != "ddp":
                first = line.iloc[0]
                shares = [first[column] * first["processes"] / n for n in line["processes"]]
                axes.plot(line["processes"], shares, color=style.MUTED, linestyle=":", linewidth=1, zorder=1)
            for point in line.itertuples():
                if name == "ddp" or point.processes > 1:
                    at = (point.processes, getattr(point, column))
                    look = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center", "color": colour}
                    text = f"{getattr(point, column):,.0f}"
                    axes.annotate(text, at, **look, fontsize=style.SMALL_PT, path_effects=style.HALO)
        axes.set_title(title)
        axes.set_xticks(sorted(frame["processes"].unique()))
        axes.set_xlabel("processes N")
        axes.set_ylabel("MiB per process")
        axes.set_ylim(0, 1.18 * frame[column].max())
        axes.grid(axis="y")
        axes.legend(loc="lower left")
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
