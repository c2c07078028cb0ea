"""What the shared prefix cannot do exactly, found before it runs.

The obvious way is to try and to compare losses, but an on-policy loss says nothing and most of these faults raise no
error. So everything that makes k copies of a prompt differ from one copy, or that loses the prompt's gradient, is
looked for in the configuration and in the modules, and refused with the reason and the way out:

    reasons = why_not_exact(model)
    if reasons:
        raise NotImplementedError(" ".join(reasons))
"""

import functools
import re
from collections.abc import Iterable

import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

# Attention over all earlier tokens, or over a part of them that depends on positions only.
EXACT_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
# RoPE whose angle at a position does not depend on the rest of the sequence.
STATIC_ROPE_TYPES = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
# Model types that add a vector of the position, or scale by it (Beam), and count from the padding when given none;
# besides those with an `nn.Embedding` of positions, of which these count from the mask or have rotary ones in it.
_ABSOLUTE_POSITIONS = frozenset({"ctrl", "xglm", "beam"})
_OTHER_POSITIONS = frozenset({"opt", "roformer"})
_POSITION_NAMES = re.compile(r"(^|[._])(wpe|pos|positions?)([._]|$)")  # position_embeddings, embed_positions, wpe
# PEFT types that are shown to change every token alike, whatever else is in the forward (test_shared_prefix_adapters).
TOKENWISE_ADAPTERS = frozenset(
    ["LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA", "LN_TUNING", "VERA", "VBLORA", "RANDLORA"]
    + ["FOURIERFT", "WAVEFT", "C3A", "MISS", "SHIRA", "ROAD", "DELORA", "GRALORA", "OSF", "TRAINABLE_TOKENS"]
)
_LORA_OF_THE_FORWARD = ("alora_invocation_tokens", "velora_config", "monteclora_config")
# Parts of the names under which transformers and PEFT keep the rate of a random disturbance.
_NOISE_NAMES = ("drop", "jitter", "noise")
_STATEFUL_MODULES = (nn.Conv1d, nn.RNNBase, nn.RNNCellBase, nn.modules.batchnorm._BatchNorm)


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside wrappers (PEFT, DDP), or the model itself.

    Raises:
        NotImplementedError: if there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise NotImplementedError(
        f"{type(model).__name__} holds no transformers model: the shared prefix travels in a transformers `Cache`. "
        "Use a `PreTrainedModel`, or leave the shared prefix off."
    )


def is_stock(module: nn.Module) -> bool:
    """Whether the class is one of transformers' own models or their parts, also where FSDP2 put one over it."""
    kind = type(module)
    if isinstance(module, FSDPModule):
        kind = kind.__mro__[kind._orig_cls_mro_index]
    return kind.__module__.startswith("transformers.models.")


def attention_is_stock(inner: PreTrainedModel) -> bool:
    """Whether the attention modules are transformers' own, and not of a class of the user's."""
    return all(is_stock(module) for module in inner.modules() if hasattr(module, "layer_idx"))


def why_not_exact(model: nn.Module) -> list[str]:
    """Reasons why one copy of the prompt would not equal k copies for `model` as it is now, each with the way out.

    Depends on training or evaluation mode (dropout, gradient checkpointing), so ask again when that changes. Lengths
    are looked at by `why_not_exact_at`.

    Raises:
        NotImplementedError: if there is no transformers model inside.
    """
    inner = transformers_model(model)
    return [
        *_architecture_reasons(inner),
        *_noise_reasons(model),
        *_checkpointing_reasons(model),
        *_wrapper_reasons(model),
    ]


def _architecture_reasons(inner: PreTrainedModel) -> list[str]:
    config = inner.config
    reasons = []
    if config.is_encoder_decoder:
        reasons.append(
            f"{config.model_type} is an encoder-decoder: its prompt is not a prefix of the decoder's sequence. Use a "
            "decoder-only model."
        )
    others = sorted(config.sub_configs.keys() - {"text_config", "attn_config", "ffn_config"})
    if others:
        reasons.append(
            f"{config.model_type} is multimodal ({', '.join(others)}): image positions and bidirectional blocks in "
            "a shared prompt are not shown exact. Load the text model alone, or leave the shared prefix off."
        )
    text = config.get_text_config(decoder=True)
    unknown = sorted(set(getattr(text, "layer_types", None) or ()) - EXACT_LAYER_TYPES)
    stateful = sorted({type(module).__name__ for module in inner.modules() if isinstance(module, _STATEFUL_MODULES)})
    if unknown or stateful or inner._is_stateful:
        found = ", ".join([*unknown, *stateful]) or "a recurrent state"
        reasons.append(
            f"{config.model_type} carries the prompt in something other than keys and values ({found}): a branch "
            "would not see the prompt's state, or would disturb it. Use a model with attention layers only."
        )
    tables = [getattr(module, "position_embeddings", None) for module in inner.modules()]
    if any(getattr(table, "padding_idx", None) is not None for table in tables):
        reasons.append(
            f"{config.model_type} counts positions from its padding token's id, and not from 0. Use another model."
        )
    if getattr(text, "num_kv_shared_layers", 0) or any(getattr(text, "kv_sharing_modes", None) or ()):
        reasons.append(
            f"{config.model_type} shares keys and values between layers outside the cache. Use a model without that."
        )
    one_way = all(getattr(module, "is_causal", True) for module in inner.modules())
    if not one_way or not getattr(text, "is_causal", True) or getattr(text, "use_bidirectional_attention", False):
        reasons.append("The attention is bidirectional: the prompt would see its completions. Use a causal model.")
    if getattr(text, "output_router_logits", False):
        reasons.append(
            "`output_router_logits` is set: the mixture-of-experts auxiliary loss would count the prompt once and not "
            "k times. Set `model.config.output_router_logits = False`, or leave the shared prefix off."
        )
    return reasons


