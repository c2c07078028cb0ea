"""Tables and charts of multi-token prediction, from its recorded runs.

    python visualization/charts_mtp.py --runs results/runs/mtp-cpu-2core --out results/mtp

Writes mtp_loss.md (.csv), mtp_training.md, peak_by_heads.png, time_and_memory.png and acceptance.png. A folder without
records is an error that names it; a chart whose runs were not made is named as not drawn.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by its path, it still imports visualization.*

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from visualization import style
from visualization.combine_memory_data import write_atomically, write_csv
from visualization.results_table import markdown_rows

MIB, GIB = 2**20, 2**30
# Okabe and Ito's palette; ours drawn last
LOOKS = {
    "naive": ("naive F.cross_entropy", "#D55E00", "o"),
    "seed-del": ("the usual remedy: del", "#E69F00", "v"),
    "torch-chunked-mean": ("PyTorch chunked, one call per head", "#56B4E9", "s"),
    "torch-chunked-none": ("PyTorch chunked, one call", "#56B4E9", "D"),
    "torch-chunked-64": ("PyTorch chunked, 64 rows, one call per head", "#56B4E9", "P"),
    "torch-chunked-256": ("PyTorch chunked, 256 rows, one call per head", "#88CCEE", "X"),
    "cce-compile": ("cut-cross-entropy, torch_compile", "#000000", "P"),
    "cce-kernel": ("cut-cross-entropy, kernel", "#000000", "X"),
    "liger": ("Liger", "#000000", "*"),
    "logits": ("ours from logits", "#0072B2", "^"),
    "hidden-small-tile": ("ours from hidden states, tile 256 KiB", "#009E73", "h"),
    "whole-vocabulary": ("ours head by head, 64 x V projected once", "#CC79A7", "^"),
    "whole-vocabulary-256": ("ours head by head, 256 x V projected once", "#882255", "v"),
    "hidden": ("ours from hidden states, tile 8 MiB", "#009E73", "^"),
}
PIPELINE_COLOURS = {"baseline": "#D55E00", "verifiable": "#0072B2", "rho1": "#009E73"}


def load(folder: Path) -> list[dict]:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not records:
        raise SystemExit(
            f"error: {folder} has no records; make them with experiments/record_mtp.sh {folder.parent.name}"
        )
    return records


def provenance_of(record: dict) -> dict:
    """A record as `style.provenance` reads it."""
    shape = record.get("shape")
    words = f"hidden {shape['hidden_size']}, {shape['dtype']}" if shape else None
    if words is None:
        words = f"Qwen3 trunk (hidden {record['config']['hidden_size']}), {record['config']['n_future']} heads"
    started = record.get("started_at") or record["measured_at"]
    return {"config": {"model": words}, "env": record["env"], "started_at": started}


def loss_table(benchmarks: list[dict]) -> pd.DataFrame:
    """One row per case and method. `time_ratio`: median over the rounds of its time over naive's in the same round."""
    rows = []
    for record in benchmarks:
        shape, methods = record["shape"], record["methods"]
        reference = methods.get("naive", {})
        for method in LOOKS:
            entry = methods.get(method)
            if entry is None:
                continue
            peak, naive = entry.get("peak_bytes"), reference.get("peak_bytes")
            seconds = [done[method] for done in record["rounds"] if method in done]
            ratios = sorted(
                done[method] / done["naive"] for done in record["rounds"] if {method, "naive"} <= set(done)
            )
            rows.append(
                {name: shape[name] for name in ("vocab", "n_future", "batch", "length", "hidden_size", "dtype")}
                | {
                    "method": method,
                    "peak_mib": None if peak is None else peak / MIB,
                    "returned_gradient_mib": entry.get("returned_gradient_bytes", 0) / MIB or None,
                    "counted_on": entry.get("counted_on"),
                    "out_of_memory": entry.get("out_of_memory", False),
                    "below_naive": 1 - peak / naive if peak and naive and method != "naive" else None,
                    "time_median_s": statistics.median(seconds) if seconds else None,
                    "time_ratio": statistics.median(ratios) if ratios else None,
                    "time_ratio_min": ratios[0] if ratios else None,
                    "time_ratio_max": ratios[-1] if ratios else None,
                    "rounds": len(seconds) or None,
                    "loss_difference": entry.get("loss_difference"),
                    "gradient_difference_relative": entry.get("gradient_difference_relative"),
                }
            )
    frame = pd.DataFrame(rows)
    return frame.sort_values(["vocab", "batch", "n_future"], kind="stable").reset_index(drop=True)


