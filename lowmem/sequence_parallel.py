"""Splits the sequence of a training forward over processes, exactly: activations per process fall close to 1/N.

The obvious way gives sequence peers the same prompts and lets them generate the same completions. It generates
everything twice and is silently wrong when a group of completions lies on several processes. Here every process
generates and scores its own rows, peers exchange the rows afterwards, and only the update splits the sequence:

    peers = make_peers(2)                       # this process and its neighbour
    split_attention(model)                      # attention over the keys and values of all peers
    rows = exchange_rows(own_rows, peers)       # peers now hold the same rows
    logps, entropies = sequence_logps(model, peers, input_ids, attention_mask, num_completion_tokens)
    loss(logps).backward()                      # the same loss on every peer; then average gradients over the world

Attention is the stock operator on this process's queries and on gathered keys and values. The gather is torch's own
autograd-aware collective, whose backward is a reduce-scatter sum. So every peer's gradient is N times its part, and
an engine that averages over the world (DDP, DeepSpeed ZeRO, which need not know about sequences) gives the gradient
of one process: do not scale the loss. Padding is moved to the right first, so causal attention needs no mask, and
there is no S x S tensor, neither per layer nor at all.

Shapes: B rows, T tokens of a padded row, C completion tokens, N peers, S tokens of the longest row without its padding
and rounded up to a multiple of N, L = S / N, H heads, Hk key-value heads, D head size.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_gather_single_autograd
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lowmem.shared_prefix_checks import STATIC_ROPE_TYPES, adapter_reasons, adds_positions, transformers_model

ATTENTION = "lowmem_sequence_parallel"
LONG_ROW = 1024  # tokens from which on padded rows are scored without a dense mask, which has 1 MiB per row here
_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# (model, inputs, labels) -> log-probabilities (B, L) and entropies (B, L) or None. `inputs` go to the model's forward
# as they are; `labels` (B, L) are those of the tokens that follow, -100 where nothing is scored.
ShardForward = Callable[[nn.Module, dict, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
LOGP_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.3}  # nats


class _Wait(torch.autograd.Function):
    """The gathered tensor itself. A view of one that still waits is a wrapper that counts as a storage of its own."""

    @staticmethod
    def forward(ctx, tensor):
        return tensor.trigger_wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad


@dataclass(frozen=True)
class SequencePeers:
    """The processes that split sequences with this one: N consecutive ranks of the world."""

    group: dist.ProcessGroup
    rank: int  # among the peers
    size: int  # N

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenates the peers' tensors, of one shape, along `dim`; differentiable."""
        gathered = all_gather_single_autograd(tensor.movedim(dim, 0).contiguous(), 0, self.group)
        return _Wait.apply(gathered).movedim(0, dim)

    def check_same(self, tensor: torch.Tensor, what: str) -> None:
        """Raises RuntimeError if peers hold different integers: they would mix the rows of different batches."""
        numbers = tensor.flatten().double()
        ramp = torch.arange(1, len(numbers) + 1, device=numbers.device, dtype=torch.float64)
        own = torch.stack([numbers.sum(), (numbers * ramp).sum(), ramp.sum()])[None]
        everyone = self.gather(own, 0)
        if not (everyone == everyone[0]).all():
            raise RuntimeError(
                f"sequence peers hold different {what}: every peer must train on the same rows in the same order "
                f"(checksums {everyone.tolist()}). Draw what orders them from one seed on every peer."
            )

    @contextlib.contextmanager
    def same_random_numbers(self, seed: int) -> Iterator[None]:
        """Peers draw the same numbers on the CPU inside, and go on with their own afterwards."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            yield


def check_sequence_parallel_size(size: int, world_size: int) -> None:
    """Raises ValueError if `world_size` processes cannot form groups of `size`, with the usual cause."""
    if size < 1:
        raise ValueError(f"sequence_parallel_size is {size}; it must be at least 1")
    if world_size % size:
        started = os.environ.get("WORLD_SIZE", "not set")
        raise ValueError(
            f"sequence_parallel_size is {size}, but {world_size} process(es) are running, which is no multiple of it. "
            f"Start a multiple of {size} with `torchrun --nproc_per_node N` (WORLD_SIZE is {started}; `accelerate "
            "launch` with MULTI_CPU starts one process whatever num_processes says)."
        )


def make_peers(size: int) -> SequencePeers:
    """The peers of this process: ranks 0 to N - 1, N to 2 N - 1, and so on. Every process has to call it.

    Raises:
        ValueError: see `check_sequence_parallel_size`.
    """
    check_sequence_parallel_size(size, dist.get_world_size() if dist.is_initialized() else 1)
    if size == 1:
        raise ValueError("sequence_parallel_size is 1: one process has no peers to split a sequence with")
    own = None
    for first in range(0, dist.get_world_size(), size):  # every process takes part in making every group
        group = dist.new_group(list(range(first, first + size)))
        if first <= dist.get_rank() < first + size:
            own = SequencePeers(group, dist.get_rank() - first, size)
    return own


def sequence_attention(module, query, key, value, attention_mask, sequence_peers=None, **kwargs):
    """Causal attention of a shard's queries (B, H, L, D) over the keys and values (B, Hk, L, D) of all peers.

    Without `sequence_peers` it is transformers' sdpa attention: generation, scoring and evaluation.
    """
    if sequence_peers is None:
        if attention_mask is not None and attention_mask.ndim == 2:
            return _attention_of_padded_rows(query, key, value, attention_mask, kwargs.get("scaling")), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    named = {name: kwargs.get(name) for name in ("sliding_window", "softcap", "s_aux", "position_bias")}
    if unknown := [name for name, setting in named.items() if setting is not None]:
        raise NotImplementedError(f"attention with {', '.join(unknown)} is not split over processes; turn it off")
    if attention_mask is not None or kwargs.get("dropout"):
        raise NotImplementedError(
            "a split attention takes neither a mask nor dropout: the mask would have S x S entries, and peers would "
            "draw different numbers. Pass no attention_mask to the model and set dropout to 0."
        )
    if torch.is_autocast_enabled(query.device.type):  # which the operators below do not all see
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    pair = sequence_peers.gather(torch.cat([key, value], -1), 2)  # (B, Hk, S, 2 D)
    end = (sequence_peers.rank + 1) * query.shape[2]  # later keys are in the future of every query here
    keys, values = pair[:, :, :end, : key.shape[-1]], pair[:, :, :end, key.shape[-1] :]
    output = _causal_attention(query, keys, values, kwargs.get("scaling"))
    return output.transpose(1, 2).contiguous(), None


def padding_mask(batch_size: int, q_length: int, kv_length: int, **kwargs):
    """transformers' `sdpa_mask`, but of long rows the padding alone, (B, S), instead of a mask with S x S entries."""
    mask = kwargs.get("attention_mask")
    is_plain = kwargs.get("mask_function", causal_mask_function) is causal_mask_function and q_length == kv_length
    if is_plain and kv_length >= LONG_ROW and mask is not None and mask.shape[1] == kv_length:
        mask = mask.bool()
        has_one_run = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0] <= 1
        if has_one_run.all() and not mask.all():
            return mask
    return sdpa_mask(batch_size, q_length, kv_length, **kwargs)


