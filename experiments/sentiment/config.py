"""The settings of the sentiment recipe, from YAML (`--config`) and the command line. One flat dataclass.

The defaults are those of the document that the recipe follows: LoRA, PPO and training settings, prompts and words.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

from sentiment.reward import word_finder

TREES = {"ppo": "string-level", "rloo": "string-level", "grpo": "upstream"}
PROMPTS = ("I feel so", "This makes me", "I am really")
TARGET_WORDS = ("happy", "glad", "good", "great", "smile", "joy", "love")


def _setting(default, help: str):
    return field(default=default, metadata={"help": help})


def _settings(default: tuple, help: str):
    return field(default_factory=lambda: list(default), metadata={"help": help})


@dataclass
class SentimentConfig:
    algorithm: str = _setting("ppo", "ppo or rloo (TRL v0.20.0), or grpo (v1.16.0)")
    k: int = _setting(2, "rloo, grpo: completions per prompt; ppo takes one")
    tree: Optional[str] = _setting(None, "tree of the fork (variants.py); default string-level, for grpo upstream")

    model: Optional[str] = _setting(None, "hub name or local folder; default: a small Llama, pre-trained here once")
    load_in_bits: Optional[int] = _setting(None, "8 or 4: quantised weights by bitsandbytes; needs a CUDA device")
    dtype: str = _setting("float32", "float32, bfloat16 or float64: type of the weights")
    adapter: Optional[str] = _setting(None, "folder of an adapter of this model to go on from; default: a new one")
    lora_rank: int = _setting(16, "rank of the LoRA adapters; 0 trains all weights, with a copy as the reference")
    lora_alpha: int = _setting(32, "strength of the adapters")
    lora_dropout: float = _setting(0.05, "dropout of the adapters; v0.20.0's trainers turn all dropout off")
    value_model: str = _setting("lora", "ppo: 'lora' trains the value model's adapters and head, 'full' all of it")

    learning_rate: float = _setting(2e-5, "of AdamW, constant")
    batch_size: int = _setting(10, "completions per generated batch")
    mini_batch_size: int = _setting(2, "completions per forward and backward")
    gradient_accumulation_steps: int = _setting(5, "mini-batches per optimizer step")
    ppo_epochs: int = _setting(4, "passes over every generated batch, one optimizer step each")
    kl_coef: float = _setting(0.2, "weight of the KL penalty to the untrained model")
    vf_coef: float = _setting(0.1, "ppo: weight of the value loss")
    epochs: int = _setting(100, "times that every prompt is sampled")
    max_new_tokens: int = _setting(10, "tokens per completion, at most")
    temperature: float = _setting(1.0, "of sampling and of the log-probabilities")
    prompts: list[str] = _settings(PROMPTS, "beginnings to continue")
    target_words: list[str] = _settings(TARGET_WORDS, "a completion with one of them as a whole word is rewarded +1")
    reward: Optional[str] = _setting(None, "module:function of your own instead, list of texts -> list of numbers")
    seed: int = _setting(0, "of data order and sampling")

    gradient_checkpointing: bool = _setting(False, "recompute activations in the backward: less memory, slower")
    logprob_chunk_tokens: int = _setting(64, "patched v0.20.0: tokens whose logits are computed at once")

    output_dir: str = _setting("trained_model", "folder of the trained model, its curve and its checkpoint")
    save_merged: bool = _setting(False, "save the whole model with the adapter merged in, instead of the adapter")
    checkpoint_steps: int = _setting(5, "batches between two checkpoints; 0: none")
    restart: bool = _setting(False, "start from the beginning even if the output folder has a checkpoint")
    samples_per_prompt: int = _setting(100, "completions per prompt that are judged before and after the training")
    record: Optional[str] = _setting(None, "path of the JSON record; default: record.json in the output folder")
    count_live_bytes: bool = _setting(False, "count live tensor bytes (slower)")

    def __post_init__(self):
        self._check_numbers()
        if self.algorithm not in TREES:
            raise ValueError(f"algorithm is {self.algorithm!r}; known: {', '.join(TREES)}")
        self.tree = self.tree or TREES[self.algorithm]
        if self.value_model not in ("lora", "full"):
            raise ValueError(f"value_model is {self.value_model!r}; known: lora, full")
        if self.dtype not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"dtype is {self.dtype!r}; known: float32, bfloat16, float64")
        if self.load_in_bits not in (None, 4, 8):
            raise ValueError(f"load_in_bits is {self.load_in_bits}; 8 or 4, or leave it out for whole weights")
        if self.load_in_bits and not self.lora_rank:
            raise ValueError("quantised weights cannot be trained themselves; give lora_rank, for example 16")
        if self.adapter and not self.lora_rank:
            raise ValueError(f"adapter is {self.adapter!r}, but lora_rank 0 trains all weights; leave one of them out")
        if self.adapter and not (Path(self.adapter) / "adapter_config.json").is_file():
            raise ValueError(f"{self.adapter} is no folder of an adapter: it has no adapter_config.json")
        if not self.prompts or not all(isinstance(p, str) and p.strip() for p in self.prompts):
            raise ValueError(f"prompts are {self.prompts!r}; at least one is needed, and none may be empty")
        for number, prompt in enumerate(self.prompts):
            if any(other.startswith(prompt) for at, other in enumerate(self.prompts) if at != number):
                raise ValueError(
                    f"the prompt {prompt!r} begins another one, or is twice in prompts: which one a text continues "
                    "could not be told apart. Leave one out"
                )
        word_finder(self.target_words)
        self._check_batches()

    def _check_numbers(self):
        counts = "batch_size mini_batch_size gradient_accumulation_steps ppo_epochs epochs max_new_tokens k"
        for name in (*counts.split(), "logprob_chunk_tokens", "samples_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("lora_rank", "kl_coef", "vf_coef", "checkpoint_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")

    def _check_batches(self):
        whole = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size != whole:
            raise ValueError(
                f"batch_size {self.batch_size} is not mini_batch_size {self.mini_batch_size} x "
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} = {whole}: every pass over a "
                "batch is one optimizer step"
            )
        if self.algorithm != "ppo" and self.k < 2:
            raise ValueError(f"k is {self.k}; {self.algorithm} compares at least 2 completions of a prompt")
        if self.algorithm != "ppo" and self.batch_size % self.k:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of k = {self.k} completions per prompt")
        if self.samples % self.batch_size:
            raise ValueError(
                f"{self.epochs} epochs of {len(self.prompts)} prompts are {self.samples} samples, not a multiple of "
                f"batch_size {self.batch_size}; the last {self.samples % self.batch_size} would be left out"
            )

    @property
    def samples(self) -> int:
        """Completions sampled for training, whatever the algorithm."""
        return self.epochs * len(self.prompts)

    @property
    def batches(self) -> int:
        return self.samples // self.batch_size

    @property
    def name(self) -> str:
        return self.algorithm if self.algorithm == "ppo" else f"{self.algorithm}_k{self.k}"
