"""TRL v0.20.0's own RLOO tests, unchanged, on the unpatched and on the patched tree.

They name hub models; a folder of that name in the working directory is taken before the hub, so a tiny model made here
stands in. They pass a chat template's result as ids, as transformers 4 returned it, and expect a GPU: a plugin
restores that default and, where there is no GPU, asks for the CPU.
"""

import os
import subprocess
import sys

import pytest

import variants

CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
PLUGIN = """
from transformers import PreTrainedTokenizerBase
stock = PreTrainedTokenizerBase.apply_chat_template
def apply_chat_template(self, *args, return_dict=False, **kwargs):
    return stock(self, *args, return_dict=return_dict, **kwargs)
PreTrainedTokenizerBase.apply_chat_template = apply_chat_template

import torch
from transformers import TrainingArguments
stock_post_init = TrainingArguments.__post_init__
def post_init(self):
    if not torch.cuda.is_available():
        self.use_cpu, self.bf16 = True, False
    stock_post_init(self)
TrainingArguments.__post_init__ = post_init
"""


@pytest.fixture(scope="module")
def offline_hub(tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    import data

    root = tmp_path_factory.mktemp("hub")
    folder = root / "trl-internal-testing/tiny-Qwen2ForCausalLM-2.5"
    tokenizer = AutoTokenizer.from_pretrained(data.default_tokenizer_folder(1024))
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer) + 8,
        hidden_size=8,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (root / "transformers4_defaults.py").write_text(PLUGIN)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["baseline", "string-level"])
def test_upstream_rloo_tests_pass(offline_hub, variant):
    tree = variants.tree_of(variant).path
    env = os.environ | {"PYTHONPATH": f"{tree}:{variants.ROOT}:{offline_hub}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "transformers4_defaults", "-p", "no:cacheprovider"]
    command += [str(tree / "tests/test_rloo_trainer.py"), "--rootdir", str(offline_hub)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, cwd=offline_hub)
    assert result.returncode == 0 and "4 passed" in result.stdout, result.stdout[-4000:] + result.stderr[-2000:]