def _attention_of_padded_rows(query, keys, values, mask, scale):
    """Causal attention (B, S, H, D) of whole rows, each over its own tokens; 0 on padding."""
    output = values.new_zeros(*query.shape[:-1], values.shape[-1])
    for row, (first, length) in enumerate(zip(mask.int().argmax(1).tolist(), mask.sum(1).tolist())):
        own = (slice(row, row + 1), slice(None), slice(first, first + length))
        if length:
            output[own] = _causal_attention(query[own], keys[own], values[own], scale)
    return output.transpose(1, 2).contiguous()


def _causal_attention(query, keys, values, scale):
    """Attention of the last L of `end` positions, without a mask tensor."""
    is_grouped = query.shape[1] != keys.shape[1]
    if query.shape[2] == keys.shape[2]:
        return F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scale, enable_gqa=is_grouped)
    if query.device.type == "cpu":  # its kernel would build the aligned mask: (L, end) floats, kept for the backward
        return _PastAndOwn.apply(query, keys, values, scale)
    aligned = causal_lower_right(query.shape[2], keys.shape[2])
    return F.scaled_dot_product_attention(query, keys, values, aligned, scale=scale, enable_gqa=is_grouped)


class _PastAndOwn(torch.autograd.Function):
    """softmax(Q K^T + causal mask) V on a CPU, from two calls of torch's kernel, neither with a mask: every query sees
    all keys before the first query's, and the last L keys causally. The softmax's normaliser Z (B, H, L) joins them;
    with it, and with the joined output, the kernel's own backward gives each call its part of the gradient.
    """

    @staticmethod
    def forward(ctx, query, keys, values, scale):
        before = keys.shape[2] - query.shape[2]
        past, past_z = _flash_cpu(query, keys[:, :, :before], values[:, :, :before], scale=scale)
        own, own_z = _flash_cpu(query, keys[:, :, before:], values[:, :, before:], is_causal=True, scale=scale)
        z = torch.logaddexp(past_z, own_z)
        output = past * (past_z - z).exp()[..., None] + own * (own_z - z).exp()[..., None]
        output = output.to(query.dtype)
        ctx.save_for_backward(query, keys, values, output, z)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx, grad):
        query, keys, values, output, z = ctx.saved_tensors
        before = keys.shape[2] - query.shape[2]
        past, own = slice(0, before), slice(before, None)
        grads = [
            _flash_cpu_backward(
                grad, query, keys[:, :, part], values[:, :, part], output, z, 0.0, part is own, scale=ctx.scale
            )
            for part in (past, own)
        ]
        (past_query, *past_pair), (own_query, *own_pair) = grads
        return past_query + own_query, *(torch.cat(pair, 2) for pair in zip(past_pair, own_pair)), None


