"""Prompts, tokenizer and model of a run. Built here by default; hub names and local folders go through the same code.

The default text is that of `pydoc_data.topics`, the language reference which every Python installation carries, and
the default tokenizer is a byte-level BPE trained on it. The default model is built from a config with random weights,
saved once as safetensors in `.cache/`, and loaded from there like any other.
"""

import bisect
import hashlib
import json
import os
import random
import shutil
import tempfile
from itertools import accumulate
from pathlib import Path

from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    set_seed,
)

CACHE = Path(__file__).resolve().parent.parent / ".cache"


def python_reference() -> str:
    """About 700 kB of English prose with code, the same for every run of one Python version."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def cached_folder(name: str, key: dict, make) -> Path:
    """`.cache/<name>-<hash of key>`; `make(folder)` fills it if it is missing. Safe to run twice at once."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{digest}"
    if not folder.exists():
        CACHE.mkdir(exist_ok=True)
        tmp = Path(tempfile.mkdtemp(dir=CACHE))
        make(tmp)
        try:
            os.rename(tmp, folder)
        except OSError:  # another process was faster
            shutil.rmtree(tmp)
    return folder


def default_tokenizer_folder(vocab_size: int) -> Path:
    text = python_reference()

    def make(folder: Path) -> None:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<|pad|>", "<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator([text], trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|endoftext|>", padding_side="left"
        ).save_pretrained(folder)

    return cached_folder("tokenizer", {"text": hashlib.sha256(text.encode()).hexdigest(), "size": vocab_size}, make)


def load_tokenizer(config):
    tokenizer = AutoTokenizer.from_pretrained(
        config.model or default_tokenizer_folder(config.tokenizer_vocab_size), padding_side="left"
    )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer of {config.model} has no padding token; choose a model that has one")
    return tokenizer


def model_config(config, tokenizer):
    """The transformers config of the run's model: the named model's, or a Qwen3 of the given shape.

    Raises:
        ValueError: if the built model has fewer tokens than its tokenizer.
    """
    if config.model:
        return AutoConfig.from_pretrained(config.model)
    if 0 < config.vocab_size < len(tokenizer):
        raise ValueError(
            f"vocab_size is {config.vocab_size}, but the tokenizer has {len(tokenizer)} tokens; lower "
            "tokenizer_vocab_size, or set vocab_size to 0, which is as many"
        )
    return Qwen3Config(
        vocab_size=config.vocab_size or len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def model_path(config, tokenizer) -> str:
    """A hub name or folder that `from_pretrained` takes; the default model is made from its config and seed."""
    if config.model:
        return config.model
    shape = model_config(config, tokenizer)

    def make(folder: Path) -> None:
        set_seed(config.model_seed)
        AutoModelForCausalLM.from_config(shape).save_pretrained(folder)

    return str(cached_folder("model", {"config": shape.to_dict(), "seed": config.model_seed}, make))


def text_prompts(tokenizer, count: int, min_tokens: int, max_tokens: int, seed: int) -> list[str]:
    """`count` passages of the Python reference whose token counts run from `min_tokens` to `max_tokens`, exactly.

    A passage starts and ends between two words of the pre-tokenizer, so its tokens are those that it has in the text.
    """
    text = python_reference()
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    ends = [end for _, (_, end) in pieces]
    encoding = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    tokens_before = [0] * (len(pieces) + 1)  # tokens in the first i pieces
    for _, end in encoding:
        tokens_before[bisect.bisect_left(ends, end) + 1] += 1
    tokens_before = list(accumulate(tokens_before))
    rng = random.Random(seed)
    starts = list(range(len(pieces)))
    rng.shuffle(starts)
    prompts: list[str] = []
    for start in starts:
        if len(prompts) == count:
            break
        wanted = max_tokens if not prompts else rng.randint(min_tokens, max_tokens)
        stop = bisect.bisect_left(tokens_before, tokens_before[start] + wanted)
        if stop >= len(tokens_before) or tokens_before[stop] != tokens_before[start] + wanted:
            continue
        passage = text[pieces[start][1][0] : ends[stop - 1]]
        if len(tokenizer(passage)["input_ids"]) == wanted and passage not in prompts:
            prompts.append(passage)
    if len(prompts) < count:
        raise ValueError(f"the built-in text gives only {len(prompts)} of {count} prompts of {max_tokens} tokens")
    return prompts


def load_prompts(config, tokenizer) -> list[str]:
    """The run's prompts as text, checked: a column `prompt`, none empty, none past the model's positions.

    Raises:
        ValueError: naming the row, the length and the limit. Nothing is ever cut.
    """
    if config.dataset is None:
        count = max(config.prompts_per_step * config.steps, config.prompts_per_step)
        prompts = text_prompts(
            tokenizer, count, config.prompt_tokens_min or config.prompt_tokens, config.prompt_tokens, config.seed
        )
    else:
        prompts = read_dataset(config.dataset, config.dataset_split)
    limit = getattr(model_config(config, tokenizer), "max_position_embeddings", None)
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt {row} of {config.dataset} is empty or not text; remove it from the data set")
        length = len(tokenizer(prompt)["input_ids"])
        if limit and length + config.response_tokens > limit:
            raise ValueError(
                f"prompt {row} has {length} tokens; with a response of {config.response_tokens} it exceeds the "
                f"model's {limit} positions. Prompts are never cut: leave it out, or take a model with more positions."
            )
    if len(prompts) < config.prompts_per_step:
        raise ValueError(f"{len(prompts)} prompts are fewer than prompts_per_step = {config.prompts_per_step}")
    return prompts


def read_dataset(name: str, split: str) -> list[str]:
    suffix = Path(name).suffix
    if suffix in (".json", ".jsonl", ".parquet"):
        if not Path(name).exists():
            raise ValueError(f"the data set {name} does not exist")
        table = load_dataset("parquet" if suffix == ".parquet" else "json", data_files=name, split="train")
    else:
        table = load_dataset(name, split=split)
    if "prompt" not in table.column_names:
        raise ValueError(f"the data set {name} has no column 'prompt'; it has {table.column_names}")
    return list(table["prompt"])


def as_dataset(prompts: list[str], tokenizer, as_text: bool) -> Dataset:
    """What the trainer is given: the text, or, for a tree that only takes ids, the ids of the whole text."""
    if as_text:
        return Dataset.from_dict({"prompt": prompts})
    return Dataset.from_dict({"input_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts]})
