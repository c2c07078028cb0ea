"""The model of a plan: a hub name, a local folder, a config file, or one of the shapes that are known without a
hub."""

import contextlib
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.initialization import no_init_weights

# Values of the config.json files that the hub publishes under these names.
KNOWN_SHAPES = json.loads((Path(__file__).parent / "plan_models.json").read_text())


def known_name(model: str) -> str | None:
    """`Qwen/Qwen3-8B` for `qwen3-8b`, `Qwen3-8B` and itself; TinyLlama also by its family name."""
    for name in KNOWN_SHAPES:
        short = name.partition("/")[2].lower()
        if model.lower() in (name.lower(), short) or (
            model.lower() in ("tinyllama", "tinyllama-1.1b") and "tiny" in short
        ):
            return name
    return None


def load_config(model: str, **changes) -> PretrainedConfig:
    """The transformers config of `model`, with `changes` on top (a smaller number of layers, ...).

    Raises:
        ValueError: in one sentence, if the name is unknown here, the type unknown to transformers, or the config
        wrong.
    """
    path = Path(model)
    if path.suffix == ".json" or path.is_dir():
        file = path / "config.json" if path.is_dir() else path
        try:
            values = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no config can be read from {file}: {error}; expected a transformers config.json"
            ) from None
        if not isinstance(values, dict) or "model_type" not in values:
            raise ValueError(f"{file} names no model_type; expected a transformers config.json")
    elif known_name(model):
        values = dict(KNOWN_SHAPES[known_name(model)])
    else:
        try:
            values = AutoConfig.from_pretrained(model).to_dict()
        except Exception as error:  # hub, network and parsing each have their own
            reason = str(error).split("\n")[0][:160]
            raise ValueError(
                f"the model {model!r} is neither a folder, a config.json, nor one of {', '.join(KNOWN_SHAPES)}, "
                f"and the hub did not give it ({reason})"
            ) from None
    kind = values.pop("model_type")
    values |= changes
    try:
        return AutoConfig.for_model(kind, **values)
    except ValueError:
        raise ValueError(
            f"transformers knows no model type {kind!r}; expected one such as qwen3, llama, t5 or mt5"
        ) from None
    except Exception as error:
        raise ValueError(
            f"the config of {model!r} cannot be built: {error}; compare it with the model's own"
        ) from None


def is_encoder_decoder(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


def build_model(config: PretrainedConfig, dtype: torch.dtype, *, initialise: bool) -> nn.Module:
    """The model with its language head, with random weights if `initialise`; a dry run has none.

    Raises:
        ValueError: if the config describes no such model.
    """
    auto = AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM
    try:
        with contextlib.nullcontext() if initialise else no_init_weights():
            model = auto.from_config(config, dtype=dtype)
            model.tie_weights()  # left out where weights are not initialised
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(
            f"no model can be built from this {config.model_type} config: {str(error).splitlines()[0]}"
        ) from None
    return model


def hidden_layers(config: PretrainedConfig) -> int:
    text = config.get_text_config(decoder=True)
    return text.num_hidden_layers


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same config with another depth, in the encoder as well."""
    values = config.to_dict()
    kind = values.pop("model_type")
    if is_encoder_decoder(config):
        values |= {"num_layers": layers, "num_decoder_layers": layers}
    else:
        values["num_hidden_layers"] = layers
        if values.get("layer_types"):
            values["layer_types"] = values["layer_types"][:layers]
    return AutoConfig.for_model(kind, **values)
