"""Decoding k completions of every prompt from one copy of the prompt's keys and values.

The obvious way repeats the prompt's cache k times and lets every decoding step read, and `DynamicCache` copy, all of
it: k (P + R) tokens. Here a layer keeps n prompts and n k completions apart, P + k R tokens per prompt, and the k
queries of a prompt meet its keys in one matrix product. One softmax runs over both parts, so this is plain attention,
in every precision and on every device, with no kernel of its own.

    layers = [decode_layer(layer, rows) for layer in prefilled.layers]  # rows: which prompt each completion continues
    with prompts_kept_once(model, cache):
        model.generate(..., past_key_values=cache)

Shapes: n prompts, P tokens of the longest prompt, k completions of a prompt, B = n k rows, t tokens decoded so far,
H heads, Hk key-value heads, G = H / Hk, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowmem.shared_prefix_checks import attention_is_stock, transformers_model

IMPLEMENTATION = "shared_prefix_decode"  # name under which transformers finds `_attend`
_BLOCK_TOKENS = 64  # by which the completions' keys and values grow
_HALF = (torch.bfloat16, torch.float16)
# What transformers itself registers, besides the "eager" function of each model. All of them compute plain attention.
_PLAIN_ATTENTION = (sdpa_attention_forward, flash_attention_forward, flex_attention_forward)
# Model types whose attention changes keys and values that it read from the cache, or is more than plain attention.
_OWN_ATTENTION = frozenset({"jetmoe", "doge", "hrm_text"})
# Cache of the generation at hand, and the modules that may read it
_decoding: ContextVar[tuple[Cache, frozenset[nn.Module]] | None] = ContextVar("_decoding", default=None)


class SharedPromptLayer(CacheLayerMixin):
    """One layer's keys and values: the prompts' (n, Hk, P, D) as they are, the completions' (B, Hk, t, D) beside them.

    `update` returns the completions' part only; `_attend` adds the prompts', where it is given what `update` returned.
    """

    is_sliding = False

    def __init__(self, prompt_keys: torch.Tensor, prompt_values: torch.Tensor):
        super().__init__()
        self.prompt_keys, self.prompt_values = prompt_keys, prompt_values
        self.num_tokens = 0
        self.num_updates = self.num_reads = 0
        self.returned = None, None
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        """Nothing to allocate before the first token."""

    def hold(self, num_rows: int, num_tokens: int) -> None:
        """Makes room for `num_tokens` of every row, as if they had been decoded; for a simulation."""
        for name in ("keys", "values"):
            prompt = getattr(self, f"prompt_{name}")
            empty = prompt.new_empty(num_rows, prompt.shape[1], 0, prompt.shape[3])
            setattr(self, name, _with_room(getattr(self, name), empty, num_tokens))
        self.num_tokens = num_tokens

    def update(self, key_states, value_states, *args, **kwargs):
        start, self.num_tokens = self.num_tokens, self.num_tokens + key_states.shape[-2]
        self.returned = None, None  # holds no buffer that a longer one replaces
        self.keys = _with_room(self.keys, key_states, self.num_tokens)
        self.values = _with_room(self.values, value_states, self.num_tokens)
        self.keys[:, :, start : self.num_tokens] = key_states
        self.values[:, :, start : self.num_tokens] = value_states
        self.num_updates += 1
        self.returned = self.keys[:, :, : self.num_tokens], self.values[:, :, : self.num_tokens]
        return self.returned

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self):
        return self.prompt_keys.shape[-2] + self.num_tokens

    def get_max_length(self):
        return -1


def _with_room(buffer: torch.Tensor | None, states: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """`buffer`, or a longer one with its contents, in which `num_tokens` fit."""
    held = 0 if buffer is None else buffer.shape[-2]
    if num_tokens <= held:
        return buffer
    num_blocks = -(-num_tokens // _BLOCK_TOKENS)
    longer = states.new_empty(*states.shape[:-2], num_blocks * _BLOCK_TOKENS, states.shape[-1])
    if held:
        longer[:, :, :held] = buffer
    return longer


def decode_layer(layer: CacheLayerMixin, rows: torch.Tensor) -> CacheLayerMixin | None:
    """A layer that shares the prefilled prompts among `rows` (B,), or None where it cannot.

    It can where the layer keeps every token, and where `rows` continue prompts in order, k times each.
    """
    prompts, counts = rows.unique_consecutive(return_counts=True)
    if type(layer) is not DynamicLayer or len(prompts.unique()) < len(prompts) or (counts != counts[0]).any():
        return None
    if bool((prompts.diff() == 1).all()):
        prompts = slice(int(prompts[0]), int(prompts[-1]) + 1)  # a view, where they are next to each other
    return SharedPromptLayer(layer.keys[prompts], layer.values[prompts])


def _attend(module, query, key, value, attention_mask, scaling=None, softcap=None, **kwargs):
    """Attention of one query token per row (B, H, 1, D) over its prompt and its own completion."""
    cache, modules = _decoding.get() or (None, frozenset())
    if module not in modules:
        raise RuntimeError(
            f"a {type(module).__name__} of another model, or on another thread, ran inside a shared-prefix "
            "generation: the models share one config object. Give each its own (`copy.deepcopy(config)`)."
        )
    if kwargs.get("position_bias") is not None or query.shape[2] != 1:
        raise NotImplementedError(
            f"{type(module).__name__} asks for position biases or for several tokens at once, which the shared prefix "
            "does not decode. Pass `share_cache=False` to `shared_prefix_generate`, or leave the shared prefix off."
        )
    layer, sinks = cache.layers[module.layer_idx], kwargs.get("s_aux")
    if isinstance(layer, SharedPromptLayer) and (key is not layer.returned[0] or value is not layer.returned[1]):
        raise NotImplementedError(
            f"{type(module).__name__} changes keys and values after it read them from the cache, where the prompt's "
            "are not changed. Pass `share_cache=False` to `shared_prefix_generate`, or leave the shared prefix off."
        )
    with torch.autocast(query.device.type, enabled=False):  # it would round the scores to half precision
        return _attention(layer, query, key, value, attention_mask, scaling, softcap, sinks), None


def _attention(layer, query, key, value, attention_mask, scaling, softcap, sinks):
    """softmax([prompt, completion]) [values of both]; (B, 1, H, D). `sinks` (H,): scores that take weight and give no
    value."""
    num_rows, num_kv_heads, _, head_size = key.shape
    scaling = head_size**-0.5 if scaling is None else scaling
    query = query.view(num_rows, num_kv_heads, -1, head_size)  # (B, Hk, G, D)
    scores = _product(query, key.transpose(-1, -2))  # (B, Hk, G, t)
    if isinstance(layer, SharedPromptLayer):
        layer.num_reads += 1
        prompt_scores = _product(_by_prompt(query, layer), layer.prompt_keys.transpose(-1, -2))
        scores = torch.cat([_by_row(prompt_scores, num_rows), scores], -1)  # (B, Hk, G, P + t)
    scores = scores * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:  # (B, 1, 1, P + t), True where a token may be seen
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        sinks = sinks.to(scores.dtype).view(num_kv_heads, -1, 1).expand(num_rows, -1, -1, -1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1].to(value.dtype)
    else:
        weights = scores.softmax(-1).to(value.dtype)
    if isinstance(layer, SharedPromptLayer):
        prompt_weights, weights = weights.split([layer.prompt_keys.shape[-2], key.shape[-2]], -1)
        of_prompt = _product(_by_prompt(prompt_weights, layer), layer.prompt_values)
        output = _by_row(of_prompt, num_rows) + _product(weights, value)
    else:
        output = _product(weights, value)
    return output.to(value.dtype).reshape(num_rows, 1, -1, value.shape[-1])


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of four-dimensional tensors; half precision gives float32, as in the kernels of fused attention."""
    if a.dtype not in _HALF:
        return a @ b
    if not a.is_cuda:
        return a.float() @ b.float()
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32).unflatten(0, a.shape[:2])