def shown(value, text: str) -> str:
    return "–" if value is None or pd.isna(value) else text.format(value)


def loss_markdown(table: pd.DataFrame, benchmarks: list[dict]) -> str:
    header = ["method", "peak MiB", "below naive", "seconds", "time / naive", "gradient off by"]
    threads = sorted({record["env"]["threads"] for record in benchmarks})
    parts = [
        "# Multi-token-prediction loss: memory and time\n",
        style.provenance(list(map(provenance_of, benchmarks))) + f" · threads {', '.join(map(str, threads))}",
    ]
    keys = ["vocab", "batch", "length", "n_future", "hidden_size", "dtype"]
    for (vocab, batch, length, n_future, hidden, dtype), rows in table.groupby(keys, sort=False):
        parts.append(
            f"\n## Vocabulary {vocab:,}, {n_future} head{'s' * (n_future > 1)}, {batch} x {length} positions, "
            f"hidden {hidden}, {dtype}\n"
        )
        lines = []
        for row in rows.to_dict("records"):
            fake = "\\*" if row["counted_on"] == "fake tensors" else ""
            ratio = shown(row["time_ratio"], "{:.2f}")
            if row["rounds"] > 1 and ratio != "–" and row["method"] != "naive":
                ratio += f" ({row['time_ratio_min']:.2f} to {row['time_ratio_max']:.2f})"
            count = f" (n = {row['rounds']:.0f})" if row["rounds"] > 0 else ""
            lines.append(
                [
                    LOOKS[row["method"]][0],
                    "out of memory" if row["out_of_memory"] else shown(row["peak_mib"], "{:,.1f}") + fake,
                    shown(row["below_naive"], "{:.1%}").replace("-0.0%", "0.0%"),
                    shown(row["time_median_s"], "{:.2f}") + count,
                    ratio,
                    shown(row["gradient_difference_relative"], "{:.1e}"),
                ]
            )
        parts.append(markdown_rows(header, lines))
    measured = {method for record in benchmarks for method in record["methods"]}
    unavailable = {m: why for record in benchmarks for m, why in record["unavailable"].items() if m not in measured}
    pending = {LOOKS[method][0]: unavailable.get(method, "not run") for method in LOOKS if method not in measured}
    notes = [
        "Peak: bytes that PyTorch's allocator gave out above the inputs, inside operators too, with the returned "
        "gradients of hidden states and head.",
        "`\\*` counted on fake tensors: it does not fit here.",
        "seconds: median of n rounds; time / naive: median (smallest to largest) of the ratios of each round, all "
        "methods in turn in one process.",
        "gradient off by: largest distance from the naive gradients over their largest entry.",
    ]
    notes += [f"not measured here: {name} ({why})" for name, why in sorted(pending.items())]
    return "\n".join(parts) + "\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def loss_distance(record: dict, records: list[dict]) -> float | None:
    """Largest relative distance of losses and gradient norm, over all steps, from the pipeline's naive run."""
    if record["config"]["loss"] == "naive":
        return None
    for other in records:
        if other["config"]["pipeline"] != record["config"]["pipeline"] or other["config"]["loss"] != "naive":
            continue
        steps = zip(record["summary"]["metrics"] or [], other["summary"]["metrics"] or [])
        return max((abs(a[name] / b[name] - 1) for a, b in steps for name in a), default=None)
    return None


