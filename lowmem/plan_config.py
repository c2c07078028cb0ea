"""What is planned: model, method, workload, and the strategies against memory. One flat dataclass.

Fields that experiments/train.py also has bear the same names, so that its YAML files can be read as they are.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Optional

METHODS = ("rloo", "grpo", "ppo", "sft", "mtp")
ROLLOUT_METHODS = ("rloo", "grpo", "ppo")
LM_HEADS = ("full", "completion", "chunked")
OPTIMIZERS = ("adamw", "adamw_foreach", "adamw_for_loop", "sgd", "adafactor")
DTYPES = ("float32", "bfloat16", "float16", "float64")

# Keys of a training file that do not change memory, or that only say where results go.
WITHOUT_MEMORY = (
    *("workload", "record", "tokenizer_vocab_size", "model_seed", "dataset", "dataset_split", "reward", "steps"),
    *("epochs_per_batch", "learning_rate", "temperature", "seed", "budget_gib", "count_live_bytes"),
    "self_check",  # of a variant's trainer, in its first step; a plan is of the steps after it
)
# Keys of a `memory:` section that the planner simulates, by its own names; those that change no peak of a plan
STRATEGIES = {
    "gradient_checkpointing_ratio": "gradient_checkpointing_ratio",
    "selective_checkpointing": "selective_checkpointing",
    "grad_offload": "offload_optimizer",
}
STRATEGIES_WITHOUT_MEMORY = ("oom_recovery", "long_sequence_tokens")
# The planner's step that is nearest to a variant of experiments/; the trainers themselves: experiments/plan_trainer.py
NEAREST = {
    "baseline": {"lm_head": "full"},
    "upstream": {"lm_head": "completion"},
    "string-level": {"lm_head": "chunked"},
    "shared-prefix": {"lm_head": "completion", "shared_prefix": True},
}


def _setting(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class PlanConfig:
    model: Optional[str] = _setting(None, "hub name, local folder, config.json; default: a Qwen3 of the shape below")
    method: str = _setting("rloo", f"one of {', '.join(METHODS)}")
    dtype: str = _setting("float32", f"type of the weights: {', '.join(DTYPES)}")
    vocab_size: int = _setting(151_936, "of the built model")
    hidden_size: int = _setting(8, "of the built model")
    intermediate_size: int = _setting(32, "of the built model")
    num_hidden_layers: int = _setting(2, "of the built model")
    num_attention_heads: int = _setting(4, "of the built model")
    num_key_value_heads: int = _setting(2, "of the built model")
    head_dim: int = _setting(128, "of the built model")
    max_position_embeddings: int = _setting(40_960, "of the built model")

    prompt_tokens: int = _setting(512, "tokens of the longest prompt (sft: of the input)")
    prompt_tokens_min: Optional[int] = _setting(None, "of the shortest; a smaller number means a padded batch")
    response_tokens: int = _setting(53, "tokens of the longest completion (sft: of the target)")
    rloo_k: int = _setting(4, "completions per prompt")
    prompts_per_step: int = _setting(1, "prompts per optimizer step (sft: sequences)")
    rows_per_micro_batch: Optional[int] = _setting(None, "rows of a training forward; default: all rows of the step")
    rows_per_rollout: Optional[int] = _setting(None, "rows generated at once; default: all rows of the step")
    kl_coef: float = _setting(0.05, "0 needs no reference model")
    num_future_tokens: int = _setting(2, "mtp: tokens predicted at every position")

    lora_rank: int = _setting(0, "rank of LoRA adapters on all linear layers but the head; 0 trains all weights")
    gradient_checkpointing: bool = _setting(False, "recompute activations in the backward")
    gradient_checkpointing_ratio: Optional[float] = _setting(None, "share of the layers that are recomputed, 0 to 1")
    selective_checkpointing: bool = _setting(False, "recomputed layers keep their attention (lowmem.recompute)")
    optimizer: str = _setting("adamw", f"one of {', '.join(OPTIMIZERS)}")
    lm_head: str = _setting("full", f"positions and tiles of the logits: {', '.join(LM_HEADS)}")
    logprob_chunk_tokens: int = _setting(8, "lm_head chunked: tokens whose logits are computed at once")
    shared_prefix: bool = _setting(False, "every prompt computed once for its completions (lowmem.shared_prefix)")
    rows_per_forward: int = _setting(1, "shared prefix, chunked: rows of a forward within the micro-batch")
    attention: str = _setting("sdpa", "sdpa or eager")
    offload_optimizer: bool = _setting(False, "optimizer state and step on the host")
    ranks: int = _setting(1, "devices that share the model's states")
    shard: str = _setting("none", "none, optimizer (ZeRO-1), gradients (ZeRO-2) or weights (ZeRO-3, FSDP)")
    dataloader_num_workers: int = _setting(0, "worker processes of the data loader")

    def __post_init__(self):
        choices = {"method": METHODS, "dtype": DTYPES, "optimizer": OPTIMIZERS, "lm_head": LM_HEADS}
        choices |= {"attention": ("sdpa", "eager"), "shard": ("none", "optimizer", "gradients", "weights")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")
        for name in ("prompt_tokens", "response_tokens", "prompts_per_step", "rows_per_forward", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("logprob_chunk_tokens", "num_future_tokens", "num_hidden_layers", "hidden_size", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.method in ("rloo", "grpo") and self.rloo_k < 2:
            raise ValueError(f"rloo_k is {self.rloo_k}; {self.method} compares at least 2 completions of a prompt")
        if self.lora_rank < 0 or self.dataloader_num_workers < 0:
            raise ValueError("lora_rank and dataloader_num_workers cannot be negative")
        if self.prompt_tokens_min is not None and not 1 <= self.prompt_tokens_min <= self.prompt_tokens:
            raise ValueError(f"prompt_tokens_min is {self.prompt_tokens_min}, outside 1 to {self.prompt_tokens}")
        if self.rows_per_micro_batch is not None and (
            self.rows_per_micro_batch < 1 or self.rows_per_step % self.rows_per_micro_batch
        ):
            raise ValueError(
                f"rows_per_micro_batch is {self.rows_per_micro_batch}; it must divide the {self.rows_per_step} "
                "rows of a step"
            )
        if self.rows_per_rollout is not None and self.rows_per_rollout < 1:
            raise ValueError(f"rows_per_rollout is {self.rows_per_rollout}; expected at least 1")
        if self.shared_prefix and self.method not in ("rloo", "grpo"):
            raise ValueError(
                f"shared_prefix contradicts method {self.method}: only rloo and grpo have completions to share"
            )
        if self.shared_prefix and self.prompt_tokens_min is not None:
            raise ValueError("shared_prefix contradicts prompt_tokens_min: its prompts are never padded")
        if (self.shard == "none") != (self.ranks == 1):
            raise ValueError(
                f"shard {self.shard} contradicts ranks {self.ranks}: sharding needs 2 ranks, and says what"
            )
        ratio = self.gradient_checkpointing_ratio
        if ratio is not None and not 0 <= ratio <= 1:
            raise ValueError(f"gradient_checkpointing_ratio is {ratio}; expected a share between 0 and 1")
        if ratio == 0 and (self.gradient_checkpointing or self.selective_checkpointing):
            raise ValueError("gradient_checkpointing_ratio 0 contradicts recomputation: no layer would be recomputed")
        if self.selective_checkpointing and self.attention == "eager":
            raise ValueError("selective_checkpointing contradicts attention eager, which has no operator to keep")
        if self.offload_optimizer and self.optimizer != "adamw":
            raise ValueError("offload_optimizer contradicts the optimizer: DeepSpeed offloads adamw")

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step * (self.rloo_k if self.method in ("rloo", "grpo") else 1)

    @property
    def micro_batch_rows(self) -> int:
        return self.rows_per_micro_batch or self.rows_per_step

    @property
    def rollout_rows(self) -> int:
        return min(self.rows_per_rollout or self.rows_per_step, self.rows_per_step)

    @property
    def needs_reference(self) -> bool:
        return self.method in ROLLOUT_METHODS and self.kl_coef != 0

    @property
    def recomputed_share(self) -> float:
        """Of the layers."""
        if self.gradient_checkpointing_ratio is not None:
            return self.gradient_checkpointing_ratio
        return 1.0 if self.gradient_checkpointing or self.selective_checkpointing else 0.0

    @property
    def padded(self) -> bool:
        return self.prompt_tokens_min is not None and self.prompt_tokens_min < self.prompt_tokens


def from_training_file(settings: dict, *, nearest: bool = False) -> dict:
    """Keywords of `PlanConfig` out of the YAML of experiments/train.py.

    Args:
        nearest: for a file with a variant, plan the nearest step instead of refusing.

    Raises:
        ValueError: naming a key that neither knows; or for a variant, whose trainer keeps other tensors alive than the
            planner's own step (4.3 GiB against 1.5 for `baseline` at k = 4 of the cpu workload); or for a strategy or
            an attention that the planner cannot simulate.
    """
    names = {f.name for f in fields(PlanConfig)}
    read_here = {"variant", "memory", "attn_implementation"}
    unknown = sorted(settings.keys() - names - set(WITHOUT_MEMORY) - read_here)
    if unknown:
        raise ValueError(
            f"the file has the unknown settings {', '.join(unknown)}; expected those of train.py or of the plan"
        )
    plan = {}
    if variant := settings.get("variant"):
        if not nearest:
            raise ValueError(
                f"the variant {variant!r} is a trainer with a loop of its own; plan it with "
                "experiments/plan_trainer.py, or leave the variant out and say lm_head and shared_prefix"
            )
        plan |= NEAREST.get(variant.removesuffix("-mb1").partition("@")[0], {})
    strategies = settings.get("memory") or {}
    known = {new: strategies[old] for old, new in STRATEGIES.items() if strategies.get(old)}
    on = {name for name, value in strategies.items() if value}
    other = sorted(on - STRATEGIES.keys() - set(STRATEGIES_WITHOUT_MEMORY))
    attention = settings.get("attn_implementation")
    if attention and attention.startswith(("flash", "flex")):
        attention = "sdpa"  # they keep the same: the output, and one statistic for each row
    if not nearest and other:
        raise ValueError(
            f"the memory section has {', '.join(other)}, which is not simulated here; expected {', '.join(STRATEGIES)}"
        )
    if not nearest and attention not in (None, "sdpa", "eager"):
        raise ValueError(f"attn_implementation is {attention!r}, not simulated; expected sdpa, eager or flash")
    plan |= known | ({"attention": attention} if attention in ("sdpa", "eager") else {})
    return plan | {key: value for key, value in settings.items() if key in names and value is not None}


def changed(plan: PlanConfig, **changes) -> PlanConfig:
    """`dataclasses.replace`, which checks the result again."""
    return replace(plan, **changes)
