"""`lowmem.oom_recovery`: a real out-of-memory under a limit, split and repeated with the gradients of the whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lowmem.oom_recovery import OomRecovery, is_out_of_memory

ROOT = Path(__file__).resolve().parent.parent
ROWS, TOKENS, STEP_ROWS = 8, 24, 16
SHAPE = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}


def build(**extra):
    torch.manual_seed(0)
    shape = SHAPE | {"num_attention_heads": 4, "num_key_value_heads": 2} | extra
    return Qwen3ForCausalLM(Qwen3Config(**shape)).double().train()


def rows_of(number: int):
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(1, 96, (ROWS, TOKENS), generator=generator)
    mask = torch.arange(TOKENS) < torch.randint(3, TOKENS + 1, (ROWS, 1), generator=generator)  # ragged
    return ids, mask, torch.randn(ROWS, generator=generator).double()


def loss_of_rows(model, ids, mask, advantages):
    """(m,), a row's loss."""
    logps = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].log_softmax(-1)
    logps = logps.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    return -logps.sum(-1) * advantages


def train_step(model, recovery=None, fails=lambda attempt, max_rows, part: False, per_part=False):
    """Two micro-batches, the second on top of the gradients of the first; the gradients."""
    attempts = []
    for number in range(STEP_ROWS // ROWS):
        rows = rows_of(number)

        def run(max_rows, rows=rows):
            attempts.append(max_rows)
            for part, start in enumerate(range(0, ROWS, max_rows)):
                losses = loss_of_rows(model, *(tensor[start : start + max_rows] for tensor in rows))
                (losses.mean() / 2 if per_part else losses.sum() / STEP_ROWS).backward()
                if fails(len(attempts), max_rows, part):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

        run(ROWS) if recovery is None else recovery.run(ROWS, run)
    return {name: p.grad.clone() for name, p in model.named_parameters()}, attempts


def assert_close(ours, reference):
    for name, expected in reference.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12, msg=name)


def test_without_an_out_of_memory_nothing_changes():
    model, recovery = build(), OomRecovery(build())
    recovery.model = model
    ours, attempts = train_step(model, recovery)
    reference = train_step(build())[0]
    assert all(torch.equal(ours[name], reference[name]) for name in reference)
    assert attempts == [ROWS, ROWS] and recovery.events == [] and recovery.num_recoveries == 0


@pytest.mark.parametrize("fits", [4, 2, 1])
def test_gradients_are_those_of_the_whole_micro_batch(fits):
    """Out of memory after the backward of the last part that was tried: its gradients are taken back. The second
    micro-batch finds gradients and starts with what fitted."""
    model = build()
    recovery = OomRecovery(model)
    ours, attempts = train_step(model, recovery, lambda attempt, max_rows, part: max_rows > fits)
    assert_close(ours, train_step(build())[0])
    assert attempts == [rows for rows in (8, 4, 2, 1) if rows >= fits] + [fits]
    assert recovery.max_rows == fits and recovery.num_recoveries == 1
    assert [event["retry_rows"] for event in recovery.events] == [rows for rows in (4, 2, 1) if rows >= fits]


def test_gradients_of_earlier_micro_batches_survive():
    model = build()
    recovery = OomRecovery(model)
    ours, attempts = train_step(model, recovery, lambda attempt, max_rows, part: attempt in (2, 3) and part == 0)
    assert attempts == [8, 8, 4, 2] and recovery.num_recoveries == 1
    assert_close(ours, train_step(build())[0])


@pytest.mark.parametrize("fault", ["not put back", "divided by the part"])
def test_a_fault_is_seen(monkeypatch, fault):
    """Negative control."""
    if fault == "not put back":
        monkeypatch.setattr(OomRecovery, "_put_back", staticmethod(lambda before: None))
    model = build()
    ours, _ = train_step(
        model,
        OomRecovery(model),
        lambda attempt, max_rows, part: max_rows > 4,
        per_part=fault == "divided by the part",
    )
    with pytest.raises(AssertionError):
        assert_close(ours, train_step(build())[0])


def test_it_ends_when_one_row_does_not_fit_and_says_so():
    model = build()
    recovery = OomRecovery(model)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory with one row at once.*20.00 MiB"):
        train_step(model, recovery, lambda *_: True)
    assert len(recovery.events) == 3


def test_the_number_of_recoveries_is_bounded():
    model = build()
    with pytest.raises(torch.OutOfMemoryError, match="after 1 recoveries"):
        train_step(model, OomRecovery(model, max_events=1), lambda *_: True)


def test_other_errors_are_not_caught():
    recovery = OomRecovery(build())

    def run(max_rows):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        recovery.run(4, run)
    assert not recovery.events


def test_dropout_is_refused():
    with pytest.raises(NotImplementedError, match="attention_dropout"):
        OomRecovery(build(attention_dropout=0.1))
    noisy = build()
    noisy.get_input_embeddings().neftune_noise_alpha = 5.0  # as transformers' Trainer marks it
    with pytest.raises(NotImplementedError, match="neftune_noise_alpha"):
        OomRecovery(noisy)


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a memory object"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_are_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def real_out_of_memory() -> None:
    """Script: one micro-batch that does not fit under RLIMIT_DATA; prints what happened, as JSON."""
    import resource

    torch.set_num_threads(1)
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "head_dim": 32, "vocab_size": 96}
    tokens, rows = 512, 8
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(num_attention_heads=4, num_key_value_heads=2, **shape)).train()
    ids = torch.randint(1, 96, (rows, tokens))
    advantages = torch.randn(rows)

    def run(max_rows):
        for start in range(0, rows, max_rows):
            part = slice(start, start + max_rows)
            losses = loss_of_rows(model, ids[part], torch.ones_like(ids[part]).bool(), advantages[part])
            (losses.sum() / rows).backward()

    run(2)  # what the libraries allocate once
    model.zero_grad(set_to_none=True)
    run(rows)
    reference = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + 200 * 2**20, resource.RLIM_INFINITY))
    try:
        run(rows)
        plain = "fits"
    except RuntimeError as error:
        plain = str(error) if is_out_of_memory(error) else f"another error: {error}"
    model.zero_grad(set_to_none=True)
    recovery = OomRecovery(model)
    recovery.run(rows, run)
    errors = [(p.grad - g).abs().max().item() / g.abs().max().item() for p, g in zip(model.parameters(), reference)]
    result = {"plain": plain, "events": recovery.events, "max_rows": recovery.max_rows, "error": max(errors)}
    print(json.dumps(result))


def test_a_real_out_of_memory_is_survived():
    command = [sys.executable, __file__]
    environment = {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert "can't allocate memory" in result["plain"]
    assert result["events"] and 1 <= result["max_rows"] < 8
    assert "can't allocate memory" in result["events"][0]["error"]
    assert result["error"] < 1e-5


if __name__ == "__main__":
    real_out_of_memory()
