"""v0.20.0's series reads old log-probabilities from a forward pass: what would make it another distribution than that
sampled from is refused, and half precision keeps the float32 of `generate`'s scores. One process on that tree."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

PROGRAM = """
import json, sys
sys.path[:0] = ["experiments", "."]
import variants
variants.activate("string-level")
import torch
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM
from peft import LoKrConfig, get_peft_model
from trl.trainer.utils import (
    batch_generation,
    check_scores_can_be_recomputed,
    disable_dropout_in_model,
    forward_response_logps,
)

shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
qwen = {**shape, "num_key_value_heads": 1, "intermediate_size": 16, "head_dim": 8}
left = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])

def generate(queries=left, model=None, return_logits=False, **settings):
    torch.manual_seed(0)
    model = model or Qwen3ForCausalLM(Qwen3Config(**qwen))
    model.generation_config.eos_token_id = None
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    disable_dropout_in_model(model.train())
    config = GenerationConfig(max_new_tokens=3, temperature=0.7, top_k=0.0, top_p=1.0, do_sample=True)
    try:
        check_scores_can_be_recomputed(model, queries, 0)
    except ValueError as error:
        return str(error)
    return batch_generation(model, queries, 2, 0, config, return_logits=return_logits), model

neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": [], "min_length": 9}
lokr = LoKrConfig(r=2, rank_dropout=0.1, target_modules=["q_proj"])
opt = {**shape, "ffn_dim": 16, "word_embed_proj_dim": 16}
(tokens, scores), model = generate(model=Qwen3ForCausalLM(Qwen3Config(**qwen)).to(torch.bfloat16), return_logits=True)
with torch.no_grad():
    found = [forward_response_logps(model, tokens, 4, 0, 0.7, float32=cast)[0] for cast in (True, False)]
expected = scores.log_softmax(-1).gather(-1, tokens[:, 4:, None])[..., 0]
print(json.dumps({
    "plain": isinstance(generate(), tuple),
    "repetition_penalty": generate(repetition_penalty=1.1),
    "min_p": generate(min_p=0.05),
    "neutral": isinstance(generate(**neutral), tuple),
    "dropout by adapter": generate(model=get_peft_model(Qwen3ForCausalLM(Qwen3Config(**qwen)), lokr)),
    "functional dropout": generate(model=OPTForCausalLM(OPTConfig(**opt))),
    "no dropout": isinstance(generate(model=OPTForCausalLM(OPTConfig(**opt, dropout=0.0))), tuple),
    "right padding": generate(queries=left.flip(1)),
    "dtypes": [str(logps.dtype) for logps in found],
    "error": (found[0] - expected).abs().max().item(),
}))
"""


@pytest.fixture(scope="module")
def found():
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "case, way_out",
    [
        ("repetition_penalty", "Set them to None in `model.generation_config`"),
        ("min_p", "'min_p': 0.05"),
        ("functional dropout", "Set it to 0 in the model's config"),
        ("dropout by adapter", "rank_dropout"),
        ("right padding", "Pad queries at the left"),
    ],
)
def test_another_distribution_is_refused_with_the_way_out(found, case, way_out):
    assert way_out in str(found[case])


@pytest.mark.parametrize("case", ["plain", "neutral", "no dropout"])
def test_the_same_distribution_is_not_refused(found, case):
    assert found[case] is True


def test_half_precision_keeps_the_precision_of_the_scores(found):
    assert found["dtypes"] == ["torch.float32", "torch.bfloat16"]
    assert found["error"] < 0.05  # the cached decode rounds elsewhere
