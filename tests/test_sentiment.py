"""The sentiment recipe: reward, settings, default model, training, kill and resume, reload, and bad input."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import killing_reward
import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file

from sentiment.base_model import BaseModel, base_model_folder
from sentiment.ceiling import highest_probability
from sentiment.config import PROMPTS, TARGET_WORDS, SentimentConfig
from sentiment.reward import check_rewards, completion_of, word_reward
from sentiment.text import sentences

SMALL = BaseModel(
    vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, steps=20, rows_per_step=8,
    sentence_count=300,
)  # fmt: skip
LETTERS = "killing_reward:reward"


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    import data

    cache, data.CACHE = data.CACHE, tmp_path_factory.mktemp("cache")
    try:
        return base_model_folder(SMALL, log=lambda *a, **k: None)
    finally:
        data.CACHE = cache


def recipe(out: Path, model: Path, *options: str, kill_at: int | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    environment |= {"KILL_AT_BATCH": str(kill_at)} if kill_at else {}
    command = [sys.executable, str(ROOT / "experiments/train_sentiment.py"), "--output_dir", str(out)]
    command += ["--model", str(model), "--samples_per_prompt", "10", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


# ---------------------------------------------------------------- reward


def test_reward_counts_whole_words_only():
    reward = word_reward(list(TARGET_WORDS))
    texts = [" happy!", " unhappy", " gladly", " GREAT news", " goodness", "", " in love.", " smiles"]
    assert reward(texts) == [1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 1.0, -1.0]


def test_completion_starts_behind_the_longest_prompt():
    assert completion_of("I feel so good", ["I feel", "I feel so"]) == " good"
    with pytest.raises(ValueError, match="starts with no prompt"):
        completion_of("We feel so good", list(PROMPTS))


@pytest.mark.parametrize(
    "function, message",
    [
        (killing_reward.too_few, "1 values for 2 completions"),
        (killing_reward.not_a_number, "returned nan for completion 0"),
        (killing_reward.words, "returned 'good' for completion 0"),
        (killing_reward.nothing, "returned None, expected 2 numbers"),
        (lambda texts: [True, False], "returned True"),
        (lambda texts: [1.0, float("inf")], "returned inf for completion 1"),
    ],
)
def test_bad_rewards_end_in_a_sentence(function, message):
    with pytest.raises(ValueError, match=message):
        check_rewards(function(["a", "b"]), ["a", "b"], "of the test")


# ---------------------------------------------------------------- settings


def test_defaults_are_those_of_the_document():
    config = SentimentConfig()
    assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    assert (config.learning_rate, config.batch_size, config.mini_batch_size) == (2e-5, 10, 2)
    assert (config.gradient_accumulation_steps, config.ppo_epochs, config.kl_coef) == (5, 4, 0.2)
    assert (config.epochs, config.max_new_tokens, config.algorithm) == (100, 10, "ppo")
    assert config.prompts == ["I feel so", "This makes me", "I am really"] and config.batches == 30
    assert config.target_words == ["happy", "glad", "good", "great", "smile", "joy", "love"]


@pytest.mark.parametrize("path", sorted((ROOT / "experiments/configs/sentiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_committed_config_is_valid(path):
    SentimentConfig(**yaml.safe_load(path.read_text()))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_words": []}, "list of target words is empty"),
        ({"target_words": ["very good"]}, "not one word"),
        ({"prompts": []}, "at least one is needed"),
        ({"prompts": ["I feel", " "]}, "none may be empty"),
        ({"batch_size": 11}, "is not mini_batch_size 2 x gradient_accumulation_steps 5 = 10"),
        ({"epochs": 101}, "303 samples, not a multiple of batch_size 10; the last 3"),
        ({"algorithm": "rloo", "k": 4}, "not a multiple of k = 4"),
        ({"algorithm": "rloo", "k": 1}, "at least 2 completions"),
        ({"algorithm": "dpo"}, "known: ppo, rloo, grpo"),
        ({"load_in_bits": 3}, "8 or 4"),
        ({"load_in_bits": 4, "lora_rank": 0}, "cannot be trained themselves"),
        ({"adapter": "nowhere"}, "has no adapter_config.json"),
        ({"temperature": 0.0}, "must be positive"),
        ({"ppo_epochs": 0}, "must be at least 1"),
        ({"value_model": "none"}, "known: lora, full"),
    ],
)
def test_bad_settings_end_in_a_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        SentimentConfig(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_quantised_weights_without_a_gpu_are_refused():
    from sentiment.models import quantization

    with pytest.raises(ValueError, match="there is no CUDA device"):
        quantization(SentimentConfig(load_in_bits=8))


# ---------------------------------------------------------------- default model


def test_positive_sentences_are_the_minority_and_tails_are_many():
    reward, drawn = word_reward(list(TARGET_WORDS)), sentences(9000, seed=3)
    for prompt in PROMPTS:
        tails = [text[len(prompt) :] for text in drawn if text.startswith(prompt)]
        positive = sum(value > 0 for value in reward(tails)) / len(tails)
        assert 0.15 < positive < 0.35 and len(set(tails)) > 0.85 * len(tails)


def test_default_model_is_rebuilt_identically_from_its_seed(small_model, tmp_path, monkeypatch):
    import data

    monkeypatch.setattr(data, "CACHE", tmp_path)
    threads = torch.get_num_threads()
    torch.manual_seed(99)  # what was drawn before must not matter
    torch.set_num_threads(2)
    try:
        again = base_model_folder(SMALL, log=lambda *a, **k: None)
        other = base_model_folder(replace(SMALL, seed=1), log=lambda *a, **k: None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    digests = [hashlib.sha256((f / "model.safetensors").read_bytes()).digest() for f in (small_model, again, other)]
    assert digests[0] == digests[1] != digests[2]
    assert (again / "tokenizer.json").read_bytes() == (small_model / "tokenizer.json").read_bytes()


def tiny_llama(head: torch.Tensor):
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size, hidden_size = head.shape
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.lm_head.weight.data.copy_(head)
    return model


def test_ceiling_of_a_head_is_the_best_of_all_directions():
    torch.manual_seed(0)
    head = torch.randn(5, 2)  # two dimensions: every direction can be tried
    model = tiny_llama(head)
    model.model.norm.weight.data.copy_(torch.tensor([0.5, 2.0]))
    angle = torch.linspace(0, 2 * torch.pi, 100_001)
    states = 2**0.5 * torch.stack((angle.cos(), angle.sin()), 1) * model.model.norm.weight.data
    for ids in ([0], [1, 3]):
        best = (states @ head.T).softmax(-1)[:, ids].sum(1).max().item()
        assert highest_probability(model, ids) == pytest.approx(best, abs=1e-4)
    twins = torch.eye(3)[[0, 0, 1]] * 50  # two equal rows: neither can be told from the other
    assert highest_probability(tiny_llama(twins), [0]) == pytest.approx(0.5, abs=1e-6)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match="head without bias"):
        highest_probability(model, [0])


@pytest.mark.slow
def test_head_of_the_default_model_leaves_room_for_the_target_words():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = base_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [token for word in TARGET_WORDS for token in tokenizer(f" {word}")["input_ids"]]
    assert len(ids) == len(TARGET_WORDS)
    assert highest_probability(AutoModelForCausalLM.from_pretrained(folder), ids) > 0.95


# ---------------------------------------------------------------- adapters


def small_adapter(model_folder: Path, out: Path, config: SentimentConfig):
    from train_sentiment import save_model

    from sentiment.models import load_policy, load_tokenizer

    torch.manual_seed(0)
    policy, sha256 = load_policy(config, str(model_folder))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    tokenizer = load_tokenizer(str(model_folder))
    expected = policy.eval()(**tokenizer("I feel so", return_tensors="pt")).logits.detach()
    save_model(replace(config, output_dir=str(out)), policy, tokenizer, str(model_folder), sha256)
    return expected


@pytest.mark.parametrize("merged", [False, True], ids=["adapter", "merged"])
def test_saved_model_reloads_in_the_five_lines(small_model, tmp_path, monkeypatch, merged):
    expected = small_adapter(small_model, tmp_path / "trained_model", SentimentConfig(save_merged=merged))
    monkeypatch.chdir(tmp_path)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("./trained_model")
    model = AutoModelForCausalLM.from_pretrained("./trained_model")

    inputs = tokenizer("I feel so", return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=20)
    assert tokenizer.decode(outputs[0]).startswith("I feel so")
    assert (model(**inputs).logits - expected).abs().max() < 1e-4
    assert not list(Path("trained_model").glob("*.bin")) and not list(Path("trained_model").glob("*.pt"))


def test_adapter_of_another_model_is_refused(small_model, tmp_path, monkeypatch):
    import data
    from sentiment.models import FINGERPRINT, load_policy

    small_adapter(small_model, tmp_path / "a", SentimentConfig())
    config = SentimentConfig(adapter=str(tmp_path / "a"))
    load_policy(config, str(small_model))  # its own model takes it
    monkeypatch.setattr(data, "CACHE", tmp_path)
    quick = replace(SMALL, steps=1, seed=1)
    retrained = base_model_folder(quick, log=lambda *a, **k: None)
    with pytest.raises(ValueError, match="whose weights are others"):
        load_policy(config, str(retrained))
    (tmp_path / "a" / FINGERPRINT).unlink()  # an adapter from elsewhere: the layers have to fit
    deeper = base_model_folder(replace(quick, num_hidden_layers=3), log=lambda *a, **k: None)
    with pytest.raises(ValueError, match="it ends at layer 1, and this model has 3 layers"):
        load_policy(config, str(deeper))
    wider = base_model_folder(replace(quick, hidden_size=48), log=lambda *a, **k: None)
    with pytest.raises(ValueError, match="one of another model: 22 of 28 tensors differ"):
        load_policy(config, str(wider))


# ---------------------------------------------------------------- training


def trained(out: Path) -> tuple[dict, dict]:
    return json.loads((out / "record.json").read_text()), load_file(out / "adapter_model.safetensors")


def kill_and_resume(small_model: Path, folder: Path, *options: str) -> None:
    options = ("--epochs", "20", "--reward", LETTERS, "--learning_rate", "1e-3", "--checkpoint_steps", "2", *options)
    whole = recipe(folder / "whole", small_model, *options)
    assert whole.returncode == 0, whole.stderr[-3000:]
    killed = recipe(folder / "killed", small_model, *options, kill_at=4)
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "killed/checkpoint.safetensors").exists() and not (folder / "killed/record.json").exists()
    resumed = recipe(folder / "killed", small_model, *options)
    assert resumed.returncode == 0 and "going on after 2 of 6 batches" in resumed.stdout, resumed.stderr[-3000:]
    (record, weights), (again, same) = trained(folder / "whole"), trained(folder / "killed")
    assert weights.keys() == same.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, same[name]), name
    start = load_file(small_model / "model.safetensors")  # lora_B starts at zero
    moved = [(w - start.get(name, 0)).abs().max() for name, w in weights.items() if "lora_A" not in name]
    assert max(moved) > 1e-3, "nothing was learned"
    for key in ("history", "discovered", "before", "after"):
        assert record["summary"][key] == again["summary"][key], key
    assert not (folder / "killed/checkpoint.safetensors").exists()
    for file in ("curve.png", "config.json" if "--lora_rank" in options else "adapter_config.json", "tokenizer.json"):
        assert (folder / "whole" / file).stat().st_size > 0


def test_ppo_killed_and_resumed_ends_bit_for_bit_as_without(small_model, tmp_path):
    kill_and_resume(small_model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--algorithm", "rloo", "--k", "2"),
        ("--algorithm", "grpo", "--k", "2"),
        ("--lora_rank", "0", "--value_model", "full", "--save_merged", "True"),
    ],
    ids=["rloo", "grpo", "all-weights"],
)
def test_killed_and_resumed_ends_bit_for_bit_as_without(small_model, tmp_path, options, monkeypatch):
    if "0" in options:  # whole models then
        monkeypatch.setattr(sys.modules[__name__], "trained", lambda out: (
            json.loads((out / "record.json").read_text()), load_file(out / "model.safetensors")))  # fmt: skip
    kill_and_resume(small_model, tmp_path, *options)


@pytest.mark.slow
def test_grpo_runs_on_its_tree_and_shows_the_same(small_model, tmp_path):
    options = "--algorithm grpo --k 2 --epochs 20 --learning_rate 1e-3".split()
    done = recipe(tmp_path, small_model, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    record, _ = trained(tmp_path)
    assert record["env"]["tree"]["pin"] == "v1.16.0" and len(record["summary"]["history"]) == 6


@pytest.mark.slow
def test_a_checkpoint_of_other_settings_is_refused(small_model, tmp_path):
    options = ("--epochs", "20", "--reward", LETTERS, "--checkpoint_steps", "2")
    assert recipe(tmp_path, small_model, *options, kill_at=4).returncode == -signal.SIGKILL
    other = recipe(tmp_path, small_model, *options, "--kl_coef", "0.1")
    assert other.returncode == 1 and "run with kl_coef = 0.2, now it is 0.1" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, code, message",
    [
        (["--reward", "killing_reward:too_few"], 1, "9 values for 10 completions"),
        (["--reward", "killing_reward:not_a_number"], 1, "returned nan for completion 0"),
        (["--reward", "killing_reward:words"], 1, "returned 'good' for completion 0"),
        (["--reward", "killing_reward:no_such"], 2, "unknown reward"),
        (["--tree", "baseline"], 2, "PPO takes a reward function from patch 6 on"),
        (["--algorithm", "grpo", "--tree", "string-level"], 2, "grpo runs on v1.16.0"),
    ],
)
def test_bad_input_ends_in_a_sentence(small_model, tmp_path, options, code, message):
    done = recipe(tmp_path, small_model, *options)
    assert done.returncode == code and message in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["too_few", "not_a_number"])
def test_the_trainer_itself_refuses_a_bad_reward_function(name):
    program = f"""
import sys
sys.path[:0] = ["experiments", ".", "tests"]
import variants
variants.activate("string-level")
from types import SimpleNamespace
import torch, killing_reward
from trl import PPOTrainer
tokenizer = SimpleNamespace(pad_token_id=0, batch_decode=lambda ids, **_: ["a"] * len(ids))
trainer = SimpleNamespace(reward_model=killing_reward.{name}, processing_class=tokenizer)
PPOTrainer._get_scores(trainer, torch.ones(3, 4, dtype=torch.long), 2)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and "for 3 texts, expected as many finite numbers" in done.stderr
