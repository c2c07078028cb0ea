"""What the tests share: the folders on the path, and runs of `rloo_probe.py` in one fork tree each."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments"), str(ROOT / "visualization")]


# What DeepSpeed compiles; in the user's folder a lock that a killed process left would let every process wait for ever
EXTENSIONS = tempfile.TemporaryDirectory(prefix="torch-extensions-")
os.environ["TORCH_EXTENSIONS_DIR"] = EXTENSIONS.name


def pytest_collection_modifyitems(items):
    """Python 3.10 gets an older transformers (requirements.txt), which has no cache under gradient checkpointing."""
    from transformers import __version__

    if tuple(map(int, __version__.split(".")[:2])) < (5, 23):
        skip = pytest.mark.skip(reason="the shared prefix needs transformers >= 5.23, which needs Python >= 3.11")
        for item in items:
            if item.path.name.startswith("test_shared_prefix"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def probe_model(tmp_path_factory) -> Path:
    """A small Qwen3 with its tokenizer in which the end-of-sequence token is often likely, so that responses are
    ragged."""
    from transformers import AutoModelForCausalLM

    from config import ExperimentConfig
    from data import load_tokenizer, model_path

    shape = ExperimentConfig(
        vocab_size=0, hidden_size=32, intermediate_size=48, head_dim=8, max_position_embeddings=512, model_seed=1
    )
    tokenizer = load_tokenizer(shape)
    model = AutoModelForCausalLM.from_pretrained(model_path(shape, tokenizer))
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 40
    folder = tmp_path_factory.mktemp("probe-model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_probe(tmp_path_factory, probe_model):
    """`run_probe(variant, extra_arguments, **settings)` -> dict of tensors; every distinct call runs once."""
    from safetensors.torch import load_file

    folder, cache = tmp_path_factory.mktemp("probe"), {}

    def run(variant: str, extra: dict, patch_tree=None, **settings) -> dict:
        defaults = {"model": probe_model, "prompts_per_step": 2, "prompt_tokens": 20, "prompt_tokens_min": 6}
        defaults |= {"response_tokens": 12, "rloo_k": 3, "steps": 3, "epochs_per_batch": 2, "temperature": 0.9}
        options = [f"--{key}={value}" for key, value in (defaults | settings).items()]
        key = json.dumps([variant, extra, options])
        if key not in cache:
            out = folder / f"{len(cache)}.safetensors"
            command = [sys.executable, str(ROOT / "tests/rloo_probe.py"), str(out), json.dumps(extra)]
            command += [f"--variant={variant}", *options]
            result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            assert result.returncode == 0, result.stderr[-3000:]
            cache[key] = load_file(out)
        return cache[key]

    return run


@pytest.fixture(autouse=True)
def environment_of_the_process_stays():
    """What code under test sets for itself (ranks, ports) must not reach the processes that later tests start."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
