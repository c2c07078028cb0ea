"""Recomputes part of the activations in the backward: some layers, and in them everything but the attention.

Full gradient checkpointing runs every layer twice. Two choices make it cheaper, alone or together:

* `selective`: in a recomputed layer the outputs of the attention and of its projections are kept, and only the rest
  runs again: norms and the MLP, whose intermediates are the largest activations of a layer. The policy is torch's
  selective checkpointing (`create_selective_checkpoint_contexts`); the model's code is untouched.
* `ratio`: the share of layers that are recomputed, the first ones of the model. The backward begins with the last
  layers, which then need no recomputation at the moment when everything is held. No other choice of as many layers has
  a lower peak: see `recomputed_layers`.

    recompute_activations(model, ratio=0.5, selective=True)   # instead of model.gradient_checkpointing_enable()

Works with every transformers model whose layers are `GradientCheckpointingLayer`s, also inside PEFT, and stays in
force when a trainer disables checkpointing for a while and enables it again.
"""

import functools
import math
import warnings
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.shared_prefix_checks import transformers_model

# Matrix products: with an attention module active, its projections.
_PRODUCTS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})
# Of every backend that computes attention in one operator; flash-attention's own kernels carry hashed namespaces.
_ATTENTION_NAMES = ("scaled_dot_product", "flash_attn", "flex_attention")


# Of transformers' and torch's checkpointing; with another value they would be ignored here
_DEFAULT_OPTIONS = {"every_n_layers": 1, "offload": False, "preserve_rng_state": True, "early_stop": True}
_DEFAULT_OPTIONS |= {"determinism_check": "default", "debug": False}


