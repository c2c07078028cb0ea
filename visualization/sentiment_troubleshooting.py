"""The troubleshooting table of the sentiment recipe, from the records of experiments/run_sentiment_troubleshooting.sh.

python visualization/sentiment_troubleshooting.py --runs results/runs/cpu-2core/sentiment/troubleshooting \\
    --out results/sentiment_troubleshooting.md
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from visualization.combine_memory_data import write_atomically  # noqa: E402
from visualization.sentiment_charts import clock_of  # noqa: E402
from visualization.style import three_digits  # noqa: E402

ROWS = (
    ("out of memory", "memory_document", "the document's settings"),
    ("out of memory", "memory_batch_5", "`--batch_size 5 --mini_batch_size 1`"),
    ("out of memory", "memory_lora_rank_8", "`--lora_rank 8`"),
    ("out of memory", "memory_checkpointing", "`--gradient_checkpointing True`"),
    ("out of memory", "memory_rloo", "`--algorithm rloo --k 2` (no value model)"),
    ("too slow", "words_document", "the document's settings"),
    ("too slow", "slow_mini_batch_10", "`--mini_batch_size 10 --gradient_accumulation_steps 1`"),
    ("too slow", "slow_batch_20", "`--batch_size 20 --mini_batch_size 20 --gradient_accumulation_steps 1`"),
    ("too slow", "slow_epochs_50", "`--epochs 50`"),
    ("no happy words", "words_document", "the document's settings"),
    ("no happy words", "words_epochs_200", "`--epochs 200`"),
    ("no happy words", "words_learning_rate_3e-5", "`--learning_rate 3e-5`"),
    ("no happy words", "words_ppo_epochs_6", "`--ppo_epochs 6`"),
    ("no happy words", "words_learning_rate_2e-3", "`--learning_rate 2e-3`"),
    ("no happy words", "../learning/ppo_seed0", "`--config experiments/configs/sentiment/learns.yaml`"),
)
HEAD = """# The document's advice, measured

Default model, one change against the document's settings each, n = 1. Made by
`visualization/sentiment_troubleshooting.py`.
"""


def measured(problem: str, record: dict) -> str:
    """The figure that the problem is about."""
    summary = record["summary"]
    if problem == "out of memory":
        return f"{three_digits(summary['live_peak_bytes'] / 2**20)} MiB peak of live tensors"
    if problem == "too slow":
        samples = sum(entry["samples"] for entry in summary["history"])
        key, name = clock_of(record)
        return f"{summary[key]:.1f} s of {name}, {1000 * summary[key] / samples:.0f} ms per sample"
    before, after = summary["before"], summary["after"]
    return f"{before['success_rate']:.1%} to {after['success_rate']:.1%}, KL {after['kl']:.3f} nats"


def table(runs: Path) -> str:
    """Markdown; raises ValueError for a run that is missing or did not end ok."""
    lines = ["| problem | option | measured |", "|---|---|---|"]
    for problem, name, option in ROWS:
        path = runs / f"{name}.json"
        if not path.exists():
            raise ValueError(f"{path} is missing; make it with experiments/run_sentiment_troubleshooting.sh")
        record = json.loads(path.read_text())
        if record["status"] != "ok":
            raise ValueError(f"{path} ended as {record['status']}: {record['error']}")
        lines.append(f"| {problem} | {option} | {measured(problem, record)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="folder of the records")
    parser.add_argument("--out", type=Path, help="file that the table is written to as well")
    args = parser.parse_args(argv)
    try:
        text = table(args.runs)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(text)
    if args.out:
        write_atomically(args.out, lambda path: path.write_text(f"{HEAD}\n{text}\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