def why_not_split(model: nn.Module) -> list[str]:
    """Reasons why a split sequence would not equal a whole one for `model`, each with the way out."""
    inner = transformers_model(model)
    text = inner.config.get_text_config(decoder=True)
    reasons = []
    if inner.config._attn_implementation not in ("sdpa", ATTENTION):
        reasons.append(
            f"The attention implementation is {inner.config._attn_implementation!r}. Load the model with "
            '`attn_implementation="sdpa"`, whose operator is used on gathered keys and values.'
        )
    other = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention"})
    if not getattr(text, "layer_types", None) and getattr(text, "sliding_window", None):
        other.append(f"a sliding window of {text.sliding_window} tokens")
    stateful = sorted({type(m).__name__ for m in inner.modules() if isinstance(m, (nn.Conv1d, nn.RNNBase))})
    if other or stateful or inner.config.is_encoder_decoder:
        found = ", ".join([*other, *stateful]) or "an encoder"
        reasons.append(f"{inner.config.model_type} has {found}: only layers with full causal attention are split.")
    rope = getattr(text, "rope_parameters", None) or {}
    types = {r.get("rope_type", "default") for r in ([rope] if "rope_type" in rope else rope.values()) if r}
    if moving := sorted(types - STATIC_ROPE_TYPES):
        reasons.append(f"RoPE of type {moving[0]!r} depends on the longest position, which differs between peers.")
    if getattr(text, "output_router_logits", False):
        reasons.append(
            "The mixture-of-experts auxiliary loss would see a part of the tokens. Set its coefficient to 0."
        )
    reasons += adapter_reasons(model)
    if getattr(text, "attention_dropout", 0):
        reasons.append("Attention dropout is on, and peers would draw different numbers. Set it to 0.")
    return reasons


def split_attention(model: nn.Module) -> None:
    """Lets `model` attend over the keys and values of all peers where a forward names `sequence_peers`.

    Raises:
        NotImplementedError: with every reason of `why_not_split`.
    """
    if reasons := why_not_split(model):
        raise NotImplementedError("The sequence cannot be split exactly here. " + " ".join(reasons))
    AttentionInterface.register(ATTENTION, sequence_attention)
    AttentionMaskInterface.register(ATTENTION, padding_mask)  # without it, generation would lose its padding mask
    inner = transformers_model(model)
    inner.set_attn_implementation(ATTENTION)
    if inner.config._attn_implementation != ATTENTION:  # transformers only warns
        raise NotImplementedError(
            f"{type(inner).__name__} does not ask transformers for its attention function, so its sequences cannot be "
            "split. Turn sequence parallelism off for this model."
        )


def score_shard(model, inputs, labels, *, temperature: float = 1.0):
    """`ShardForward` from the model's own logits (B, L, V); no entropies."""
    logits = model(**inputs, use_cache=False).logits / temperature
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    logps = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] - logits.logsumexp(-1)
    return logps.masked_fill(labels == -100, 0.0), None