def recomputed_layers(num_layers: int, ratio: float) -> int:
    """How many of `num_layers` are recomputed: the first `ceil(ratio * num_layers)`.

    Why the first. Let a layer hold `a` bytes when kept and `c < a` when recomputed, and let n be recomputed. When the
    backward is at layer l, all layers up to l are still held, and layer l itself in full: with the cheap layers first
    every such sum is the least possible, so the largest of them is, too.

    Raises:
        ValueError: if `ratio` is not within 0 and 1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"gradient_checkpointing_ratio is {ratio}: a share of layers between 0 and 1 expected")
    return math.ceil(round(ratio * num_layers, 6))  # 0.1 * 30 is 3, not 3.0000000000000004


def is_attention_op(op) -> bool:
    """Whether a dispatched operator computes a whole attention."""
    return any(name in str(op) for name in _ATTENTION_NAMES)


def _dropout(op, args, kwargs) -> float:
    """The rate that an attention operator is called with."""
    schema = getattr(op, "_schema", None)  # a higher-order operator (flex attention) has none
    arguments = [] if schema is None else schema.arguments
    named = {argument.name: value for argument, value in zip(arguments, args)} | kwargs
    return named.get("dropout_p") or 0.0


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _SelectivePolicy:
    """Keeps what attention modules return from matrix products and attention operators; the rest is recomputed.

    Falls back to full recomputation, with a warning, if the first layer ran no attention operator.
    """

    def __init__(self):
        self.is_in_attention = False
        self.kept: set[int] = set()  # storages of the products kept in the layer at hand
        self.num_layers = self.num_attention_ops = 0

    def watch(self, attention: nn.Module) -> None:
        def enter(*_):
            self.is_in_attention = True

        def leave(*_):
            self.is_in_attention = False

        attention.register_forward_pre_hook(enter)
        attention.register_forward_hook(leave, always_call=True)

    def __call__(self, ctx, op, *args, **kwargs) -> CheckpointPolicy:
        if is_attention_op(op):
            self.num_attention_ops += 1
            # With dropout it draws random numbers; kept, it would leave those of the layer to what comes after it
            return CheckpointPolicy.PREFER_RECOMPUTE if _dropout(op, args, kwargs) else CheckpointPolicy.MUST_SAVE
        if self.is_in_attention and op in _PRODUCTS:
            if not ctx.is_recompute:
                self.kept.add(_storage(ctx.op_output))
            return CheckpointPolicy.MUST_SAVE
        schema = getattr(op, "_schema", None)
        if schema is not None and schema.is_mutable and not ctx.is_recompute:  # few operators are
            self._refuse_change_of_kept(op, args)
        return CheckpointPolicy.PREFER_RECOMPUTE

    def _refuse_change_of_kept(self, op, args) -> None:
        """torch keeps the tensor and no copy, and the recomputation would change it a second time."""
        for argument, value in zip(op._schema.arguments, args):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written and isinstance(value, torch.Tensor) and _storage(value) in self.kept:
                raise NotImplementedError(
                    f"selective_checkpointing keeps the matrix products of attention, and {op} changes one in place "
                    "(AdaLoRA and a few other adapters, `clip_qkv`): the recomputation would change it again. Turn "
                    "selective_checkpointing off, which recomputes whole layers, or use plain LoRA."
                )

    def contexts(self):
        """`context_fn` of one checkpointed layer."""
        if not torch.is_grad_enabled():  # `checkpoint` then enters neither context, and nothing is seen
            return nullcontext(), nullcontext()
        self.is_in_attention = False  # a recomputation stops early, inside a module
        self.kept.clear()
        if self.num_layers and not self.num_attention_ops:
            if self.num_layers == 1:
                warn_nothing_to_keep("ran no attention operator that could be kept")
            self.num_layers += 1
            return nullcontext(), nullcontext()
        self.num_layers += 1
        return create_selective_checkpoint_contexts(self)


def warn_nothing_to_keep(reason: str) -> None:
    warnings.warn(
        f"selective_checkpointing: the model {reason}, so its layers are recomputed in full. Load it with "
        '`attn_implementation="sdpa"` or a flash attention to keep the attention.',
        stacklevel=3,
    )


def attention_modules(layer: nn.Module) -> list[nn.Module]:
    """The outermost modules of a layer whose class is named `...Attention...`, as transformers names them."""
    found: list[nn.Module] = []
    for child in layer.children():
        found += [child] if "Attention" in type(child).__name__ else attention_modules(child)
    return found


def recompute_activations(model: nn.Module, *, ratio: float = 1.0, selective: bool = False) -> dict:
    """Turns gradient checkpointing on for part of the layers and, if `selective`, for part of each.

    Gradients are those of the model without checkpointing, bit for bit where its operators are deterministic. Also
    decides what later calls of `model.gradient_checkpointing_enable` do: a trainer may call it as it likes.

    Args:
        model: a transformers model, also inside PEFT.
        ratio: see `recomputed_layers`.
        selective: keep the attention of recomputed layers. Needs an attention implementation with an operator of its
            own; with `eager` it warns and recomputes whole layers.

    Returns:
        `num_layers`, `num_recomputed` and `selective` (False after a fallback that is known now).

    Raises:
        ValueError: if `ratio` is not within 0 and 1, or the model's layers cannot be checkpointed.
    """
    inner = transformers_model(model)
    layers = [module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not inner.supports_gradient_checkpointing:
        raise ValueError(f"{type(inner).__name__} has no layers that transformers can recompute: leave it off")
    num_recomputed = recomputed_layers(len(layers), ratio)
    options = {"use_reentrant": False}
    if selective and inner.config._attn_implementation == "eager":
        warn_nothing_to_keep("uses eager attention, which keeps its whole matrix of weights or nothing")
        selective = False
    if selective:
        policy = _SelectivePolicy()
        for layer in layers[:num_recomputed]:
            found = attention_modules(layer)
            if not found:
                warn_nothing_to_keep(f"has layers ({type(layer).__name__}) without an attention module")
                selective = False
                break
            for attention in found:
                policy.watch(attention)
        if selective:
            options["context_fn"] = policy.contexts
    function = functools.partial(checkpoint, **options)

    def enable(gradient_checkpointing_kwargs: dict | None = None, **others) -> None:
        options = gradient_checkpointing_kwargs or {}
        others |= {name: value for name, value in options.items() if name != "use_reentrant"}
        if ignored := {name: value for name, value in others.items() if value != _DEFAULT_OPTIONS.get(name)}:
            raise ValueError(
                f"gradient_checkpointing_ratio and selective_checkpointing decide what is recomputed, and would "
                f"ignore {ignored}. Leave one or the other out."
            )
        if options.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_ratio and selective_checkpointing need non-reentrant checkpointing. Leave "
                "`use_reentrant` out of `gradient_checkpointing_kwargs`, or set it to False."
            )
        PreTrainedModel._activation_checkpointing_enable(inner, {"use_reentrant": False})
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = number < num_recomputed
            layer._gradient_checkpointing_func = function

    inner.gradient_checkpointing_enable = enable  # transformers' own calls go through it, see `_is_overridden`
    enable()
    return {"num_layers": len(layers), "num_recomputed": num_recomputed, "selective": selective}