def active_noise(model: nn.Module) -> dict[str, float]:
    """Rates above 0 of random disturbances in modules that are in training mode, by where they are kept.

    A rate is an attribute whose name holds one of `_NOISE_NAMES`, also a dict of them by adapter (PEFT's LoHa and
    LoKr), and the `p` of a module whose class has such a name (torch's dropout, PEFT's multiplicative one).
    """
    found = {}
    for path, module in model.named_modules():
        if not module.training:
            continue
        rates = {name: value for name, value in vars(module).items() if any(part in name for part in _NOISE_NAMES)}
        if any(part in type(module).__name__.lower() for part in _NOISE_NAMES):
            rates["p"] = getattr(module, "p", None)
        for name, value in rates.items():
            by_adapter = {f"{name}.{key}": rate for key, rate in value.items()} if isinstance(value, dict) else {}
            for key, rate in (by_adapter or {name: value}).items():
                if type(rate) in (float, int) and rate > 0:
                    found[f"{path}.{key}"] = rate
    return found


def _noise_reasons(model: nn.Module) -> list[str]:
    """Random disturbances that are switched on: the prompt would draw once where k copies draw k times."""
    found = active_noise(model)
    if not found:
        return []
    first, rate = min(found.items())
    return [
        f"{len(found)} random disturbance(s) are active, the first being {first} = {rate:g}: one copy of the prompt "
        "draws once where k copies draw k times. Set every dropout to 0 (adapters too: `lora_dropout=0`), or call "
        "`model.eval()`."
    ]


def _checkpoint_functions(model: nn.Module):
    """Checkpoint functions that are in use: of transformers' layers, and of torch's wrapper around a layer."""
    for module in model.modules():
        if isinstance(module, CheckpointWrapper):
            yield module.checkpoint_fn
        elif module.training and getattr(module, "gradient_checkpointing", False):
            yield module._gradient_checkpointing_func


def checkpointing_is_active(model: nn.Module) -> bool:
    """Whether a forward now would recompute layers in its backward."""
    return any(True for _ in _checkpoint_functions(model))


def _checkpointing_reasons(model: nn.Module) -> list[str]:
    for function in _checkpoint_functions(model):
        options = function.keywords if isinstance(function, functools.partial) else {}
        if options.get("use_reentrant") is not False:
            return [
                "Gradient checkpointing is reentrant, or does not say that it is not: keys and values would leave "
                "their layer without a gradient and the prompt's part would be lost. Use "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            ]
        if not hasattr(GradientCheckpointingLayer, "_can_checkpoint_with_cache"):
            return [
                f"transformers {transformers.__version__} takes the cache away from checkpointed layers. Use "
                "transformers >= 5.23 (Python >= 3.11), or switch gradient checkpointing off."
            ]
    return []


def _wrapper_reasons(model: nn.Module) -> list[str]:
    reasons = []
    if any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        reasons.append(
            "The model is compiled by `torch.compile`, with which the shared prefix is not shown exact. Pass the "
            "uncompiled model."
        )
    return reasons + adapter_reasons(model)


def adapter_reasons(model: nn.Module) -> list[str]:
    """Reasons why an adapter would not treat the parts of a sequence as it treats the whole."""
    reasons = []
    adapters = getattr(model, "peft_config", None) or {}
    if any(getattr(adapter, "is_prompt_learning", False) for adapter in adapters.values()):
        reasons.append(
            "The PEFT adapter puts virtual tokens before the prompt, which move its positions. Use LoRA or another "
            "adapter that changes weights."
        )
    if names := forward_dependent_adapters(model):
        reasons.append(
            f"The PEFT adapter ({', '.join(names)}) depends on the forward that it is in, or is not known to treat "
            "every token alike: activated LoRA looks for its invocation among the tokens at hand, Lily averages over "
            "them, VeLoRA keeps statistics of them, Shadow sees no cached prompt, PVeRA and MonteCLoRA draw noise. "
            "Use LoRA or another adapter that treats every token alike."
        )
    return reasons


def forward_dependent_adapters(model: nn.Module) -> list[str]:
    """Adapters for which a token's result is not known to be the same in every forward; virtual tokens left out."""
    found = set()
    for adapter in (getattr(model, "peft_config", None) or {}).values():
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        if kind not in TOKENWISE_ADAPTERS and not getattr(adapter, "is_prompt_learning", False):
            found.add(kind)
        found |= {f"{kind} with {name}" for name in _LORA_OF_THE_FORWARD if getattr(adapter, name, None) is not None}
    return sorted(found)


