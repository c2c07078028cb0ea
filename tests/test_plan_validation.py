"""What docs/planner.md says about the planner's accuracy, checked against the committed rows."""

import json
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = json.loads((ROOT / "results" / "planner" / "validation.json").read_text())


def test_enough_configurations_are_predicted_within_the_bounds():
    errors = [abs(row["error"]) for row in ROWS]
    assert len(ROWS) >= 50
    assert statistics.median(errors) <= 0.01 and max(errors) <= 0.05
    assert {row["name"].split("-k")[0] for row in ROWS if row["kind"] == "trainer"} >= {
        *("baseline", "string-level", "upstream", "upstream@1", "shared-prefix")
    }


def test_every_dimension_of_the_grid_was_executed():
    names = {kind: {row["name"] for row in ROWS if row["kind"] == kind} for kind in ("step", "trainer")}
    steps = ("ppo", "grpo-chunked-k8", "mtp4-chunked", "sft-lora", "llama-rloo", "t5-small-b8", "mt5-tiny")
    steps += ("rloo-float64", "rloo-bf16", "rloo-padded", "rloo-selective", "rloo-ratio-half", "rloo-adafactor")
    steps += ("rloo-chunked-k8", "rloo-long-prompt", "shared-ckpt", "shared-lora", "shared-two-prompts")
    trainers = ("grpo-upstream", "grpo-shared-prefix", "shared-prefix-two-prompts", "baseline-two-prompts")
    trainers += ("memory-selective", "shared-prefix-selective", "string-level-lora")
    assert names["step"] >= set(steps) and names["trainer"] >= set(trainers)


def test_nothing_that_was_called_enough_was_too_little():
    limited = [row for row in ROWS if row["budget_bytes"]]
    assert len(limited) >= 90 and all(row["status"] == "ok" for row in limited)


def test_the_chart_refuses_a_row_without_a_measurement():
    from visualization.charts_plan import draw_validation

    draw_validation(ROWS)
    with pytest.raises(ValueError, match="no measured peak"):
        draw_validation([*ROWS, ROWS[0] | {"measured_bytes": None}])


def test_a_plan_of_an_8b_model_took_less_than_15_seconds_and_a_gigabyte():
    plans = json.loads((ROOT / "results" / "planner" / "time.json").read_text())["plans"]
    runs = [run for plan in plans.values() for run in plan["runs"]]
    assert len(runs) >= 6 and all("Qwen3-8B" in plan["command"] for plan in plans.values())
    assert max(run["wall_s"] for run in runs) < 15 and max(run["max_rss_bytes"] for run in runs) < 10**9


@pytest.mark.slow
def test_a_whole_trainer_in_a_dry_run_equals_its_recorded_run():
    import subprocess
    import sys

    name = "results/runs/cpu-2core/cpu/upstream@1_k2.json"
    record = json.loads((ROOT / name).read_text())
    settings = {k: v for k, v in record["config"].items() if v is not None and k != "record"}
    command = [sys.executable, "experiments/plan_trainer.py", *(f"--{key}={value}" for key, value in settings.items())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    planned = json.loads(result.stdout.strip().splitlines()[-1])
    assert planned["live_peak_bytes"] == record["summary"]["live_peak_bytes"]
    assert planned["live_peak_phase"] == record["summary"]["live_peak_phase"]
