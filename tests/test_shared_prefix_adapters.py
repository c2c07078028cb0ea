"""PEFT adapters: those that are accepted give the gradients of plain rows, the others are refused."""

import contextlib

import peft
import pytest
import torch
from test_shared_prefix_models import (
    Float64Everywhere,
    Losses,
    gradients,
    make_groups,
    make_model,
    plain_scores,
    worst_relative_error,
)

from lowmem.oom_recovery import OomRecovery
from lowmem.shared_prefix import shared_prefix_backward
from lowmem.shared_prefix_checks import TOKENWISE_ADAPTERS, forward_dependent_adapters, why_not_exact

ON = {"target_modules": ["q_proj", "v_proj"]}
ACCEPTED = {
    "LORA": peft.LoraConfig(r=4, **ON),
    "LORA, dora": peft.LoraConfig(r=4, use_dora=True, **ON),
    "ADALORA": peft.AdaLoraConfig(init_r=4, total_step=100, **ON),
    "LOHA": peft.LoHaConfig(r=4, **ON),
    "LOKR": peft.LoKrConfig(r=4, **ON),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "OFT": peft.OFTConfig(r=0, oft_block_size=8, **ON),
    "BOFT": peft.BOFTConfig(boft_block_size=8, **ON),
    "HRA": peft.HRAConfig(r=4, **ON),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "VERA": peft.VeraConfig(r=8, **ON),
    "VBLORA": peft.VBLoRAConfig(r=2, num_vectors=12, vector_length=8, topk=2, **ON),
    "RANDLORA": peft.RandLoraConfig(r=4, **ON),
    "FOURIERFT": peft.FourierFTConfig(n_frequency=20, **ON),
    "WAVEFT": peft.WaveFTConfig(n_frequency=20, **ON),
    "C3A": peft.C3AConfig(block_size=8, **ON),
    "MISS": peft.MissConfig(r=4, **ON),
    "SHIRA": peft.ShiraConfig(r=2, **ON),
    "ROAD": peft.RoadConfig(group_size=8, **ON),
    "DELORA": peft.DeloraConfig(r=4, **ON),
    "GRALORA": peft.GraloraConfig(r=4, gralora_k=2, **ON),
    "OSF": peft.OSFConfig(effective_rank=8, **ON),
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig(token_indices=[3, 7, 11]),
}
REFUSED = {
    "MonteCLoRA": (
        peft.LoraConfig(r=4, monteclora_config=peft.MontecloraConfig(), **ON),
        "LORA with monteclora_config",
    ),
    "Lily": (peft.LilyConfig(r=4, num_B=2, stride_A=1, **ON), "LILY"),
    "Shadow": (peft.ShadowConfig(shadow_dropout=0.0), "SHADOW"),
    "adaption prompt": (peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1), "ADAPTION_PROMPT"),
}


def adapted(config, model_type: str = "qwen3"):
    """A float64 model with an adapter none of whose parts is at its neutral start."""
    torch.manual_seed(0)
    model = peft.get_peft_model(make_model(model_type).eval(), config).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_every_accepted_type_is_tried():
    assert TOKENWISE_ADAPTERS == {name.partition(",")[0] for name in ACCEPTED}


@pytest.mark.parametrize("name", ACCEPTED)
def test_gradients_match_plain_rows(name):
    model, groups = adapted(ACCEPTED[name]), make_groups()
    assert forward_dependent_adapters(model) == []
    in_float32 = name == "FOURIERFT"  # by its own choice
    with contextlib.nullcontext() if in_float32 else Float64Everywhere():
        losses = Losses(model, groups)
        losses.pg(plain_scores(model, groups)).backward()
        plain = gradients(model)
        shared_prefix_backward(model, groups, losses.pg, max_branches=2)
        assert worst_relative_error(gradients(model), plain) < (1e-5 if in_float32 else 1e-9)


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused(name):
    config, message = REFUSED[name]
    model = adapted(config, "llama")
    (reason,) = why_not_exact(model)
    assert message in reason and "Use LoRA" in reason
    with pytest.raises(NotImplementedError, match=message):
        OomRecovery(model)
