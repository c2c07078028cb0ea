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
- Live bytes of one process, the largest of the processes: tensors that the host keeps by design are in them, because a
  CPU is both. "Kept on the host" (gradient part, float32 weights, AdamW's moments) is what an accelerator would not
  hold, and "device" is the peak of training without it.
- Work: floating-point operations of matrix products of all processes together, rollout included, against the run with
  no strategy. Attention calls: of one process, in all steps. Split sequences run the whole causal attention on a CPU
  for every part, so their products grow there; the accelerator's operator does not.
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


def bytes_on_host(record: dict) -> int:
    parts = record["memory"]["zero2_bytes"]
    return 0 if parts is None else parts["gradient_bytes"] + parts["master_bytes"] + parts["optimizer_bytes"]


def table(runs: dict[str, list[dict]]) -> pd.DataFrame:
    rows = []
    work = sum(record["memory"]["product_flops"] for record in runs["none_1"]) if "none_1" in runs else None
    for name, records in runs.items():
        strategy, _, processes = name.rpartition("_")
        row = {"strategy": STRATEGIES[strategy][0], "processes": int(processes)}
        for phase in PHASES:
            peaks = [record["summary"]["live_peak_bytes_by_phase"].get(phase, 0) for record in records]
            row[f"{phase.replace('optimizer', 'step')}_mib"] = max(peaks) / MIB
        row["kept_on_host_mib"] = max(map(bytes_on_host, records)) / MIB
        training = (max(r["summary"]["live_peak_bytes_by_phase"].get(p, 0) for p in PHASES[2:]) for r in records)
        row["device_mib"] = max(peak - bytes_on_host(r) for peak, r in zip(training, records)) / MIB
        parts = [record["memory"]["zero2_bytes"] for record in records]
        row["gradient_mib"] = None if parts[0] is None else max(p["gradient_bytes"] for p in parts) / MIB
        row["optimizer_mib"] = None if parts[0] is None else max(p["optimizer_bytes"] for p in parts) / MIB
        total = sum(record["memory"]["product_flops"] for record in records)
        row["work"] = None if work is None else total / work
        row["attention_calls"] = max(record["memory"]["attention_calls"] for record in records)
        row["place"] = (row["processes"], list(STRATEGIES).index(strategy))
        rows.append(row)
    frame = pd.DataFrame(rows).sort_values("place").drop(columns="place")
    return frame.reset_index(drop=True)


def markdown(frame: pd.DataFrame, runs: dict[str, list[dict]]) -> str:
    records = [record for records in runs.values() for record in records]
    tokens = records[0]["tokens"]
    config = records[0]["config"]
    lines = [
        "# Memory strategies",
        "",
        f"{config['prompt_tokens']} + {max(tokens['completion_tokens_per_row'])} tokens per row, "
        f"{tokens['rows_per_step']} rows per step, {config['rows_per_micro_batch']} at once; peaks in MiB by phase.",
        style.provenance(records),
        "",
        "| processes | strategy | generate | train forward | train backward | optimizer | kept on the host | device | "
        "gradients, AdamW | work | attention calls |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in frame.itertuples():
        peaks = [row.generate_mib, row.train_forward_mib, row.train_backward_mib, row.step_mib]
        cells = [f"{peak:,.0f}" for peak in (*peaks, row.kept_on_host_mib, row.device_mib)]
        parts = "–" if pd.isna(row.gradient_mib) else f"{row.gradient_mib:,.1f}, {row.optimizer_mib:,.1f}"
        work = "–" if pd.isna(row.work) else f"{row.work:.2f}"
        cells = [str(row.processes), row.strategy, *cells, parts, work, str(row.attention_calls)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" + NOTES


def chart(runs: dict[str, list[dict]]):
    """Peak of training of one process, what the host keeps left out, against the number of processes."""
    records = [record for records in runs.values() for record in records]
    note = (
        "Peak live bytes of training in one process, without what ZeRO-2 keeps on the host; one row per micro-batch. "
        "Dotted: 1/N of the first point. Parameters (218 MiB) stay whole in every process."
    )
    figure = style.headed_figure("What a process holds, by strategy and number of processes", records, 5.2, note)
    axes = figure.add_subplot()
    frame = table(runs)
    words = {"DDP": "DDP", "no strategy": "DDP"}
    frame["line"] = frame["strategy"].map(lambda name: words.get(name, name))
    for name, colour, marker in STRATEGIES.values():
        line = frame[frame["line"] == name].sort_values("processes")
        if colour is None or line.empty:
            continue
        axes.plot(line["processes"], line["device_mib"], color=colour, marker=marker, linewidth=2, label=name)
        for point in line.itertuples():
            axes.annotate(
                f"{point.device_mib:,.0f}",
                (point.processes, point.device_mib),
                textcoords="offset points",
                xytext=(0, 7),
                ha="center",
                fontsize=style.SMALL_PT,
                color=colour,
                path_effects=style.HALO,
            )
    axes.set_xticks(sorted(frame["processes"].unique()))
    axes.set_xlabel("processes N")
    axes.set_ylabel("MiB per process")
    axes.set_ylim(0)
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
