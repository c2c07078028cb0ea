"""The default model of the recipe: a small Llama, pre-trained here on the sentences of text.py for about a minute.

It is kept as safetensors in `.cache/` and rebuilt from its seed, bit for bit on the same machine and libraries: the
pre-training runs on one thread. A hub model or a local folder takes its place through the same `from_pretrained`.
"""

import hashlib
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from data import cached_folder, python_reference
from sentiment.text import sentences

TINYLLAMA = dict(  # the shape of TinyLlama-1.1B, for measurements with random weights
    vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.02, steps=0,
)  # fmt: skip
PAD, EOS = "<|pad|>", "<|endoftext|>"


@dataclass(frozen=True)
class BaseModel:
    """What the default model is made of; every field is part of its name in the cache."""

    vocab_size: int = 2048
    hidden_size: int = 96
    intermediate_size: int = 256
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 128
    initializer_range: float = 0.1  # 1 / sqrt(hidden_size): with 0.02 the rows of the head stay short and alike
    steps: int = 500
    rows_per_step: int = 64
    learning_rate: float = 2e-3
    sentence_count: int = 40_000
    seed: int = 0


def make_tokenizer(text: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],  # no token types: Llama's `generate` refuses them
    )


def pretrain(shape: BaseModel, tokenizer, text: list[str], log=print):
    """A Llama of that shape, trained for `shape.steps` steps of AdamW on whole sentences."""
    threads, rng_state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)  # the order of sums depends on the number of threads
    torch.manual_seed(shape.seed)
    try:
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=shape.vocab_size,
                hidden_size=shape.hidden_size,
                intermediate_size=shape.intermediate_size,
                num_hidden_layers=shape.num_hidden_layers,
                num_attention_heads=shape.num_attention_heads,
                num_key_value_heads=shape.num_key_value_heads,
                max_position_embeddings=shape.max_position_embeddings,
                initializer_range=shape.initializer_range,
                tie_word_embeddings=False,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            dtype=torch.float32,
        )
        rows = [torch.tensor(ids + [tokenizer.eos_token_id]) for ids in tokenizer(text)["input_ids"]]
        optimizer = torch.optim.AdamW(model.parameters(), lr=shape.learning_rate, weight_decay=0.01)
        rng = random.Random(shape.seed)
        for step in range(shape.steps):
            progress = (step + 1) / shape.steps
            warmup_and_cosine = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = shape.learning_rate * warmup_and_cosine
            batch = rng.choices(rows, k=shape.rows_per_step)
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=tokenizer.pad_token_id)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in batch], batch_first=True)
            loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 100 == 0:
                log(f"pre-training: step {step + 1}/{shape.steps}, loss {loss.item():.3f} nats per token", flush=True)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(rng_state)
    return model.eval()


def base_model_folder(shape: BaseModel | None = None, log=print) -> Path:
    """Folder with the pre-trained model and its tokenizer, made where it is missing (a minute on one core)."""
    shape = shape or BaseModel()
    text = sentences(shape.sentence_count, shape.seed)
    reference = python_reference()
    digest = hashlib.sha256("\n".join([*text, reference]).encode()).hexdigest()

    def make(folder: Path) -> None:
        log("pre-training the default model once; it is kept in .cache/", flush=True)
        tokenizer = make_tokenizer([*text, reference], shape.vocab_size)
        pretrain(shape, tokenizer, text, log).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return cached_folder("sentiment-llama", asdict(shape) | {"text": digest, "torch": torch.__version__}, make)