def sequence_logps(
    model: nn.Module,
    peers: SequencePeers,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_completion_tokens: int,
    forward: ShardForward = score_shard,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probabilities (B, C) of the last C tokens of every row, 0 on padding, and entropies or None.

    Equals one process's `forward` over whole rows, which keeps the activations of B x T tokens; this keeps those of
    B x L tokens, and the keys and values of B x S.

    Args:
        input_ids: (B, T), the same on every peer; prompts padded on the left, completions on the right.
        attention_mask: (B, T), one run of ones per row.

    Raises:
        ValueError: if a row's ones are interrupted.
        NotImplementedError: if positions are learned and a padded row would need more of them.
    """
    num_rows, num_tokens = input_ids.shape
    mask = attention_mask.bool()
    lengths, first = mask.sum(1), mask.int().argmax(1)  # (B,)
    spread = torch.where(mask, torch.arange(num_tokens, device=mask.device), -1).amax(1) - first + 1
    if (spread != lengths).any():
        raise ValueError("a row's attention mask has a hole: one run of ones per row expected")
    size = -(-int(lengths.max()) // peers.size)  # L
    steps = torch.arange(size * peers.size, device=mask.device)
    places = first[:, None] + steps  # (B, S): where the row's tokens stand, and so their positions
    inside = steps < lengths[:, None]
    ids = input_ids.gather(1, places.clamp(max=num_tokens - 1)).masked_fill(~inside, 0)
    is_label = inside & (places >= num_tokens - num_completion_tokens)
    labels = F.pad(ids.masked_fill(~is_label, -100)[:, 1:], (0, 1), value=-100)  # shifted before the split
    inner = transformers_model(model)
    text = inner.config.get_text_config(decoder=True)
    if adds_positions(inner) and int(places.max()) >= text.max_position_embeddings:
        raise NotImplementedError(
            f"rows that start at {int(first.max())} and are rounded up to {size * peers.size} tokens reach positions "
            f"beyond the {text.max_position_embeddings} that the model has learned. Shorten prompts or completions."
        )
    own = slice(peers.rank * size, (peers.rank + 1) * size)
    inputs = {"input_ids": ids[:, own], "position_ids": places[:, own], "sequence_peers": peers}
    logps, entropies = forward(model, inputs, labels[:, own])
    logps = peers.gather(logps, 1)  # (B, S)
    # Token j of a row was predicted at j - first - 1
    columns = torch.arange(num_tokens - num_completion_tokens, num_tokens, device=mask.device)
    predicted_at = (columns - first[:, None] - 1).clamp(min=0, max=logps.shape[1] - 1)  # (B, C)
    is_scored = mask[:, num_tokens - num_completion_tokens :]
    logps = logps.gather(1, predicted_at).masked_fill(~is_scored, 0.0)
    if entropies is not None:
        entropies = peers.gather(entropies.detach(), 1).gather(1, predicted_at).masked_fill(~is_scored, 0.0)
    return logps, entropies


class SequenceMismatch(RuntimeError):
    """The split and the whole computation of one row differ by more than rounding."""


@torch.no_grad()
def check_sequence_logps(
    model: nn.Module,
    peers: SequencePeers,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    num_completion_tokens: int,
    whole_logps: torch.Tensor,
    forward: ShardForward = score_shard,
) -> float:
    """Largest difference in nats between the split computation and `whole_logps` (B, C), computed by one process.

    Call it under the autocast that `forward` uses, which decides what is rounding.

    Raises:
        SequenceMismatch: if it is more than rounding: training would go on with wrong numbers, for example because the
            model does not hand `sequence_peers` to its attention.
    """
    logps, _ = sequence_logps(model, peers, input_ids, attention_mask, num_completion_tokens, forward)
    is_scored = attention_mask[:, -num_completion_tokens:].bool()
    error = (logps - whole_logps).masked_fill(~is_scored, 0.0).abs().max().item()
    is_autocast = torch.is_autocast_enabled(input_ids.device.type)
    dtype = torch.get_autocast_dtype(input_ids.device.type) if is_autocast else next(model.parameters()).dtype
    if not error <= LOGP_TOLERANCE.get(dtype, 0.3):
        raise SequenceMismatch(
            f"Log-probabilities of the split sequence differ from those of the whole by {error:.3g} nats. Nothing was "
            "trained. Turn sequence parallelism off for this model, and report its configuration."
        )
    return error


def exchange_rows(rows: dict[str, torch.Tensor], peers: SequencePeers, pad_token_id: int = 0) -> dict:
    """The rows of all peers, in the order of their ranks, on every peer.

    `prompt_ids` and `prompt_mask` (B, P) are padded on the left to the longest of any peer, `completion_ids` and
    `completion_mask` (B, C) on the right; other tensors have one entry per row.

    Raises:
        ValueError: if there is a value that has no row dimension.
    """
    shared = {}
    for name, tensor in rows.items():
        if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0:
            raise ValueError(
                f"rows[{name!r}] is a {type(tensor).__name__} without a row dimension: it cannot be shared"
            )
        if tensor.ndim == 2:
            longest = torch.tensor([tensor.shape[1]], device=tensor.device)
            dist.all_reduce(longest, dist.ReduceOp.MAX, peers.group)
            missing = int(longest) - tensor.shape[1]
            sides = (missing, 0) if name.startswith("prompt") else (0, missing)
            tensor = F.pad(tensor, sides, value=pad_token_id if name.endswith("_ids") else 0)
        shared[name] = peers.gather(tensor.detach(), 0)
    return shared
