"""Policy, reference and value model of the recipe, from a hub name, a local folder, or the default model."""

import hashlib
import json
import os
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from sentiment.base_model import base_model_folder
from sentiment.config import SentimentConfig

FINGERPRINT = "base_model.json"  # beside an adapter: which weights it was trained on


def model_source(config: SentimentConfig) -> str:
    """What `from_pretrained` takes: a hub name, or the absolute path of a folder, so that an adapter finds its base
    model from anywhere."""
    source = config.model or str(base_model_folder())
    return os.path.abspath(source) if os.path.isdir(source) else source


def load_tokenizer(source: str):
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        # v0.20.0's trainers mask every padding token: with TinyLlama's own, </s>, the end of a sequence would be lost
        if tokenizer.unk_token_id in (None, tokenizer.eos_token_id):
            raise ValueError(f"the tokenizer of {source} has no padding token of its own and no unknown token to use")
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def quantization(config: SentimentConfig):
    """The bitsandbytes config, or None for whole weights.

    Raises:
        ValueError: without a CUDA device or without bitsandbytes.
    """
    if config.load_in_bits is None:
        return None
    if not torch.cuda.is_available():
        raise ValueError(
            f"load_in_bits is {config.load_in_bits}, but there is no CUDA device, and bitsandbytes needs one. Leave "
            "the option out, or set dtype to bfloat16 to halve the weights."
        )
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ValueError(f"load_in_bits is {config.load_in_bits}, but bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_8bit=config.load_in_bits == 8, load_in_4bit=config.load_in_bits == 4)


def _loaded(kind, config: SentimentConfig, source: str, **kwargs):
    kwargs |= {"dtype": getattr(torch, config.dtype)}
    if (quantized := quantization(config)) is not None:
        from peft import prepare_model_for_kbit_training

        model = kind.from_pretrained(source, quantization_config=quantized, device_map={"": 0}, **kwargs)
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    return kind.from_pretrained(source, **kwargs)


def _lora(config: SentimentConfig, **kwargs) -> LoraConfig:
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",  # all but the head
        **kwargs,
    )


def fingerprint(model: torch.nn.Module) -> str:
    """One hash of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_adapter(model: torch.nn.Module, folder: Path, base_sha256: str) -> None:
    """Refuses an adapter that was trained on other weights, or whose layers are not this model's.

    Raises:
        ValueError: with what differs. PEFT itself leaves out layers that it does not find.
    """
    note = folder / FINGERPRINT
    if note.exists() and json.loads(note.read_text())["sha256"] != base_sha256:
        raise ValueError(
            f"the adapter in {folder} was trained on {json.loads(note.read_text())['source']}, whose weights are "
            "others than this model's; give that model as model, or start without the adapter"
        )
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(model.config)
    try:
        adapted = get_peft_model(shapes, LoraConfig.from_pretrained(folder))
    except ValueError as error:  # none of its target modules exist
        raise ValueError(f"the adapter in {folder} is one of another model: {error}") from error
    expected = {name: tuple(p.shape) for name, p in adapted.named_parameters() if "lora_" in name}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    expected = {name.replace(".default", ""): shape for name, shape in expected.items()}
    # an adapter names its modules in full, so PEFT puts one of a shallower model on the first layers alone
    layers = {int(number) for key in found for number in re.findall(r"\.layers\.(\d+)\.", key)}
    if layers and max(layers) + 1 != model.config.num_hidden_layers:
        raise ValueError(
            f"the adapter in {folder} is one of another model: it ends at layer {max(layers)}, and this model has "
            f"{model.config.num_hidden_layers} layers"
        )
    if different := [name for name in sorted(expected | found) if expected.get(name) != found.get(name)]:
        first = different[0]
        raise ValueError(
            f"the adapter in {folder} is one of another model: {len(different)} of {len(expected | found)} tensors "
            f"differ, the first {first}: {found.get(first, 'missing')} there, {expected.get(first, 'missing')} here"
        )


def load_policy(config: SentimentConfig, source: str):
    """The model with its adapters, or the plain model with `lora_rank` 0; and the hash of the weights below them."""
    base = _loaded(AutoModelForCausalLM, config, source)
    sha256 = fingerprint(base)
    if config.adapter:
        check_adapter(base, Path(config.adapter), sha256)
        policy = PeftModel.from_pretrained(base, config.adapter, is_trainable=True)
    else:
        policy = get_peft_model(base, _lora(config, task_type="CAUSAL_LM")) if config.lora_rank else base
    if config.gradient_checkpointing:
        if config.lora_rank:
            policy.enable_input_require_grads()
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return policy, sha256


class WithoutAdapters(torch.nn.Module):
    """A policy as its own reference: the same weights with the adapters off. Holds no copy, and no parameters."""

    _has_logprob_head = True  # the policy below answers with log-probabilities

    def __init__(self, policy: PeftModel):
        super().__init__()
        self.policy = [policy]  # in a list, so that it is not a submodule

    def forward(self, *args, **kwargs):
        with self.policy[0].disable_adapter():
            return self.policy[0](*args, **kwargs)


def load_value_model(config: SentimentConfig, source: str, pad_token_id: int):
    """A second copy of the model with one number per token: PPO's critic. Its head starts at zero."""
    model = _loaded(AutoModelForSequenceClassification, config, source, num_labels=1)
    model.config.pad_token_id = pad_token_id
    if config.lora_rank and config.value_model == "lora":
        # injected, not wrapped: the trainer looks for the backbone by name, and a wrapper answers with another module
        model = inject_adapter_in_model(_lora(config, exclude_modules=["score"]), model)
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.score.weight.data.zero_()
    model.score.weight.requires_grad_(True)
    return model
