"""Generation of k completions per prompt with every prompt prefilled once.

The obvious way hands `generate` k copies of each prompt and prefills all of them. Here each prompt is prefilled once,
without its last token and without a row of logits; its k completions decode from that one copy of its keys and values
(`lowmem.shared_prefix_decode`); and the unmodified `generate` goes on from the last prompt token. It samples from the
same rows in the same order, so one seed gives the same tokens.

    out = shared_prefix_generate(model, input_ids, attention_mask, num_generations=8, max_new_tokens=64)

Shapes: n prompts, P tokens of the longest prompt, k completions of a prompt, R tokens of the longest completion.
"""

import copy
import inspect
from contextlib import nullcontext

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache

from lowmem.shared_prefix_checks import (
    checkpointing_is_active,
    refuse_inexact,
    refuse_inexact_lengths,
    transformers_model,
)
from lowmem.shared_prefix_decode import SharedPromptLayer, can_share_cache, decode_layer, prompts_kept_once

# Settings of `generate` that make rows of their own or keep the cache elsewhere: value that is accepted besides None.
_ACCEPTED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "cache_implementation": "hybrid",  # what hub models still say; `generate` takes it for the default
    "return_dict_in_generate": False,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "guidance_scale": 1.0,
    "prefill_chunk_size": None,
    "token_healing": False,
}
_REFUSED_ARGUMENTS = ("assistant_model", "custom_generate")
# They may count rows, or time, of all rows, or keep a state from one step to the next.
_REFUSED_IN_PARTS = ("prefix_allowed_tokens_fn", "max_time", "logits_processor", "stopping_criteria")
# What else `generate` takes goes to the model's forward, and the prompt's prefill would not see it.
_KNOWN_ARGUMENTS = {"tokenizer"} | vars(GenerationConfig()).keys()
_KNOWN_ARGUMENTS |= inspect.signature(GenerationMixin.generate).parameters.keys() - {"inputs", "kwargs"}


@torch.no_grad()
def shared_prefix_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_generations: int,
    *,
    max_rows: int | None = None,
    share_cache: bool = True,
    **generate_kwargs,
) -> torch.Tensor:
    """Equals this, without n (k - 1) prefills:

    ```python
    rows = input_ids.repeat_interleave(num_generations, 0)
    model.generate(rows, attention_mask=attention_mask.repeat_interleave(num_generations, 0), **generate_kwargs)
    ```

    With the same seed the tokens are the same, as long as rounding does not decide between two of them: the sums of a
    prefill with n rows and of one with n k rows differ in the last digits.

    Args:
        model: a transformers causal LM, also inside PEFT, in evaluation mode or without gradient checkpointing.
        input_ids: (n, P), int64, left-padded.
        attention_mask: (n, P), 1 on tokens, 0 on the padding at the left.
        num_generations: k.
        max_rows: most rows to generate at once; None for all n k. Fewer rows need less cache, but draw random numbers
            in another order: exact only in distribution when sampling.
        share_cache: keep each prompt's keys and values once, P + k R tokens of cache instead of k (P + R). Layers with
            a sliding window, and models that `can_share_cache` does not know, repeat theirs in any case.
        **generate_kwargs: for `model.generate`, which returns a tensor.

    Returns:
        (n k, P + R): prompts with completions, those of a prompt next to each other, right-padded.

    Raises:
        NotImplementedError: if it would not be exact, with the reason and the way out.
        ValueError: if the shapes do not fit, or the prompts are not left-padded.
    """
    _check_prompts(input_ids, attention_mask, num_generations, max_rows)
    parts = _parts(input_ids.shape[0], num_generations, max_rows, input_ids.device)
    _refuse_settings(model, generate_kwargs, in_parts=len(parts) > 1)
    refuse_inexact(model)
    lengths = attention_mask.sum(-1)
    shortest, longest = int(lengths.min()), int(lengths.max())
    if len(parts) == 1 or shortest == longest:
        refuse_inexact_lengths(model, longest - 1, longest)
    else:  # a part goes by its own longest row, up to its last token
        num_new_tokens = _max_new_tokens(model, generate_kwargs, input_ids.shape[1])
        refuse_inexact_lengths(model, shortest - 1, longest + num_new_tokens)
    if checkpointing_is_active(model):
        raise NotImplementedError(
            "Gradient checkpointing is active: its layers take the cache away from `generate`, which would then see "
            "the last token only. Call `model.eval()`, or disable gradient checkpointing while generating."
        )
    prefilled = _prefill(model, input_ids[:, :-1], attention_mask[:, :-1]) if input_ids.shape[1] > 1 else None
    outputs = []
    for part in parts:
        cache = None if prefilled is None else _select_rows(prefilled, part, share_cache and can_share_cache(model))
        if part is parts[-1]:
            prefilled = None  # what repeats it needs no original any more
        shares = cache is not None and any(isinstance(layer, SharedPromptLayer) for layer in cache.layers)
        with prompts_kept_once(model, cache) if shares else nullcontext():
            outputs.append(
                model.generate(
                    input_ids=input_ids[part],
                    attention_mask=attention_mask[part],
                    past_key_values=cache,
                    **generate_kwargs,
                )
            )
    if len(outputs) == 1:
        return outputs[0]
    width = max(part.shape[1] for part in outputs)
    pad_id = _pad_token_id(model, generate_kwargs)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=pad_id) for part in outputs])


