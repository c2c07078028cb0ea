"""experiments/recommend_settings.py: what it writes trains, with the peak that it says."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

SHAPE = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32}
SHAPE |= {"prompt_tokens": 256, "response_tokens": 24, "rloo_k": 8}


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(ROOT / "experiments" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_recommended_settings_train_with_the_peak_that_was_said(tmp_path):
    workload, found, record = (str(tmp_path / name) for name in ("workload.yaml", "found.yaml", "run.json"))
    (tmp_path / "workload.yaml").write_text(yaml.safe_dump(SHAPE))
    result = run("recommend_settings.py", "--config", workload, "--device", "110MiB", "--write", found)
    assert result.returncode == 0, result.stderr
    trained = run("train.py", "--config", found, "--steps", "2", "--record", record)
    assert trained.returncode == 0, trained.stderr
    peak = json.loads((tmp_path / "run.json").read_text())["summary"]["live_peak_bytes"]
    assert f"peak {peak / 2**20:,.0f} MiB of 110MiB" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "1GiB"], "--write"),
        (["--device", "0", "--write", "x.yaml"], "device"),
        (["--device", "1GiB", "--write", "x.yaml", "--method", "ppo"], "trains rloo only"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    result = run("recommend_settings.py", *arguments)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr
