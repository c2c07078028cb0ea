"""Chart and table of the sentiment comparison, from made-up records."""

import json
import random
from dataclasses import asdict

import pytest
from conftest import ROOT

from sentiment.config import SentimentConfig
from visualization import sentiment_charts

RUNS = {"ppo": ("ppo", 2), "rloo_k2": ("rloo", 2), "rloo_k4": ("rloo", 4), "grpo_k4": ("grpo", 4)}


def made_up(algorithm: str, k: int, seed: int, **settings) -> dict:
    config = SentimentConfig(
        algorithm=algorithm, k=k, seed=seed, epochs=80, batch_size=24, mini_batch_size=24,
        gradient_accumulation_steps=1, **settings,
    )  # fmt: skip
    rng = random.Random(f"{algorithm}{k}{seed}")
    history = [
        {"step": i, "epoch": 8 * i, "samples": 24, "positives": min(24, 3 + 2 * i), "reward_mean": -0.7 + i / 10,
         "kl": 0.1 * i + rng.random(), "entropy": 9.0, "distinct": 24}
        for i in range(1, 11)
    ]  # fmt: skip
    judged = {"samples": 300, "success_rate": 0.14, "kl": 0.0, "distinct": 299, "top_word_share": 0.3}
    value = {"weight_bytes": 2**20, "gradient_bytes": 2**19, "optimizer_bytes": 2**20}
    summary = {
        "history": history, "train_processor_s": 20.0 + rng.random(), "threads": 1, "parameters": 1000,
        "before": judged, "after": judged | {"success_rate": 0.9 + rng.random() / 20, "kl": 2.0},
        "live_peak_bytes": 40 * 2**20, "live_peak_phase": "train_backward",
        "rss_peak_bytes": 900 * 2**20, "rss_start_bytes": 700 * 2**20,
        "value_model": value if algorithm == "ppo" else None,
    }  # fmt: skip
    return {
        "run": f"{algorithm}_{seed}", "status": "ok", "error": None, "config": asdict(config), "seed": seed,
        "wall_s": 30.0, "started_at": "2026-01-01T00:00:00", "summary": summary,
        "env": {"device": "cpu", "trl": "0.20.0", "repo_commit": "0" * 40, "repo_dirty": False},
        "tokens": {"prompt_tokens_per_row": [3], "completion_tokens_per_row": [10], "rows_per_step": 24},
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    for name, (algorithm, k) in RUNS.items():
        for seed in range(3):
            path = tmp_path / "learning" / f"{name}_seed{seed}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(made_up(algorithm, k, seed)))
        for more, rank in (("", 16), ("_all", 0)):
            path = tmp_path / "memory" / f"{name}{more}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(made_up(algorithm, k, 0, lora_rank=rank)))
    return tmp_path


def test_chart_and_table_show_every_algorithm(runs, tmp_path):
    sentiment_charts.main(["--runs", str(runs), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out/sentiment_comparison.png").stat().st_size > 20_000
    table = (tmp_path / "out/sentiment_comparison.md").read_text()
    for name in RUNS:
        assert f"| {name} | 3 | 14.0 ± 0.0 |" in table and f"| {name} all weights |" in table
    assert "24 rows per batch of at most 3 + 10 tokens, 240 samples per run" in table


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda record: record.update(status="oom", error="too big"), "ended as oom: too big"),
        (lambda record: record["config"].update(kl_coef=0.1), "has another kl_coef"),
        (lambda record: record["config"].update(epochs=160), "has another epochs"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(runs, break_it, message):
    path = runs / "learning/rloo_k4_seed1.json"
    record = json.loads(path.read_text())
    break_it(record)
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=message):
        sentiment_charts.main(["--runs", str(runs), "--out", str(runs / "out")])


def test_curve_of_one_run(tmp_path):
    record = made_up("ppo", 2, 0)
    assert sentiment_charts.draw_curve(record, tmp_path / "curve.png").stat().st_size > 20_000


RECORDED = ROOT / "results/runs/cpu-2core/sentiment"


def test_ppo_learns_on_every_recorded_seed_within_ten_minutes():
    ppo = sentiment_charts.load(RECORDED / "learning")["ppo"]
    assert sorted(record["seed"] for record in ppo) == [0, 1, 2]
    for record in ppo:
        before, after = record["summary"]["before"], record["summary"]["after"]
        assert before["success_rate"] < 0.3 and after["success_rate"] >= 0.9 and record["wall_s"] < 600
        assert after["distinct"] > 0.9 * after["samples"] and after["top_word_share"] < 0.5
        assert record["env"]["repo_dirty"] is False


def test_committed_table_is_that_of_the_committed_records():
    table = sentiment_charts.comparison_table(*(sentiment_charts.load(RECORDED / p) for p in ("learning", "memory")))
    assert (ROOT / "results/sentiment_comparison.md").read_text() == table
