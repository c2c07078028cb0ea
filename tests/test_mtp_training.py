"""The pipelines: tasks checked by running them, one loss computed four ways, weights, and a model that learns."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT

import mtp_losses
from lowmem.mtp_targets import IGNORE_INDEX, shift_labels
from mtp_config import LOSSES, PIPELINES, MtpConfig, parse_config
from mtp_data import batches, collate, encode, load_mtp_tokenizer, load_rows
from mtp_losses import loss_and_gradients, token_losses, validate
from mtp_model import MtpModel
from mtp_tasks import check, evaluate, make_rows
from mtp_weights import excess_weights, make_weigh, td_weights, train_critic

CONFIGS = sorted((ROOT / "experiments/configs/mtp").glob("*.yaml"))
SMALL = dict(rows=200, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, batch_size=6)
SMALL |= dict(critic_steps=3, reference_steps=3, validation_rows=12, steps=3)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_committed_config_loads(path):
    config = MtpConfig(**yaml.safe_load(path.read_text()))
    assert config.workload == path.stem, "records would be kept under another name"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"pipeline": "dpo"}, "pipeline is 'dpo'; known: baseline, verifiable, rho1"),
        ({"loss": "fused"}, "loss is 'fused'; known: naive"),
        ({"n_future": 0}, "n_future is 0"),
        ({"rho1_top_share": 0}, "rho1_top_share is 0"),
        ({"hidden_size": 10}, "multiple of 2 x num_attention_heads"),
        ({"td_weight_min": 4}, "out of order"),
        ({"budget_gib": -1}, "must be positive"),
        ({"batch_size": 5000}, "more than the 4000 rows"),
    ],
)
def test_bad_settings_end_in_a_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        MtpConfig(**settings)


def test_file_and_command_line(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("n_future: 2\nsteps: 7\n")
    config = parse_config(["--config", str(file), "--steps", "9"])
    assert (config.n_future, config.steps) == (2, 9)
    file.write_text("n_futur: 2\n")
    with pytest.raises(ValueError, match="unknown settings: n_futur"):
        parse_config(["--config", str(file)])


@pytest.mark.parametrize(
    "prompt, completion, reward",
    [
        ("17+25*2=", "17+50=67", 1.0),
        ("17+25*2=", "17+50=68", 0.0),
        ("17+25*2=", "16+50=67", 0.0),
        ("17+25*2=", "67=17+50", 0.0),
        ("f(2)=7 f(5)=13 def f(x):", " return 2*x+3", 1.0),
        ("f(2)=7 f(5)=13 def f(x):", " return 2*(x+1)+1", 1.0),
        ("f(2)=7 f(5)=13 def f(x):", " return 2*x+4", 0.0),
        ("f(2)=7 f(5)=13 def f(x):", " return __import__('os').getpid()", 0.0),
        ("f(2)=7 f(5)=13 def f(x):", "2*x+3", 0.0),
        ("def f(x):", " return x", 0.0),
        ("1+1=", "", 0.0),
    ],
)
def test_rewards_are_found_by_running(prompt, completion, reward):
    assert check(prompt, completion) == reward


@pytest.mark.parametrize(
    "expression", ["__import__('os')", "x", "9**9", "(" * 200, "999*999*999", "1 if 1 else 2", "True+1", "1.5", ""]
)
def test_the_evaluator_runs_integer_arithmetic_and_nothing_else(expression):
    with pytest.raises(ValueError):
        evaluate(expression)


def test_made_rows_are_right_unless_altered():
    assert all(row["reward"] == 1 for row in make_rows(300, 0.0, seed=0))
    share = sum(row["reward"] for row in make_rows(1000, 0.5, seed=0)) / 1000
    assert 0.5 <= share < 0.6, "an altered digit may be the same one by chance"
    assert make_rows(20, 0.3, seed=1) == make_rows(20, 0.3, seed=1) != make_rows(20, 0.3, seed=2)


def prepared(**settings):
    config = MtpConfig(**(SMALL | settings))
    tokenizer = load_mtp_tokenizer(config)
    rows, held_out = (encode(some, tokenizer, config.max_tokens) for some in load_rows(config))
    torch.manual_seed(config.seed)
    return config, tokenizer, rows, held_out, MtpModel(config, len(tokenizer))


def test_batches_learn_from_completions_only():
    config, tokenizer, rows, _, _ = prepared()
    batch = collate(rows[:5], tokenizer.pad_token_id)
    for row, ids, labels, mask in zip(rows, batch["input_ids"], batch["labels"], batch["attention_mask"]):
        learned = tokenizer.decode(labels[labels != IGNORE_INDEX], skip_special_tokens=False)
        assert learned == row["completion"] + tokenizer.eos_token
        assert tokenizer.decode(ids[mask.bool()]) == row["prompt"] + row["completion"] + tokenizer.eos_token
    seen = [tuple(b["input_ids"].shape) for b in batches(rows, 60, 7, tokenizer.pad_token_id, 0)]
    assert len(seen) == 7 and all(shape[0] == 60 for shape in seen)
    with pytest.raises(ValueError, match="never cut"):
        encode(rows, tokenizer, 10)


def trained(pipeline, loss, dtype="float64", off=0.0):
    config, tokenizer, rows, _, model = prepared(pipeline=pipeline, loss=loss, dtype=dtype)
    weigh = make_weigh(config, rows, tokenizer, len(tokenizer), {})
    if off:
        weigh = lambda batch, targets, losses: torch.tensor([1.0, 1.0, 1.0, 1.0 + off])  # noqa: E731
    # AdamW divides by the root of the squared gradient, which makes a float32 rounding as large as a step
    optimizer = (torch.optim.AdamW if dtype == "float64" else torch.optim.SGD)(model.parameters(), lr=1e-3)
    losses, grads = [], []
    for batch in batches(rows, config.batch_size, config.steps, tokenizer.pad_token_id, config.seed):
        losses.append(loss_and_gradients(config, model, batch, weigh)["weighted"])
        grads.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses), grads[0], list(model.parameters())


@pytest.mark.parametrize(
    "dtype, of_losses, of_gradients, of_parameters", [("float64", 1e-10, 1e-12, 1e-8), ("float32", 1e-5, 1e-5, 1e-5)]
)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_three_steps_of_every_way_match_the_naive_loss(pipeline, dtype, of_losses, of_gradients, of_parameters):
    expected = trained(pipeline, "naive", dtype)
    for loss in LOSSES[1:]:
        found = trained(pipeline, loss, dtype)
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=of_losses)
        for ours, naive in zip(found[1], expected[1]):
            torch.testing.assert_close(ours, naive, rtol=0, atol=of_gradients)
        for ours, naive in zip(found[2], expected[2]):
            torch.testing.assert_close(ours, naive, rtol=0, atol=of_parameters)


def test_a_head_whose_weight_is_off_by_a_little_is_seen():
    expected, found = trained("baseline", "naive"), trained("baseline", "hidden", off=1e-6)
    assert (found[0] - expected[0]).abs().max() > 1e-7
    assert max((a - b).abs().max() for a, b in zip(found[1], expected[1])) > 1e-9


def test_td_weights_are_of_right_rows_only_and_within_bounds():
    config, tokenizer, rows, _, _ = prepared(pipeline="verifiable")
    log = {}
    critic = train_critic(config, rows, tokenizer, len(tokenizer), log)
    batch = collate(rows[:20], tokenizer.pad_token_id)
    weights, real = td_weights(config, critic, batch), batch["labels"] != IGNORE_INDEX
    right = batch["rewards"].bool()
    assert right.any() and not right.all() and len(log["critic_error"]) == config.critic_steps
    assert (weights[~right] == 0).all() and (weights[~real] == 0).all()
    used = weights[right][real[right]]
    assert used.min() >= config.td_weight_min and used.max() <= config.td_weight_max and used.std() > 0


def test_a_critic_prefers_right_completions():
    config, tokenizer, rows, held_out, _ = prepared(
        pipeline="verifiable", critic_steps=150, batch_size=32, rows=1000, validation_rows=200, learning_rate=5e-3
    )
    log = {}
    train_critic(config, rows, tokenizer, len(tokenizer), log)
    mean_reward = sum(row["reward"] for row in rows) / len(rows)
    assert sum(log["critic_error"][-20:]) / 20 < mean_reward * (1 - mean_reward), "no better than the mean reward"


def test_rho1_takes_the_share_of_each_head_with_the_largest_excess():
    config, tokenizer, rows, _, model = prepared(pipeline="rho1", rho1_top_share=0.25)
    reference = MtpModel(config, len(tokenizer))
    batch = collate(rows[:8], tokenizer.pad_token_id)
    targets = shift_labels(batch["labels"], batch["attention_mask"], config.n_future)
    with torch.no_grad():
        losses = token_losses(config, model, batch, targets)
        excess = losses - token_losses(config, reference, batch, targets)
    weights = excess_weights(config, reference, batch, targets, losses)
    for k in range(config.n_future):
        real = targets[..., k] != IGNORE_INDEX
        chosen = weights[..., k].bool()
        assert chosen.sum() == round(0.25 * real.sum().item()) and not chosen[~real].any()
        assert excess[..., k][chosen].min() >= excess[..., k][real & ~chosen].max()


def acceptance_after(steps, monkeypatch=None):
    config, tokenizer, rows, held_out, model = prepared(rows=1000, batch_size=24, hidden_size=32, wrong_share=0.0)
    parts = [collate(held_out, tokenizer.pad_token_id)]
    if monkeypatch is not None:  # a fused loss of a known library does this
        exact = mtp_losses.mtp_token_losses

        def loses_the_heads_gradient(hidden, weight, targets, **tile):
            return exact([hidden[0], *(h.detach() for h in hidden[1:])], weight.detach(), targets, **tile)

        monkeypatch.setattr(mtp_losses, "mtp_token_losses", loses_the_heads_gradient)
    before = validate(config, model, parts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in batches(rows, config.batch_size, steps, tokenizer.pad_token_id, 0):
        loss_and_gradients(config, model, batch, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return before["acceptance"], validate(config, model, parts)["acceptance"]


def test_acceptance_rises_in_training(monkeypatch):
    before, after = acceptance_after(60)
    assert before < 0.05 and after > 0.4
    _, broken = acceptance_after(60, monkeypatch)
    assert broken < 0.5 * after, "a loss that loses the extra heads' gradient must be seen"


def run(tmp_path, *options):
    command = [sys.executable, "experiments/train_mtp.py", "--record", str(tmp_path / "run.json"), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    path = tmp_path / "run.json"
    return result, json.loads(path.read_text()) if path.exists() else None


def test_a_run_writes_its_record(tmp_path):
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    result, record = run(tmp_path, *small, "--pipeline=verifiable", "--validate_every=2", "--budget_gib=4")
    assert result.returncode == 0, result.stderr
    assert record["status"] == "ok" and record["env"]["mtp_sha256"] and record["config"]["pipeline"] == "verifiable"
    summary = record["summary"]
    assert [v["step"] for v in summary["validations"]] == [0, 2, 3] and len(summary["metrics"]) == 3
    assert summary["live_peak_bytes"] > 0 and len(record["tokens"]["tokens_per_step"]) == 3


def test_the_naive_loss_runs_out_of_a_budget_that_ours_keeps(tmp_path):
    small = [f"--{name}={value}" for name, value in SMALL.items()] + ["--validate_every=9", "--vocab_size=60000"]
    small += ["--batch_size=32", "--budget_gib=0.75", "--steps=1"]  # the logits of all heads alone are 1 GiB
    result, record = run(tmp_path, *small, "--loss=naive")
    assert result.returncode == 3 and record["status"] == "oom", record["error"]
    result, record = run(tmp_path, *small, "--loss=hidden")
    assert result.returncode == 0 and record["status"] == "ok", record["error"]


def test_unknown_pipeline_and_missing_columns(tmp_path):
    result, record = run(tmp_path, "--pipeline=dpo")
    assert result.returncode == 2 and "known: baseline, verifiable, rho1" in result.stderr and record is None
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}+1=", "completion": f"{i + 1}"}) for i in range(40)))
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    result, record = run(tmp_path, *small, f"--dataset={data}", "--pipeline=rho1")
    assert result.returncode == 1 and "no column ['reward']; pipeline rho1 needs it" in record["error"]
    result, record = run(tmp_path, *small, f"--dataset={data}", "--validate_every=3")
    assert result.returncode == 0 and record["summary"]["training_rows"] == 28


def test_the_matrix_resumes(tmp_path):
    command = [sys.executable, "experiments/run_mtp_matrix.py", "--pipelines", "baseline", "--runs", str(tmp_path)]
    command += [f"--{name}={value}" for name, value in SMALL.items()]
    for said, extra in (
        ("running (missing)", []),
        ("done before", []),
        ("its settings were others", ["--n_future=4"]),
    ):
        record = next(tmp_path.rglob("*.json"), None)
        if extra:
            record.write_text(record.read_text().replace('"learning_rate": 0.003', '"learning_rate": 0.03'))
        result = subprocess.run(command + extra, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert said in result.stdout, result.stdout