def training_markdown(folders: dict[str, list[dict]]) -> str:
    header = [
        "workload",
        "pipeline",
        "loss",
        "rows",
        "status",
        "live peak MiB",
        "loss of step 1, 2, last",
        "off naive by",
        "acceptance",
    ]
    rows = []
    for workload, records in folders.items():
        for record in records:
            config, summary = record["config"], record["summary"]
            budget = f" ({config['budget_gib']:g} GiB)" if config["budget_gib"] else ""
            status = f"OOM{budget}" if record["status"] == "oom" else record["status"] + budget
            losses = [step["weighted"] for step in summary["metrics"] or []]
            losses = [losses[i] for i in sorted({0, min(1, len(losses) - 1), len(losses) - 1})] if losses else []
            off = loss_distance(record, records)
            checks = summary.get("validations") or []
            acceptance = f"{checks[0]['acceptance']:.3f} to {checks[-1]['acceptance']:.3f}" if checks else "–"
            peak = summary["live_peak_bytes"] if record["status"] == "ok" else None
            rows.append(
                [workload, config["pipeline"], config["loss"], str(config["batch_size"]), status]
                + [shown(peak and peak / MIB, "{:,.0f}"), ", ".join(f"{x:.6f}" for x in losses) or "–"]
                + [shown(off, "{:.1e}"), acceptance]
            )
    every = [record for records in folders.values() for record in records]
    words = style.provenance(list(map(provenance_of, every)))
    note = (
        "off naive by: largest relative distance of weighted loss, unweighted loss and gradient norm, over all steps, "
        "from the naive run of the same pipeline."
    )
    return f"# Multi-token-prediction training\n\n{words}\n\n{markdown_rows(header, rows)}\n\n{note}\n"


def peak_by_heads(benchmarks: list[dict]) -> Figure:
    """Live peak over the number of heads, a panel per vocabulary, at the batch that most cases have."""
    cases = [r for r in benchmarks if r["shape"]["batch"] == 4]
    vocabularies = sorted({r["shape"]["vocab"] for r in cases})
    shape = cases[0]["shape"]
    note = (
        f"Peak of allocated bytes above the inputs, with returned gradients; {shape['batch']} x {shape['length']} "
        "positions, float32. Hollow: counted on fake tensors, it does not fit."
    )
    question = "Does the peak of the loss know how many heads there are?"
    figure = style.headed_figure(question, list(map(provenance_of, cases)), 5.6, note=note)
    panels = figure.subplots(1, len(vocabularies), squeeze=False)[0]
    handles = {}
    for axes, vocab in zip(panels, vocabularies):
        mine = sorted((r for r in cases if r["shape"]["vocab"] == vocab), key=lambda r: r["shape"]["n_future"])
        for method, (label, colour, marker) in LOOKS.items():
            points = [
                (r["shape"]["n_future"], entry["peak_bytes"] / GIB, entry["counted_on"] == "fake tensors")
                for r in mine
                if (entry := r["methods"].get(method)) and entry.get("peak_bytes")
            ]
            if not points or method == "hidden-small-tile":
                continue
            xs, ys, fakes = zip(*points)
            handles[method] = axes.plot(
                xs, ys, marker, color=colour, linestyle="-", linewidth=2, markersize=7, label=label, zorder=4
            )[0]
            for x, y in ((x, y) for x, y, fake in points if fake):
                axes.plot(x, y, marker, color="white", markeredgecolor=colour, markersize=7, zorder=5)
        top = max(line for axis_line in axes.lines for line in axis_line.get_ydata())
        style.memory_axis(axes, 1.08 * top, "GiB")
        style.measured_ks(axes, sorted({r["shape"]["n_future"] for r in mine}))
        ours = mine[-1]["methods"]["hidden"]["peak_bytes"] / GIB
        style.value_label(axes, 8, ours + 0.02 * top, f"{ours * 1024:,.0f} MiB", color=LOOKS["hidden"][1], ha="right")
        axes.set_title(f"vocabulary {vocab:,}", loc="left")
        axes.set_xlabel("heads (n_future)")
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=2)
    return figure


