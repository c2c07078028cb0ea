"""A small Qwen3 trunk with n prediction heads that share one LM head, and the critic of the verifiable pipeline."""

import torch
from torch import nn
from transformers import AutoModel, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def trunk_config(config, vocab_size: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        max_position_embeddings=max(config.max_tokens, 32),
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


class PredictionHead(nn.Module):
    """One feed-forward block with its residual: (B, S, H) -> (B, S, H)."""

    def __init__(self, shape: Qwen3Config):
        super().__init__()
        self.norm, self.mlp = Qwen3RMSNorm(shape.hidden_size), Qwen3MLP(shape)
        self.end_norm = Qwen3RMSNorm(shape.hidden_size)

    def forward(self, hidden):
        return self.end_norm(hidden + self.mlp(self.norm(hidden)))


class MtpModel(nn.Module):
    def __init__(self, config, vocab_size: int):
        super().__init__()
        shape = trunk_config(config, vocab_size)
        self.backbone = AutoModel.from_config(shape)
        self.heads = nn.ModuleList(PredictionHead(shape) for _ in range(config.n_future))
        self.lm_head = nn.Linear(shape.hidden_size, vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embed_tokens.weight
        self.to(DTYPES[config.dtype])

    def trunk(self, batch: dict) -> torch.Tensor:
        """(B, S, H)"""
        return self.backbone(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state


class Critic(nn.Module):
    """Expected reward after each token, (B, S)."""

    def __init__(self, config, vocab_size: int):
        super().__init__()
        shape = trunk_config(config, vocab_size)
        self.backbone = AutoModel.from_config(shape)
        self.value = nn.Linear(shape.hidden_size, 1)

    def forward(self, batch: dict) -> torch.Tensor:
        hidden = self.backbone(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        return self.value(hidden).squeeze(-1).sigmoid()
