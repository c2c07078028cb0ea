"""Training peaks on fake tensors are those of real ones, and the shared prefix is flat in k."""

import csv
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))

import training_peaks  # noqa: E402

from config import ExperimentConfig  # noqa: E402
from memory import ProductFlops  # noqa: E402

SMALL = {"vocab_size": 8192, "hidden_size": 32, "intermediate_size": 64, "prompt_tokens": 96, "response_tokens": 24}


def peak(k: int, way: str, real: bool = False, **settings) -> int:
    return training_peaks.peak_and_work(ExperimentConfig(**SMALL, **settings), k, way, real)[0]


def work(k: int, way: str, real: bool = False, **settings) -> int:
    return training_peaks.peak_and_work(ExperimentConfig(**SMALL, **settings), k, way, real)[2]


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("way", training_peaks.WAYS)
def test_fake_tensors_have_the_peak_of_real_ones(way, gradient_checkpointing):
    settings = {"gradient_checkpointing": gradient_checkpointing}
    assert peak(3, way, **settings) == pytest.approx(peak(3, way, real=True, **settings), rel=0.001)


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "checkpointing"])
def test_only_k_copies_at_once_grow_with_k(gradient_checkpointing):
    settings = {"gradient_checkpointing": gradient_checkpointing}
    growth = {way: peak(16, way, **settings) / peak(2, way, **settings) for way in training_peaks.WAYS}
    assert growth["shared"] <= 1.05 and growth["row by row"] <= 1.05
    assert growth["all rows"] > 1.1


def test_fake_tensors_do_the_work_of_real_ones():
    for way in training_peaks.WAYS:
        assert work(3, way) == work(3, way, real=True)


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "checkpointing"])
def test_work_of_the_prompt_is_done_once(gradient_checkpointing):
    settings = {"gradient_checkpointing": gradient_checkpointing}
    row = work(1, "row by row", **settings)
    assert work(4, "row by row", **settings) == work(4, "all rows", **settings) == 4 * row
    two, four, eight = (work(k, "shared", **settings) for k in (2, 4, 8))
    branch = (four - two) // 2
    prompt = two - 2 * branch
    assert eight == prompt + 8 * branch
    # Less than a row: in the last of two layers the prompt's backward is that of its keys and values only.
    assert 0.8 * row < prompt + branch < row


def test_causal_attention_is_half_of_the_work():
    query, key, value = (torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3))
    counts = []
    for is_causal in (False, True):
        with ProductFlops() as products:
            F.scaled_dot_product_attention(query, key, value, is_causal=is_causal).sum().backward()
        counts.append(products.attention_flops)
    product = 2 * 2 * 64 * 64 * 8
    assert counts == [7 * product, 7 * product // 2]  # two products forward, five backward
    assert products.flops == 0


def test_products_in_place_count_too():
    with ProductFlops() as products:
        torch.zeros(3, 5).addmm_(torch.ones(3, 4), torch.ones(4, 5))
    assert products.flops == 2 * 3 * 4 * 5


def test_writes_one_row_per_setting(tmp_path):
    out = tmp_path / "new" / "peaks.csv"
    assert training_peaks.main(["--workloads", "cpu", "--k", "2", "--ways", "shared", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["gradient_checkpointing"] for row in rows] == ["False", "True"]
    assert rows[0]["prompt_tokens"] == "512" and int(rows[0]["peak_live_bytes"]) > 0
    assert int(rows[1]["flops"]) > int(rows[0]["flops"]) > 0
    assert rows[0]["torch"] == torch.__version__


def test_an_unknown_workload_is_named(capsys):
    assert training_peaks.main(["--workloads", "nope"]) == 1
    assert "unknown workload 'nope'; known:" in capsys.readouterr().err