def time_and_memory(benchmarks: list[dict]) -> Figure:
    """Every method as a point of time and memory, both relative to naive, at 4 heads."""
    cases = [r for r in benchmarks if r["shape"]["batch"] == 4 and r["shape"]["n_future"] == 4]
    cases.sort(key=lambda r: r["shape"]["vocab"])
    rounds = {sum("naive" in done for done in record["rounds"]) for record in cases}
    note = (
        "Both relative to the naive loss of the same inputs, time to that of the same round (median of "
        f"{' and '.join(map(str, sorted(rounds)))} rounds); lower left is better."
    )
    question = "What does the saved memory cost in time?"
    figure = style.headed_figure(question, list(map(provenance_of, cases)), 5.8, note=note)
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    handles = {}
    for axes, record in zip(panels, cases):
        for row in loss_table([record]).to_dict("records"):
            if pd.isna(row["time_ratio"]):
                continue
            memory = 1 - row["below_naive"] if row["method"] != "naive" else 1.0
            label, colour, marker = LOOKS[row["method"]]
            handles[row["method"]] = axes.plot(
                row["time_ratio"], memory, marker, color=colour, markersize=10, linestyle="none", label=label, zorder=5
            )[0]
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.axvline(1.15, color=style.ALARM, linestyle="--", linewidth=1.1)
        axes.axhline(0.05, color=style.ALARM, linestyle="--", linewidth=1.1)
        axes.grid(which="both")
        axes.set_xlim(left=0)
        axes.set_xlabel("time / naive (bar: 1.15)")
        axes.set_ylabel("peak / naive (bar: 0.05)")
        axes.set_title(f"vocabulary {record['shape']['vocab']:,}, 4 heads", loc="left")
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=2)
    return figure


def acceptance(records: list[dict]) -> Figure:
    """Share of right predictions of the extra heads over the steps, one line per pipeline."""
    config = records[0]["config"]
    note = (
        f"Share of tokens that heads 2 to {config['n_future']} predict right, on held-out rows whose answer is right; "
        f"{config['steps']} steps of {config['batch_size']} rows, {config['wrong_share']:.0%} of the training rows "
        "altered."
    )
    question = "Do the extra heads learn?"
    figure = style.headed_figure(question, list(map(provenance_of, records)), 4.6, note=note)
    axes = figure.subplots()
    for record in records:
        checks, pipeline = record["summary"]["validations"], record["config"]["pipeline"]
        line = [(check["step"], check["acceptance"]) for check in checks]
        axes.plot(*zip(*line), marker="o", color=PIPELINE_COLOURS[pipeline], linewidth=2, label=pipeline)
    axes.set_ylim(0, 1)
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("MTP acceptance")
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of one set: results/runs/<set>")
    parser.add_argument("--out", type=Path, required=True, help="folder the charts and tables are written to")
    args = parser.parse_args(argv)
    benchmarks = load(args.runs / "benchmark")
    names = [name for name in ("batch8", "batch128", "learning") if (args.runs / name).exists()]
    training = {name: load(args.runs / name) for name in names}
    table = loss_table(benchmarks)
    write_csv(table, args.out / "mtp_loss.csv")
    for name, text in (("mtp_loss", loss_markdown(table, benchmarks)), ("mtp_training", training_markdown(training))):
        write_atomically(args.out / f"{name}.md", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    if len({r["shape"]["n_future"] for r in benchmarks}) > 1:
        style.save(peak_by_heads(benchmarks), args.out / "peak_by_heads.png")
    else:
        print("not drawn: peak_by_heads: records of one number of heads only")
    timed = [r for r in benchmarks if r["shape"]["n_future"] == 4 and any("naive" in done for done in r["rounds"])]
    if timed:
        style.save(time_and_memory(timed), args.out / "time_and_memory.png")
    else:
        print("not drawn: time_and_memory: no case of 4 heads has times (benchmark_mtp.py --part time)")
    if "learning" in training:
        style.save(acceptance(training["learning"]), args.out / "acceptance.png")
    print(f"{len(benchmarks)} benchmark cases, {sum(map(len, training.values()))} runs -> {args.out}")


if __name__ == "__main__":
    main()
