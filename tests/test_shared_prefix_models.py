"""Tiny models, groups and the plain reference for the shared-prefix tests, and tests of these instruments."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lowmem.shared_prefix import BranchScores, PromptGroup

torch.set_num_threads(1)  # tiny models: more threads only wait for each other

VOCAB_SIZE = 61
WINDOW = 6  # shorter than the prompts and than the longest completion
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "experts_implementation": "eager"}
# name -> model type and what differs from SIZES
MODELS = {
    "qwen3": ("qwen3", {}),
    "qwen3-eager": ("qwen3", {"attn_implementation": "eager"}),
    "llama": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", {"sliding_window": WINDOW, "attn_implementation": "eager", "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2}),
    "phi3": ("phi3", {}),
    "qwen3-moe": ("qwen3_moe", MOE),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}),
}
LENGTHS = [(23, (7, 12, 1, 5)), (9, (4, 9))]  # P and R_i of two groups


class Float64Everywhere(TorchDispatchMode):
    """Makes a float64 model compute in float64: transformers casts RMSNorm, RoPE, softmax and routing to float32."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def make_model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides) -> nn.Module:
    """A model with random weights, wide enough that no output is flat, in training mode."""
    model_type, changes = MODELS.get(name, (name, {}))
    options = {**SIZES, **changes, **overrides}
    attention = options.pop("attn_implementation")
    experts = {key: options.pop(key) for key in ("experts_implementation",) if key in options}
    config = CONFIG_MAPPING[model_type](**options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, **experts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)
    return model.to(dtype).train()


def make_groups(lengths=LENGTHS, seed: int = 1) -> list[PromptGroup]:
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(3, VOCAB_SIZE, (length,), generator=generator)

    return [PromptGroup(ids(num_prompt), [ids(length) for length in nums]) for num_prompt, nums in lengths]


def plain_scores(model: nn.Module, groups: list[PromptGroup]) -> BranchScores:
    """The reference: stock forwards of one unpadded `[prompt, completion]` at a time, with one graph over all."""
    rows = []
    for group in groups:
        for completion in group.completions:
            ids = torch.cat([group.prompt_ids, completion])[None]
            logits = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1]
            rows.append(logits.log_softmax(-1).gather(-1, completion[:, None]).squeeze(-1))
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
    logps = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return BranchScores(torch.arange(len(rows)), logps, None, mask)


class Losses:
    """Losses of N rows with constants known beforehand: advantages, old and reference log-probabilities, counts."""

    def __init__(self, model: nn.Module, groups: list[PromptGroup], seed: int = 2):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            scores = plain_scores(model, groups)
        self.num_rows, self.num_tokens = len(scores.rows), int(scores.mask.sum())
        dtype, shape = scores.logps.dtype, scores.logps.shape
        self.advantages = torch.randn(shape[0], generator=generator).to(dtype)
        self.old_logps = scores.logps + 0.2 * torch.randn(shape, generator=generator).to(dtype)
        self.ref_logps = scores.logps + 0.3 * torch.randn(shape, generator=generator).to(dtype)

    def pg(self, scores: BranchScores) -> torch.Tensor:
        return -(self.advantages[scores.rows] * scores.logps.sum(-1)).sum() / self.num_rows

    def rloo(self, scores: BranchScores) -> torch.Tensor:
        advantages = self.advantages[scores.rows]
        log_ratio = scores.logps - self.old_logps[scores.rows, : scores.logps.shape[1]]
        ratio = (log_ratio * scores.mask).sum(-1).exp()
        return -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / self.num_rows

    def grpo(self, scores: BranchScores) -> torch.Tensor:
        advantages, num_columns = self.advantages[scores.rows, None], scores.logps.shape[1]
        ratio = (scores.logps - self.old_logps[scores.rows, :num_columns]).exp()
        to_ref = self.ref_logps[scores.rows, :num_columns] - scores.logps
        kl = to_ref.exp() - to_ref - 1
        loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) + 0.04 * kl
        return (loss * scores.mask).sum() / self.num_tokens


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Takes the gradients away from the model."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def worst_relative_error(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Largest norm of a difference over the norm of the reference, by tensor.

    The gradient of a key bias without RoPE is zero but for rounding, so norms below 1e-3 of the whole count as that.
    """
    assert ours.keys() == reference.keys() and reference
    whole = torch.stack([ref.norm() for ref in reference.values()]).norm()
    assert whole > 0
    return max(((ours[n] - ref).norm() / ref.norm().clamp(min=1e-3 * whole)).item() for n, ref in reference.items())


@pytest.mark.parametrize("name", MODELS)
def test_float64_mode_leaves_no_float32_rounding(name):
    model = make_model(name)
    ids = torch.cat([make_groups()[0].prompt_ids, make_groups()[0].completions[1]])[None]
    shifted = torch.arange(ids.shape[1])[None] + 3  # RoPE depends on differences of positions only
    with torch.no_grad(), Float64Everywhere():
        difference = (model(input_ids=ids).logits - model(input_ids=ids, position_ids=shifted).logits).abs().max()
    assert difference < 1e-12


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_windows_of_the_models_are_active(name):
    ids = torch.cat([make_groups()[0].prompt_ids, make_groups()[0].completions[1]])[None]
    with torch.no_grad():
        narrow = make_model(name)(input_ids=ids).logits
        wide = make_model(name, sliding_window=100)(input_ids=ids).logits
    assert (narrow - wide).abs().max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_models_are_not_flat(name):
    with torch.no_grad():
        logps = plain_scores(make_model(name), make_groups()).logps
    assert logps[logps != 0].std() > 0.3