def _by_prompt(rows: torch.Tensor, layer: SharedPromptLayer) -> torch.Tensor:
    """(B, Hk, G, X) to (n, Hk, k G, X)."""
    num_prompts = layer.prompt_keys.shape[0]
    return rows.unflatten(0, (num_prompts, -1)).transpose(1, 2).flatten(2, 3)


def _by_row(prompts: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(n, Hk, k G, X) to (B, Hk, G, X)."""
    return prompts.unflatten(2, (num_rows // prompts.shape[0], -1)).transpose(1, 2).flatten(0, 1)


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def can_share_cache(model: nn.Module) -> bool:
    """Whether `_attend` may stand in for the model's attention.

    The model asks transformers for its attention function, and that is plain attention over what the cache holds, not
    an implementation of the user's own (also one registered over a name such as "sdpa", or the eager one of a module
    that is not transformers'), and not over keys expanded from latents (multi-head latent attention).
    """
    inner = transformers_model(model)
    text = inner.config.get_text_config(decoder=True)
    usual = inner.config._attn_implementation or "eager"
    function = ALL_ATTENTION_FUNCTIONS.get(usual)
    is_hub_flash = "/" in usual and "flash" in usual
    is_eager = usual == "eager" and function is None and attention_is_stock(inner)
    is_plain = function in _PLAIN_ATTENTION or is_hub_flash or is_eager
    is_own = text.model_type in _OWN_ATTENTION or getattr(text, "kv_lora_rank", None) is not None
    return is_plain and not is_own and inner._can_set_attn_implementation()


@contextmanager
def prompts_kept_once(model: nn.Module, cache: Cache) -> Iterator[None]:
    """Lets the model attend through `cache`, some of whose layers are `SharedPromptLayer`.

    Raises:
        RuntimeError: at the end, if a layer wrote to the cache and did not read its prompts.
    """
    inner = transformers_model(model)
    usual = inner.config._attn_implementation
    token = _decoding.set((cache, frozenset(inner.modules())))
    try:
        inner.set_attn_implementation(IMPLEMENTATION)
        yield
    finally:
        _decoding.reset(token)
        inner.set_attn_implementation(usual)
    shared = [layer for layer in cache.layers if isinstance(layer, SharedPromptLayer)]
    if any(layer.num_reads != layer.num_updates for layer in shared):
        raise RuntimeError(
            f"{type(inner).__name__} attends past the attention function it was given: its completions did not see "
            "their prompts and are wrong. Pass `share_cache=False` to `shared_prefix_generate`, or leave the shared "
            "prefix off."
        )
