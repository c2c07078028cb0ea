"""Charts and table of the sentiment recipe, from its records alone.

    python visualization/sentiment_charts.py --runs results/runs/cpu-2core/sentiment --out results

writes `sentiment_comparison.png` and `sentiment_comparison.md`: PPO, RLOO and GRPO at equal samples, from the folders
`learning` (rewards and times) and `memory` of experiments/run_sentiment_comparison.sh. `draw_curve` draws one run
(reward, KL, success rate); train_sentiment.py calls it at its end.
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
ALL_WEIGHTS = " all weights"


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


def _of(record: dict, learning: dict | None = None) -> str:
    """Model, device, releases and commit; those of GRPO's release too where it is among the runs."""
    env, config = record["env"], record["config"]
    firsts = {name: records[0]["env"]["trl"] for name, records in (learning or {}).items()}
    other = [f", {release} for {name}" for name, release in firsts.items() if release != env["trl"]]
    commit = (env["repo_commit"] or "not recorded")[:10] + ("+dirty" if env["repo_dirty"] else "")
    model = Path(config["model"]).name if config["model"] else "built-in Llama"
    size = f"{record['summary']['parameters']:,} parameters with adapters"
    return f"{model} ({size}), {env['device']}, TRL {env['trl']}{''.join(other)}, commit {commit}"


