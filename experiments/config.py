"""The settings of one run, from YAML (`--config`) and the command line. One flat dataclass."""

import json
import warnings
from dataclasses import dataclass, field
from typing import Optional

from variants import ONE_ROW

GIB = 2**30


def _setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class ExperimentConfig:
    variant: str = _setting("baseline", "baseline, string-level, upstream, shared-prefix; see experiments/variants.py")
    workload: str = _setting("cpu", "name of the workload; results are kept under it")
    record: Optional[str] = _setting(None, "path of the JSON record; default results/runs/local/<workload>/<run>.json")

    model: Optional[str] = _setting(None, "hub name or local folder; default: a Qwen3 of the shape below, built here")
    vocab_size: int = _setting(151_936, "vocabulary of the built model; 0 = as many as its tokenizer has")
    tokenizer_vocab_size: int = _setting(8192, "tokens of the built-in tokenizer, at least 258")
    hidden_size: int = _setting(8, "of the built model")
    intermediate_size: int = _setting(32, "of the built model")
    num_hidden_layers: int = _setting(2, "of the built model")
    num_attention_heads: int = _setting(4, "of the built model")
    num_key_value_heads: int = _setting(2, "of the built model")
    head_dim: int = _setting(128, "of the built model")
    max_position_embeddings: int = _setting(40_960, "of the built model")
    model_seed: int = _setting(0, "seed of the built model's weights")
    dtype: str = _setting("float32", "float32, bfloat16 or float64: type of the weights")

    attn_implementation: Optional[str] = _setting(
        None, "sdpa, eager, flash_attention_2, ...; default: the model's own"
    )
    lora_rank: int = _setting(0, "rank of LoRA adapters on all linear layers but the head; 0 trains all weights")

    dataset: Optional[str] = _setting(None, "hub name, or .json(l)/.parquet with a column 'prompt'; default: built in")
    dataset_split: str = _setting("train", "split of a hub data set")
    prompt_tokens: int = _setting(512, "tokens of every built-in prompt")
    prompt_tokens_min: Optional[int] = _setting(None, "shortest built-in prompt, for ragged batches")
    response_tokens: int = _setting(53, "tokens generated for every prompt")
    reward: str = _setting("vowel_share", "a function of experiments/rewards.py, or module:function")

    rloo_k: int = _setting(4, "completions per prompt")
    prompts_per_step: int = _setting(1, "prompts per optimizer step")
    rows_per_micro_batch: Optional[int] = _setting(None, "per_device_train_batch_size; default: all rows of the step")
    rows_per_rollout: Optional[int] = _setting(None, "v0.20.0: rows generated at once; default: all rows of the step")
    steps: int = _setting(3, "optimizer steps")
    epochs_per_batch: int = _setting(1, "optimizer steps over every generated batch (num_ppo_epochs, num_iterations)")
    learning_rate: float = _setting(1e-4, "of AdamW, constant")
    kl_coef: float = _setting(0.05, "weight of the KL penalty to the reference")
    temperature: float = _setting(0.7, "of sampling and of the log-probabilities")
    gradient_checkpointing: bool = _setting(False, "recompute activations in the backward")
    logprob_chunk_tokens: int = _setting(8, "string-level: tokens whose logits are computed at once")
    rows_per_forward: int = _setting(1, "string-level, shared-prefix: rows that a forward holds at once")
    self_check: bool = _setting(True, "shared-prefix: compute a group both ways on first use and compare")
    seed: int = _setting(0, "of data order and sampling")

    memory: Optional[dict | str] = _setting(None, "memory strategies, see docs/memory_strategies.md; as JSON")
    budget_gib: Optional[float] = _setting(None, "memory that the run may use, GiB; an out-of-memory is recorded")
    count_live_bytes: bool = _setting(True, "count live tensor bytes (a little slower); false for timing")

    def __post_init__(self):
        if isinstance(self.memory, str):
            self.memory = json.loads(self.memory)
        if self.memory is not None:
            from lowmem.memory_strategy import parse_memory_settings

            parse_memory_settings(self.memory)
        if self.rloo_k < 2:
            raise ValueError(f"rloo_k is {self.rloo_k}; the leave-one-out baseline needs at least 2 completions")
        for name in ("steps", "prompts_per_step", "prompt_tokens", "response_tokens", "epochs_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.variant.endswith(ONE_ROW):
            if self.rows_per_micro_batch not in (None, 1):
                raise ValueError(f"{self.variant} means one row per micro-batch, not {self.rows_per_micro_batch}")
            self.rows_per_micro_batch = 1
        for name in ("rows_per_rollout", "rows_per_forward", "logprob_chunk_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.rows_per_rollout is not None and self.variant.startswith("upstream"):
            warnings.warn("rows_per_rollout has no effect in v1.16.0, which generates all rows at once", stacklevel=2)
        if self.rows_per_micro_batch is not None and (
            self.rows_per_micro_batch < 1 or self.rows_per_step % self.rows_per_micro_batch
        ):
            raise ValueError(
                f"rows_per_micro_batch is {self.rows_per_micro_batch}; it must divide the {self.rows_per_step} rows "
                f"of a step (rloo_k {self.rloo_k} x prompts_per_step {self.prompts_per_step})"
            )
        if self.variant.startswith("shared-prefix") and self.rows_per_step % self.rows_per_forward:
            raise ValueError(
                f"rows_per_forward is {self.rows_per_forward}; with shared-prefix it must divide the "
                f"{self.rows_per_step} rows of a step"
            )
        if self.dtype not in ("float32", "bfloat16", "float64"):
            raise ValueError(f"dtype is {self.dtype!r}; known: float32, bfloat16, float64")
        if self.prompt_tokens_min is not None and not 1 <= self.prompt_tokens_min <= self.prompt_tokens:
            raise ValueError(f"prompt_tokens_min is {self.prompt_tokens_min}, outside 1 to {self.prompt_tokens}")
        if self.budget_gib is not None and not self.budget_gib > 0:
            raise ValueError(f"budget_gib is {self.budget_gib}; it must be positive")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}; it must be positive")
        if self.dataset is not None and self.prompt_tokens_min is not None:
            warnings.warn("prompt_tokens_min has no effect with a data set: prompts stay as they are", stacklevel=2)

    @property
    def rows_per_step(self) -> int:
        return self.rloo_k * self.prompts_per_step

    @property
    def run_name(self) -> str:
        return f"{self.variant}_k{self.rloo_k}"
