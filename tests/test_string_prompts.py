"""The first v0.20.0 patch: text prompts in RLOOTrainer. Order, nothing cut, errors. One process on that tree."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import json, sys
sys.path[:0] = ["experiments", "."]
import variants
variants.activate("string-level@1")
from types import SimpleNamespace
import torch
from datasets import Dataset
import data
from config import ExperimentConfig
from trl import RLOOTrainer
from trl.trainer.rloo_trainer import collate_prompts

tokenizer = data.load_tokenizer(ExperimentConfig())
tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
tokenizer.model_max_length = 4  # a tokenizer that would cut, if it were asked to

def queries(prompts, repeats=1, positions=100):
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))
    accelerator = SimpleNamespace(device="cpu", unwrap_model=lambda m: m)
    trainer = SimpleNamespace(accelerator=accelerator, processing_class=tokenizer, model=model,
                              args=SimpleNamespace(response_length=10))
    batch = collate_prompts([{"prompt": p} for p in prompts]) if isinstance(prompts, list) else prompts
    try:
        return RLOOTrainer._get_queries(trainer, batch, repeats).tolist()
    except ValueError as error:
        return str(error)

one, two = "The quick brown fox jumps over", "Hello"
ids = tokenizer([one, two], padding=True, return_tensors="pt")["input_ids"]
print(json.dumps({
    "ids": ids.tolist(),
    "tiled": queries([one, two], 3),
    "repeat": ids.repeat(3, 1).tolist(),
    "token_ids": queries({"input_ids": ids}, 3),
    "token_ids_with_text": queries({"input_ids": ids, "prompt": ["another", "text"]}, 3),
    "conversation": queries([[{"role": "user", "content": "Hello"}]]),
    "conversation_text": tokenizer("<user>Hello<assistant>")["input_ids"],
    "empty": queries([one, ""]),
    "pad": queries([one, "x <|pad|> y"]),
    "too_long": queries([one], positions=12),
}))
"""


@pytest.fixture(scope="module")
def found():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_text_is_repeated_in_the_order_of_the_token_ids(found):
    assert found["tiled"] == found["repeat"] and len(found["tiled"]) == 6


def test_token_ids_keep_their_ids(found):
    assert found["token_ids"] == found["token_ids_with_text"] == found["repeat"]


def test_nothing_is_cut_by_a_tokenizer_that_could(found):
    assert len(found["ids"][0]) > 4 and found["tiled"][0] == found["ids"][0]


def test_conversations_go_through_the_chat_template(found):
    assert found["conversation"] == [found["conversation_text"]]


@pytest.mark.parametrize(
    "case, message",
    [
        ("empty", "has no tokens"),
        ("pad", "contains the padding token"),
        ("too_long", "exceed the model's 12 positions"),
    ],
)
def test_bad_prompts_end_in_a_sentence(found, case, message):
    assert message in found[case]