def draw_curve(record: dict, path: Path) -> Path:
    """Reward, KL and success rate of one run over the samples."""
    summary, config = record["summary"], record["config"]
    before, after = summary["before"], summary["after"]
    note = (
        f"{_of(record)}, {record['started_at'][:10]}\n{config['epochs']} epochs of {len(config['prompts'])} prompts, "
        "batch "
        f"{config['batch_size']}, {config['ppo_epochs']} passes, learning rate {config['learning_rate']:g}, KL weight "
        f"{config['kl_coef']:g}, seed {config['seed']}; faint: each batch, bold: mean of 5; dots: judged on "
        f"{after['samples']} samples"
    )
    figure = _head(f"{config['algorithm'].upper()} on the sentiment task", note, 4.4)
    axes = figure.subplots(1, 3)
    samples, history = _samples_axis(record), summary["history"]
    panels = (
        ("mean reward", [entry["reward_mean"] for entry in history], None),
        ("KL, nats per completion", [entry["kl"] for entry in history], (0.0, after["kl"])),
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


SAME = ("model", "batch_size", "mini_batch_size", "ppo_epochs", "learning_rate", "kl_coef", "max_new_tokens", "dtype")


def load(folder: Path) -> dict[str, list[dict]]:
    """The records of a folder by algorithm, in the order of `COLOURS`; all weights trained as `<name> all weights`.

    Raises:
        ValueError: if there is none, if one did not end ok, or if two differ in a setting that has to be the same.
    """
    groups: dict[str, list[dict]] = {}
    first = None
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if record["status"] != "ok":
            raise ValueError(f"{path} ended as {record['status']}: {record['error']}")
        config = record["config"]
        first = first or config
        if different := [key for key in (*SAME, "epochs") if config[key] != first[key]]:
            raise ValueError(f"{path} has another {different[0]} than the first run of its folder: not comparable")
        groups.setdefault(name_of(record) + ("" if config["lora_rank"] else ALL_WEIGHTS), []).append(record)
    if not groups:
        raise ValueError(f"{folder} holds no record; make them with experiments/run_sentiment_comparison.sh")
    return {
        name + more: groups[name + more] for more in ("", ALL_WEIGHTS) for name in COLOURS if name + more in groups
    }


def clock_of(record: dict) -> tuple[str, str]:
    """(key, name) of the time that counts: on a CPU the processor's, which other programs hardly change."""
    on_cpu = record["env"]["device"] == "cpu"
    return ("train_processor_s", "processor time") if on_cpu else ("train_s", "time")


def seconds_per_batch(records: list[dict]) -> list[float]:
    return [r["summary"][clock_of(r)[0]] / len(r["summary"]["history"]) for r in records]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, with the decimals of the mean."""
    mean = three_digits(statistics.fmean(values))
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{len(mean.partition('.')[2])}f}"


def _peak_mib(record: dict) -> tuple[float, float]:
    """(live tensor bytes, growth of resident memory), MiB."""
    summary = record["summary"]
    return summary["live_peak_bytes"] / MIB, (summary["rss_peak_bytes"] - summary["rss_start_bytes"]) / MIB


def draw_comparison(learning: dict, memory: dict, path: Path) -> None:
    first = next(iter(learning.values()))[0]
    config = first["config"]
    clock_name = clock_of(first)[1]
    note = (
        f"{_of(first, learning)}, {first['started_at'][:10]}\n"
        f"every run: {config['epochs'] * len(config['prompts'])} samples in batches of {config['batch_size']}, "
        f"{config['ppo_epochs']} passes each, learning rate {config['learning_rate']:g}, KL weight "
        f"{config['kl_coef']:g}; line: mean of the seeds, band: lowest to highest\n"
        "memory: peak of live tensor bytes with adapters (full colour) and with all weights trained (pale); "
        f"{clock_name}: mean and range of the seeds, without the meter"
    )
    figure = _head("PPO, RLOO and GRPO on the sentiment task, at equal samples", note, 5.2)
    curve, peak, clock = figure.subplots(1, 3, width_ratios=(1.7, 1.1, 0.9))
    for name, records in learning.items():
        curves = [moving([entry["reward_mean"] for entry in r["summary"]["history"]]) for r in records]
        samples = _samples_axis(records[0])
        low, high = ([pick(values) for values in zip(*curves)] for pick in (min, max))
        curve.fill_between(samples, low, high, color=COLOURS[name], alpha=0.13, linewidth=0)
        mean = [statistics.fmean(values) for values in zip(*curves)]
        curve.plot(samples, mean, color=COLOURS[name], linewidth=2, label=f"{name} (n = {len(records)})")
    curve.set(xlabel="samples", xlim=(0, None), ylim=(-1.05, 1.05))
    curve.set_title("mean reward (mean of 5 batches)", fontsize=10)
    curve.grid(axis="y")
    names = list(learning)
    for place, name in enumerate(names):
        for offset, key, alpha in ((-0.2, name, 1.0), (0.2, name + ALL_WEIGHTS, 0.45)):
            if key in memory:
                live = _peak_mib(memory[key][0])[0]
                peak.bar(place + offset, live, 0.38, color=COLOURS[name], alpha=alpha)
                peak.text(place + offset, live, f"{live:.0f}", ha="center", va="bottom", fontsize=8)
        seconds = seconds_per_batch(learning[name])
        mean = statistics.fmean(seconds)
        clock.bar(place, mean, 0.7, color=COLOURS[name])
        around = [[mean - min(seconds)], [max(seconds) - mean]]
        clock.errorbar(place, mean, around, color="black", capsize=3, linewidth=1)
    for panel, title in ((peak, "peak of live tensors, MiB"), (clock, f"{clock_name} per batch, s")):
        panel.set_title(title, fontsize=10)
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right")
        panel.grid(axis="y")
    figure.legend(*curve.get_legend_handles_labels(), loc="outside lower center", ncols=7)
    save(figure, path)


def comparison_table(learning: dict, memory: dict) -> str:
    """Markdown: success, KL and diversity; peaks by both meters; time. Mean ± standard deviation over the runs."""
    first = next(iter(learning.values()))[0]
    tokens, config = first["tokens"], first["config"]
    prompt, completion = (max(tokens[f"{kind}_tokens_per_row"]) for kind in ("prompt", "completion"))
    lines = [
        "# PPO, RLOO and GRPO on the sentiment task, at equal samples",
        "",
        f"{tokens['rows_per_step']} rows per batch of at most {prompt} + {completion} tokens, "
        f"{config['epochs'] * len(config['prompts'])} samples per run. {_of(first, learning)}.",
        "Mean ± standard deviation over the runs. Whole run: wall clock with start, both judgements and saving, "
        f"{first['summary']['threads']} thread. Made by `visualization/sentiment_charts.py`.",
        "",
        "| algorithm | seeds | success untrained, % | trained, % | KL to the untrained model, nats "
        "| different completions | largest share of one word, % | whole run, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, records in learning.items():
        s = [record["summary"] for record in records]
        cells = [
            name,
            str(len(records)),
            spread([100 * x["before"]["success_rate"] for x in s]),
            spread([100 * x["after"]["success_rate"] for x in s]),
            spread([x["after"]["kl"] for x in s]),
            f"{spread([x['after']['distinct'] for x in s])} of {s[0]['after']['samples']}",
            spread([100 * (x["after"]["top_word_share"] or 0) for x in s]),
            spread([record["wall_s"] for record in records]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Live: peak of live tensor bytes. Resident: growth of resident memory over the training, sampled. "
        "Value model: its weights, gradients and AdamW state, in PPO only. Seconds: "
        f"{clock_of(first)[1]} of the training, without the meter, all seeds.",
        "",
        "| algorithm | live peak, MiB | of PPO's, % | in phase | resident, MiB | value model, MiB | s per batch "
        "| PPO's time / its |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, records in memory.items():
        summary = records[0]["summary"]
        live, resident = _peak_mib(records[0])
        ppo = "ppo" + (ALL_WEIGHTS if name.endswith(ALL_WEIGHTS) else "")
        value = summary["value_model"]
        held = sum(value[k] for k in ("weight_bytes", "gradient_bytes", "optimizer_bytes")) / MIB if value else None
        seconds = seconds_per_batch(learning[name]) if name in learning else None
        ratio = statistics.fmean(seconds_per_batch(learning["ppo"])) / statistics.fmean(seconds) if seconds else None
        cells = [
            name,
            three_digits(live),
            f"{100 * live / _peak_mib(memory[ppo][0])[0]:.0f}",
            summary["live_peak_phase"],
            f"{resident:.0f}",
            "–" if held is None else three_digits(held),
            spread(seconds) if seconds else "–",
            three_digits(ratio) if ratio else "–",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder with learning/ and memory/")
    parser.add_argument("--out", type=Path, required=True, help="folder that the chart and the table are written to")
    args = parser.parse_args(argv)
    try:
        parts = [load(args.runs / part) for part in ("learning", "memory")]
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    args.out.mkdir(parents=True, exist_ok=True)
    draw_comparison(*parts, args.out / "sentiment_comparison.png")
    table = comparison_table(*parts)
    write_atomically(args.out / "sentiment_comparison.md", lambda path: path.write_text(table, encoding="utf-8"))
    print(table)


if __name__ == "__main__":
    main()
