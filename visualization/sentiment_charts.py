"""Charts and table of the sentiment recipe, from its records alone.

    python visualization/sentiment_charts.py --runs results/runs/cpu-2core/sentiment/comparison --out results

writes `sentiment_comparison.png` and `sentiment_comparison.md`: PPO, RLOO and GRPO at equal samples. `draw_curve` draws
one run (reward, KL, success rate); train_sentiment.py calls it at its end.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from visualization.combine_memory_data import write_atomically  # noqa: E402
from visualization.style import MUTED, SMALL_PT, TITLE_PT, WIDTH_IN, save, three_digits  # noqa: E402

# Okabe and Ito's palette; PPO first, drawn in the colour of the baseline
COLOURS = {"ppo": "#D55E00", "rloo_k2": "#56B4E9", "rloo_k4": "#009E73", "rloo_k8": "#0072B2"}
COLOURS |= {"grpo_k2": "#F0E442", "grpo_k4": "#CC79A7", "grpo_k8": "#E69F00"}
MIB = 2**20


def name_of(record: dict) -> str:
    config = record["config"]
    return config["algorithm"] if config["algorithm"] == "ppo" else f"{config['algorithm']}_k{config['k']}"


def success_rates(record: dict) -> list[float]:
    """Positive share of every batch."""
    return [entry["positives"] / entry["samples"] for entry in record["summary"]["history"]]


def moving(values: list, window: int = 5) -> list[float]:
    """Mean of the last `window` values; missing ones left out."""
    out = []
    for end in range(1, len(values) + 1):
        known = [value for value in values[max(0, end - window) : end] if value is not None]
        out.append(sum(known) / len(known) if known else float("nan"))
    return out


def _samples_axis(record: dict) -> list[int]:
    done, axis = 0, []
    for entry in record["summary"]["history"]:
        done += entry["samples"]
        axis.append(done)
    return axis


def _head(title: str, note: str, height_in: float) -> Figure:
    figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
    figure.text(0.012, 1 - 0.12 / height_in, title, fontsize=TITLE_PT, fontweight="bold", va="top")
    for line, text in enumerate(note.split("\n")):
        at = 1 - (0.46 + 0.18 * line) / height_in
        figure.text(0.012, at, text, fontsize=SMALL_PT, color=MUTED, va="top")
    top = 0.5 + 0.18 * (note.count("\n") + 1)
    figure.get_layout_engine().set(rect=(0.005, 0, 0.99, 1 - top / height_in), h_pad=0.06, w_pad=0.08)
    return figure


def _of(record: dict) -> str:
    env, config = record["env"], record["config"]
    commit = (env["repo_commit"] or "not recorded")[:10] + ("+dirty" if env["repo_dirty"] else "")
    model = Path(config["model"]).name if config["model"] else "built-in Llama"
    return f"{model} ({record['summary']['parameters']:,} parameters with adapters), {env['device']}, TRL {env['trl']}, commit {commit}"


def draw_curve(record: dict, path: Path) -> Path:
    """Reward, KL and success rate of one run over the samples."""
    summary, config = record["summary"], record["config"]
    before, after = summary["before"], summary["after"]
    note = (
        f"{_of(record)}, {record['started_at'][:10]}\n{config['epochs']} epochs of {len(config['prompts'])} prompts, batch "
        f"{config['batch_size']}, {config['ppo_epochs']} passes, learning rate {config['learning_rate']:g}, KL weight "
        f"{config['kl_coef']:g}, seed {config['seed']}; faint: each batch, bold: mean of 5; dots: judged on "
        f"{after['samples']} samples"
    )
    figure = _head(f"{config['algorithm'].upper()} on the sentiment task", note, 4.4)
    axes = figure.subplots(1, 3)
    samples, history = _samples_axis(record), summary["history"]
    panels = (
        ("mean reward", [entry["reward_mean"] for entry in history], None),
        ("KL to the untrained model, nats per completion", [entry["kl"] for entry in history], (0.0, after["kl"])),
        ("success rate, %", [100 * rate for rate in success_rates(record)],
         (100 * before["success_rate"], 100 * after["success_rate"])),
    )  # fmt: skip
    for panel, (label, values, judged) in zip(axes, panels):
        known = [float("nan") if value is None else value for value in values]
        panel.plot(samples, known, color="#009E73", alpha=0.3, linewidth=1)
        panel.plot(samples, moving(values), color="#009E73", linewidth=2)
        if judged:
            panel.plot([0, samples[-1]], judged, "o", color="#D55E00", markersize=6, clip_on=False, zorder=5)
        panel.set_title(label, fontsize=10)
        panel.set_xlabel("samples")
        panel.set_xlim(0, samples[-1])
        panel.grid(axis="y")
    axes[0].set_ylim(-1.05, 1.05)
    axes[2].set_ylim(0, 102)
    save(figure, path)
    return path


def load(runs: Path) -> dict[str, list[dict]]:
    """The ok records of a folder by algorithm, in the order of `COLOURS`.

    Raises:
        ValueError: if a run did not end ok, or if two differ in a setting that has to be the same.
    """
    groups: dict[str, list[dict]] = {}
    for path in sorted(runs.glob("*.json")):
        record = json.loads(path.read_text())
        if record["status"] != "ok":
            raise ValueError(f"{path} ended as {record['status']}: {record['error']}")
        groups.setdefault(name_of(record), []).append(record)
    if not groups:
        raise ValueError(f"{runs} holds no record; make them with experiments/run_sentiment_comparison.sh")
    first = next(iter(groups.values()))[0]["config"]
    same = ("model", "lora_rank", "batch_size", "epochs", "ppo_epochs", "kl_coef", "max_new_tokens", "dtype")
    for records in groups.values():
        for record in records:
            if different := [key for key in same if record["config"][key] != first[key]]:
                raise ValueError(f"{record['run']} has another {different[0]} than {first['algorithm']}; not comparable")
    return {name: groups[name] for name in COLOURS if name in groups}


def _spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return three_digits(mean) if len(values) < 2 else f"{three_digits(mean)} ± {three_digits(statistics.stdev(values))}"


def draw_comparison(groups: dict[str, list[dict]], path: Path) -> None:
    first = next(iter(groups.values()))[0]
    config = first["config"]
    seeds = {record["seed"] for records in groups.values() for record in records}
    note = (
        f"{_of(first)}, {first['started_at'][:10]}\n{config['batch_size']} completions per batch, {config['ppo_epochs']} "
        f"passes, {config['epochs'] * len(config['prompts'])} samples in every run; {len(seeds)} seeds: line mean, band "
        "lowest to highest; memory: live bytes of tensors (solid) and growth of resident memory (hatched)"
    )
    figure = _head("PPO, RLOO and GRPO at equal samples", note, 5.2)
    curve, memory, time = figure.subplots(1, 3, width_ratios=(1.6, 1.1, 0.9))
    for name, records in groups.items():
        curves = [moving([entry["reward_mean"] for entry in r["summary"]["history"]]) for r in records]
        samples = _samples_axis(records[0])
        mean = [statistics.fmean(values) for values in zip(*curves)]
        curve.plot(samples, mean, color=COLOURS[name], linewidth=2, label=name)
        curve.fill_between(samples, [min(v) for v in zip(*curves)], [max(v) for v in zip(*curves)],
                           color=COLOURS[name], alpha=0.12, linewidth=0)  # fmt: skip
    curve.set(xlabel="samples", xlim=(0, None), ylim=(-1.05, 1.05))
    curve.set_title("mean reward (mean of 5 batches)", fontsize=10)
    curve.grid(axis="y")
    names = list(groups)
    for place, name in enumerate(names):
        live = [r["summary"]["live_peak_bytes"] / MIB for r in groups[name] if r["summary"]["live_peak_bytes"]]
        rss = [(r["summary"]["rss_peak_bytes"] - r["summary"]["rss_start_bytes"]) / MIB for r in groups[name]]
        if live:
            memory.bar(place - 0.2, statistics.fmean(live), 0.38, color=COLOURS[name])
            memory.text(place - 0.2, max(live), f"{statistics.fmean(live):.0f}", ha="center", va="bottom", fontsize=8)
        memory.bar(place + 0.2, statistics.fmean(rss), 0.38, color="white", edgecolor=COLOURS[name], hatch="///")
        memory.text(place + 0.2, max(rss), f"{statistics.fmean(rss):.0f}", ha="center", va="bottom", fontsize=8)
        seconds = [r["summary"]["train_s"] for r in groups[name]]
        time.bar(place, statistics.fmean(seconds), 0.7, color=COLOURS[name])
        time.errorbar(place, statistics.fmean(seconds), [[statistics.fmean(seconds) - min(seconds)],
                      [max(seconds) - statistics.fmean(seconds)]], color="black", capsize=3)  # fmt: skip
    for panel, title in ((memory, "peak memory, MiB"), (time, "training, s")):
        panel.set_title(title, fontsize=10)
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right")
        panel.grid(axis="y")
    figure.legend(*curve.get_legend_handles_labels(), loc="outside lower center", ncols=7)
    save(figure, path)


def comparison_table(groups: dict[str, list[dict]]) -> str:
    """Markdown: success, KL, diversity, peaks by both meters, time; mean ± standard deviation over the seeds."""
    first = next(iter(groups.values()))[0]
    tokens = first["tokens"]
    prompt, completion = (max(tokens[f"{kind}_tokens_per_row"]) for kind in ("prompt", "completion"))
    lines = [
        f"{tokens['rows_per_step']} completions per batch, at most {prompt} + {completion} tokens each, "
        f"{first['config']['epochs'] * len(first['config']['prompts'])} samples per run; {_of(first)}.",
        "Live: peak of live tensor bytes. Resident: growth of resident memory over the training. Mean ± standard "
        "deviation over the seeds.",
        "",
        "| algorithm | runs | success before, % | after, % | KL, nats | different of | live peak, MiB | resident, MiB "
        "| value model, MiB | training, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, records in groups.items():
        s = [record["summary"] for record in records]
        value = [
            sum(x["value_model"][key] for key in ("weight_bytes", "gradient_bytes", "optimizer_bytes")) / MIB
            for x in s
            if x["value_model"]
        ]
        live = [x["live_peak_bytes"] / MIB for x in s if x["live_peak_bytes"]]
        cells = [
            name,
            str(len(records)),
            _spread([100 * x["before"]["success_rate"] for x in s]),
            _spread([100 * x["after"]["success_rate"] for x in s]),
            _spread([x["after"]["kl"] for x in s]),
            f"{_spread([x['after']['distinct'] for x in s])} of {s[0]['after']['samples']}",
            _spread(live) if live else "–",
            _spread([(x["rss_peak_bytes"] - x["rss_start_bytes"]) / MIB for x in s]),
            three_digits(statistics.fmean(value)) if value else "–",
            _spread([x["train_s"] for x in s]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the records")
    parser.add_argument("--out", type=Path, required=True, help="folder that the chart and the table are written to")
    parser.add_argument("--name", default="sentiment_comparison", help="name of both files")
    args = parser.parse_args(argv)
    try:
        groups = load(args.runs)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    args.out.mkdir(parents=True, exist_ok=True)
    draw_comparison(groups, args.out / f"{args.name}.png")
    table = comparison_table(groups)
    write_atomically(args.out / f"{args.name}.md", lambda target: Path(target).write_text(table, encoding="utf-8"))
    print(table)


if __name__ == "__main__":
    main()