def _prefill(model, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> DynamicCache:
    """Cache of (n, P - 1) tokens, of the kind that `generate` would make."""
    positions = attention_mask.long().cumsum(-1) - 1  # as `generate` numbers them
    positions = positions.masked_fill(attention_mask == 0, 0)
    inner = transformers_model(model)  # whose forward `generate` calls: accelerate's autocast is around PEFT's only
    cache = DynamicCache(config=inner.config.get_text_config(decoder=True))
    inner(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=torch.empty(0, dtype=torch.long, device=input_ids.device),
    )
    if cache.get_seq_length() != input_ids.shape[1]:
        raise RuntimeError(
            f"the prefill left {cache.get_seq_length()} of {input_ids.shape[1]} tokens in the cache: "
            f"{type(inner).__name__} does not write to the cache that it is given. Generate without the shared prefix."
        )
    return cache


def _parts(num_prompts: int, num_generations: int, max_rows: int | None, device) -> list[torch.Tensor]:
    """Prompt of every row, in parts of at most `max_rows` that can share: whole groups, or rows of one group."""
    rows = torch.arange(num_prompts, device=device).repeat_interleave(num_generations)
    if max_rows is None or max_rows >= num_generations:
        return list(rows.split(len(rows) if max_rows is None else max_rows - max_rows % num_generations))
    return [part for group in rows.split(num_generations) for part in group.split(max_rows)]


def _select_rows(cache: DynamicCache, rows: torch.Tensor, share: bool) -> DynamicCache:
    """A cache for the given rows, which repeat prompts; `cache` stays as it is."""
    selected = copy.copy(cache)
    selected.layers = []
    for layer in cache.layers:
        shared = decode_layer(layer, rows) if share else None
        if shared is None:
            shared = copy.copy(layer)
            shared.batch_select_indices(rows.to(layer.keys.device))
        selected.layers.append(shared)
    return selected


def _check_prompts(input_ids, attention_mask, num_generations, max_rows) -> None:
    if input_ids.ndim != 2 or input_ids.numel() == 0 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"ids and mask (n, P) with P >= 1 expected, got {tuple(input_ids.shape)} and {tuple(attention_mask.shape)}"
        )
    if num_generations < 1 or (max_rows is not None and max_rows < 1):
        raise ValueError(f"num_generations and max_rows of at least 1 expected, got {num_generations} and {max_rows}")
    if not bool(attention_mask[:, -1].all()) or bool((attention_mask.long().diff(dim=-1) < 0).any()):
        raise ValueError("prompts must be padded at the left only: every row ends in a token, without holes")


def _setting(model, generate_kwargs: dict, name: str):
    """What `generate` goes by: its argument, else the configuration that it is given, else the model's own."""
    given = generate_kwargs.get("generation_config")
    for value in (generate_kwargs.get(name), getattr(given, name, None), getattr(model.generation_config, name, None)):
        if value is not None:
            return value
    return None


def _refuse_settings(model, generate_kwargs, in_parts: bool) -> None:
    given = [name for name, value in generate_kwargs.items() if value is not None]
    refused = [name for name in given if name in _REFUSED_ARGUMENTS or name not in _KNOWN_ARGUMENTS]
    if in_parts:
        in_all = [name for name in _REFUSED_IN_PARTS if _setting(model, generate_kwargs, name) is not None]
        refused += [f"{name} (with max_rows)" for name in in_all]
    for name, accepted in _ACCEPTED.items():
        value = _setting(model, generate_kwargs, name)
        if value is not None and value != accepted:
            refused.append(f"{name}={value!r}")
    if refused:
        raise NotImplementedError(
            f"`generate` with {', '.join(sorted(refused))} does not go on from a prefilled dynamic cache row by row, "
            "or is not shown exact. Leave it out (k completions come from num_generations; the model's own "
            "`generation_config` counts too), or use `model.generate`."
        )


def _max_new_tokens(model, generate_kwargs, prompt_length: int) -> int:
    """As `generate` reads its settings; with neither it goes 20 tokens on."""
    max_new_tokens, max_length = (_setting(model, generate_kwargs, n) for n in ("max_new_tokens", "max_length"))
    if max_new_tokens is None:
        return 20 if max_length is None else max(0, max_length - prompt_length)
    return max_new_tokens


def _pad_token_id(model, generate_kwargs) -> int:
    for name in ("pad_token_id", "eos_token_id"):
        value = _setting(model, generate_kwargs, name)
        if value is not None:
            return value[0] if isinstance(value, list) else int(value)
    return 0
