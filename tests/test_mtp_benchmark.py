"""The benchmark of the multi-token-prediction loss: its meter, its rounds, and what it says of what is missing."""

import argparse
import json

import pytest
import torch

import benchmark_mtp
from lowmem.live_bytes import LiveBytes

TINY = ["--vocab", "700", "--n_future", "2", "--batch", "2", "--length", "8", "--hidden_size", "16"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts the CPU's allocator")
def test_the_meter_counts_allocations_inside_operators():
    def work():
        kept = torch.zeros(1000, 250)  # 1 MB
        for _ in range(3):
            torch.zeros(2000, 250)  # freed at once
        del kept
        torch.zeros(1000, 250)

    assert benchmark_mtp.count_allocated(work) == 3_000_000
    with LiveBytes() as meter:
        work()
    assert meter.peak_bytes == 3_000_000
    rows = torch.ones(4096, 64).as_strided((4096, 64), (64, 1))
    inside = benchmark_mtp.count_allocated(lambda: torch.nn.functional.cross_entropy(rows, torch.zeros(4096).long()))
    assert inside >= rows.numel() * 4, "the log-softmax inside one operator"


@pytest.mark.parametrize("method", [m for m, reason in benchmark_mtp.available().items() if reason is None])
def test_every_method_has_the_gradients_of_naive(method):
    if method == "cce-compile":
        pytest.skip("compiles for a minute; the benchmark itself compares it")
    shape = dict(vocab=700, n_future=3, batch=2, length=9, hidden_size=16, dtype="float32")
    tensors = benchmark_mtp.inputs(argparse.Namespace(**shape))
    found = []
    for one in ("naive", method):
        loss = benchmark_mtp.gradients_of(benchmark_mtp.METHODS[one], tensors)
        found.append([loss, *(x.grad.clone() for x in tensors[:2])])
    for ours, naive in zip(*found[::-1]):
        torch.testing.assert_close(ours, naive, rtol=1e-5, atol=1e-6)


def test_rounds_are_added_and_what_is_done_is_skipped(tmp_path, capsys):
    command = [*TINY, "--runs", str(tmp_path), "--methods", "naive", "hidden", "cce-kernel"]
    assert benchmark_mtp.main([*command, "--rounds", "1"]) == 0
    path = next(tmp_path.rglob("*.json"))
    first = json.loads(path.read_text())
    assert first["methods"]["hidden"]["counted_on"] == "allocator" and first["env"]["threads"] >= 1
    assert [set(done) for done in first["rounds"]] == [{"naive", "hidden"}]
    assert first["methods"]["hidden"]["gradient_difference_relative"] < 1e-5
    if not torch.cuda.is_available():
        assert first["unavailable"]["cce-kernel"] == "pending: needs a GPU"
    assert benchmark_mtp.main([*command, "--rounds", "3"]) == 0
    second = json.loads(path.read_text())
    assert len(second["rounds"]) == 3 and second["rounds"][0] == first["rounds"][0] and len(second["calls"]) == 2
    capsys.readouterr()
    assert benchmark_mtp.main([*command, "--rounds", "3"]) == 0
    assert "done before" in capsys.readouterr().out and json.loads(path.read_text()) == second