def why_not_exact_at(model: nn.Module, shortest: int, longest: int) -> list[str]:
    """Reasons why forwards over `shortest` to `longest` tokens would not rotate a position by the same angle.

    RoPE of type `dynamic` and `longrope` recomputes its angles from the longest position of the forward at hand, so a
    prompt alone and a prompt with its completion differ. Exact again when all lengths fall on one side of the switch
    (`dynamic`: below it, because above it every length has angles of its own).
    """
    text = transformers_model(model).config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or {}
    per_layer_type = [parameters] if "rope_type" in parameters else list(parameters.values())
    reasons = []
    for rope in per_layer_type:
        if not isinstance(rope, dict) or rope.get("rope_type", "default") in STATIC_ROPE_TYPES:
            continue
        rope_type = rope["rope_type"]
        switch = _rope_switch(rope, text)
        if rope_type == "longrope":
            exact = longest <= switch or shortest > switch
        else:
            exact = rope_type == "dynamic" and longest < switch
        if not exact:
            reasons.append(
                f"RoPE of type {rope_type!r} depends on the longest position: forwards over {shortest} tokens and "
                f"over {longest} (with the completion, and the padding of a trainer) are rotated differently (switch "
                f"at {switch} tokens). "
                "Keep all lengths on one side (`dynamic`: below), use a RoPE type whose angles are fixed "
                f"({', '.join(sorted(STATIC_ROPE_TYPES))}), or leave the shared prefix off."
            )
    return reasons


def _rope_switch(rope: dict, text: PreTrainedConfig) -> int:
    if rope["rope_type"] == "longrope":
        return rope["original_max_position_embeddings"]
    return text.max_position_embeddings


def refuse_inexact(model: nn.Module) -> None:
    """Raises NotImplementedError with every reason of `why_not_exact`."""
    _refuse(why_not_exact(model))


def refuse_inexact_lengths(model: nn.Module, shortest: int, longest: int) -> None:
    """Raises NotImplementedError with every reason of `why_not_exact_at`."""
    _refuse(why_not_exact_at(model, shortest, longest))


def adds_positions(model: PreTrainedModel) -> bool:
    """Whether the model adds a vector of the position to every token (learned or not), or scales by the position."""
    model_type = model.config.get_text_config(decoder=True).model_type
    return (
        model_type in _ABSOLUTE_POSITIONS
        or model_type not in _OTHER_POSITIONS
        and any(
            isinstance(module, nn.Embedding) and _POSITION_NAMES.search(name)  # or PEFT's `wpe.base_layer`
            for name, module in model.named_modules()
        )
    )


def refuse_inexact_padding(model: nn.Module, num_padding: int, longest: int) -> None:
    """Raises NotImplementedError if the plain computation of left-padded rows depends on the padding.

    A forward that is given no positions counts them from the padding. RoPE does not mind, since it goes by distances.

    Args:
        num_padding: most tokens of padding that a row has.
        longest: tokens of a row with its padding and its completion.
    """
    inner = transformers_model(model)
    text = inner.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    scale_steps = [  # positions after which queries are scaled otherwise
        getattr(text, "floor_scale", None) if getattr(text, "attn_temperature_tuning", False) else None,
        rope.get("original_max_position_embeddings") if rope.get("llama_4_scaling_beta") else None,
    ]
    is_scaled = any(step and longest >= step for step in scale_steps)
    if num_padding and (is_scaled or adds_positions(inner)):
        _refuse(
            [
                f"{text.model_type} goes by absolute positions, which the plain computation counts from the padding "
                f"at the left of a row (up to {num_padding} tokens here) and the shared prefix from its first token. "
                "Give the prompts of a batch one length (no `pad_to_multiple_of`), or leave the shared prefix off."
            ]
        )


def _refuse(reasons: list[str]) -> None:
    if reasons:
        raise NotImplementedError("The shared prefix would not be exact here. " + " ".join(reasons))


def lasting_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that nothing writes in a forward. PEFT's LoRA on a parameter (experts) puts its own base back in each."""
    wrappers = (module for module in model.modules() if hasattr(module, "parameter_name"))
    rewritten = {id(module.get_param()) for module in wrappers if hasattr(module, "get_param")}
    return [parameter for parameter in model.parameters() if id(parameter) not in rewritten]


def weight_versions(parameters: Iterable[nn.Parameter]) -> list[tuple[int, bool]]:
    """What changes when a weight is written in place, or when an adapter in training is switched on or off."""
    return [(parameter._version, parameter.requires_grad) for parameter in parameters]


def adapter_states(model: nn.Module) -> list[tuple]:
    """What changes when an adapter is switched on or off, also a frozen one, or merged (PEFT, layer by layer)."""
    layers = (module for module in model.modules() if hasattr(module, "merged_adapters"))
    return [(layer.disable_adapters, *layer.active_adapters, *layer.merged_adapters) for layer in layers]
