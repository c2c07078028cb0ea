"""One prompt shared by its completions: stage 1, 2 and 3 of `lowmem.shared_prefix`, for loops that need them apart.

The obvious way to share a prompt, `use_cache=True` and k forwards through the cache, is exact without gradient
checkpointing and silently wrong with it, and it needs all k graphs at once. Here a `Cache` that never changes carries
the prompt's keys and values as leaves, which survives a replay and lets each branch's graph go before the next.

Shapes: P prompt tokens, R tokens of the longest completion at hand, m branches of a micro-batch, V vocabulary,
L layers, Hk key-value heads, D head size; n rows of T tokens in which the branches run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem.shared_prefix_checks import (
    adapter_states,
    lasting_parameters,
    refuse_inexact,
    refuse_inexact_lengths,
    transformers_model,
    weight_versions,
)
from lowmem.shared_prefix_distributed import is_sharded, refuse_unreduced, reshard
from lowmem.shared_prefix_packing import can_pack, cheapest_rows, pack_rows

# (model, inputs, labels) -> log-probabilities (n, T) and entropies (n, T) or None. `inputs` go to the model's forward
# as they are; `labels` (n, T) belong to the last T positions of `input_ids`, one to one, and are -100 on padding. A
# row holds one completion or several (`lowmem.shared_prefix_packing`): what is returned for a label is its own alone.
BranchForward = Callable[[nn.Module, dict, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]


def score_logits(model, inputs, labels, *, temperature: float = 1.0, with_entropy: bool = False):
    """`(logits / temperature).log_softmax(-1)` at the labels, from the model's own logits.

    Keeps one (m, R, V) tile of logits, in float32 at least, and makes another in the backward; with entropies it keeps
    two, with two more on the way (`score_chunks` has tiles of a few tokens). For other settings pass
    `functools.partial(score_logits, temperature=0.9)` as `branch_forward`.
    """
    logits = model(**inputs, logits_to_keep=labels.shape[1]).logits
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    log_z = logits.logsumexp(-1)
    logps = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) - log_z
    if not with_entropy:
        return logps, None
    return logps, log_z - ((logits - log_z.unsqueeze(-1)).exp() * logits).sum(-1)


def score_chunks(model, inputs, labels, *, temperature: float = 1.0, chunk_tokens: int = 32):
    """What `score_logits` returns, entropies included, in tiles of (chunk_tokens, V).

    Needs `lowmem.logprobs.add_logprob_head(model)` beforehand, whose `response_ids` are the last tokens of the row:
    one token is appended to every branch, which nothing looks at.
    """
    ids, positions, targets = inputs["input_ids"], inputs["position_ids"], labels.clamp(min=0)
    longer = {
        **inputs,
        "input_ids": torch.cat([ids, targets[:, -1:]], 1),
        "position_ids": torch.cat([positions, positions[:, -1:] + 1], 1),
    }
    if "attention_mask" in inputs:  # (n, 1, T, P - 1 + T)
        mask = inputs["attention_mask"]
        unseen = pad(mask, (0, 1), value=torch.finfo(mask.dtype).min)
        longer["attention_mask"] = pad(unseen, (0, 0, 0, 1), value=0.0)
    out = model(**longer, response_ids=targets, temperature=temperature, chunk_tokens=chunk_tokens)
    return out.logps, out.entropy


class _PromptLayer(CacheLayerMixin):
    """Keeps a layer's first keys and values. `update` returns what it is given, so a checkpoint may replay it."""

    is_sliding = False  # the model's masks carry the windows

    def __init__(self):
        super().__init__()
        self.num_updates = 0

    def lazy_initialization(self, key_states, value_states):
        """Nothing to allocate."""

    def update(self, key_states, value_states, *args, **kwargs):
        if self.num_updates == 0:
            self.keys, self.values = key_states, value_states
        self.num_updates += 1
        return key_states, value_states

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hands the tensors over: a checkpoint holds this layer, and they hold it (a leak if no backward comes)."""
        pair = self.keys, self.values
        self.keys = self.values = None
        return pair

    def get_mask_sizes(self, query_length):
        return query_length, 0

    def get_seq_length(self):
        return 0

    def get_max_length(self):
        return -1


class _BranchLayer(_PromptLayer):
    """Puts the prompt's keys and values (1, Hk, P - 1, D) before those of every branch, and keeps nothing."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.keys, self.values = keys, values

    def update(self, key_states, value_states, *args, **kwargs):
        self.num_updates += 1
        rows = key_states.shape[0]
        keys = torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2)
        values = torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2)
        return keys, values  # (n, Hk, P - 1 + T, D)

    def get_mask_sizes(self, query_length):
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self):
        return self.keys.shape[-2]


@contextmanager
def _cache_reaches_checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """transformers takes the cache away from checkpointed layers, because most caches change on a replay."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache


def _check_every_layer_used(cache: Cache) -> None:
    counts = [layer.num_updates for layer in cache.layers]
    if any(count != 1 for count in counts):
        raise RuntimeError(
            f"{counts.count(1)} of {len(counts)} layers used the cache exactly once (uses per layer: {counts}). The "
            "prompt would be missing from the others: the model drops the cache (gradient checkpointing of a layer "
            "class that is not a `GradientCheckpointingLayer`?) or shares it between layers. Leave the shared prefix "
            "off for this model."
        )


class SharedPrompt:
    """One group: the prompt runs at `with`, branches run inside, the prompt's backward runs at the end of the block.

        with SharedPrompt(model, prompt_ids) as prompt:
            for completions in micro_batches:
                logps, entropies, mask = prompt.score(completions)
                loss_fn(logps, mask).backward()  # adds up in the weights and in the prompt's keys and values

    After the block, the gradients are those of k rows `[prompt, completion]`. Under `torch.no_grad()` nothing is kept
    and `score` only scores. The block ends without a backward when an exception leaves it.

    Args:
        model: a transformers causal LM, also inside PEFT, or sharded by FSDP2; with DDP and DeepSpeed the module
            inside, see `lowmem.shared_prefix_distributed`.
        prompt_ids: (P,), int64.
        prompt_backward: `(tensors, gradients)`, the last stage. The gradients contain every scaling that the losses
            had: do not scale again.
        share_rows: let completions share a row where that is cheaper (`lowmem.shared_prefix_packing`).

    Raises:
        NotImplementedError: at `with`, if the result would not be exact; says why and what to do.
        RuntimeError: if the prompt's part was lost or would be wrong: a layer without the cache, weights changed
            inside the block, no backward inside the block, a backward after it, a `prompt_backward` that runs none; or
            if several processes run and nothing would reduce the gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt_ids: torch.Tensor,
        *,
        prompt_backward=torch.autograd.backward,
        share_rows: bool = True,
    ):
        self.model, self.prompt_ids, self.prompt_backward = model, prompt_ids, prompt_backward
        self.share_rows = share_rows
        self._is_open = [False]  # a list: hooks of the leaves see it without holding the leaves
        self._roots: list[torch.Tensor] = []  # 2 L tensors (1, Hk, P - 1, D) with the prompt's graph; none if P = 1
        self._leaves: list[torch.Tensor] = []
        self._output: torch.Tensor | None = None  # of FSDP2: a root with a gradient of zero

    def __enter__(self) -> "SharedPrompt":
        refuse_inexact(self.model)
        self._with_grad = torch.is_grad_enabled()
        self._can_pack = self.share_rows and can_pack(self.model)
        if self._with_grad:
            refuse_unreduced(self.model)
        reshard(self.model)
        self._parameters = lasting_parameters(self.model)
        self._weights, self._adapters = weight_versions(self._parameters), adapter_states(self.model)
        if self.prompt_ids.shape[0] > 1:
            self._roots = self._run_prompt()
        self._leaves = [root.detach().requires_grad_(root.requires_grad) for root in self._roots]
        is_open = self._is_open
        is_open[0] = True

        def refuse_late_gradient(grad):
            if not is_open[0]:
                raise RuntimeError(
                    "backward of a branch after its SharedPrompt was closed: the prompt's part is lost. Call backward "
                    "inside the block."
                )

        for leaf in self._leaves:
            if leaf.requires_grad:
                leaf.register_hook(refuse_late_gradient)
        return self

    def _run_prompt(self) -> list[torch.Tensor]:
        ids = self.prompt_ids[None, :-1]  # (1, P - 1)
        num_layers = transformers_model(self.model).config.get_text_config(decoder=True).num_hidden_layers
        cache = Cache(layers=[_PromptLayer() for _ in range(num_layers)])
        with _cache_reaches_checkpointed_layers(self.model):
            output = self.model(  # the outermost module, so that autocast and wrappers see it; no row of logits
                input_ids=ids,
                position_ids=torch.arange(ids.shape[1], device=ids.device)[None],
                past_key_values=cache,
                use_cache=False,
                logits_to_keep=torch.empty(0, dtype=torch.long, device=ids.device),
            )
        if is_sharded(self.model) and output.logits.requires_grad:
            self._output = output.logits  # (1, 0, V); its backward gathers the weights, the last layer's too
        _check_every_layer_used(cache)
        pairs = [layer.take() for layer in cache.layers]
        in_graph = [keys.requires_grad or values.requires_grad for keys, values in pairs]
        if any(before and not after for before, after in zip(in_graph[:-1], in_graph[1:], strict=True)):
            raise RuntimeError(
                f"keys and values lose their gradient between layers (by layer: {in_graph}), and with it the prompt's "
                "part would be lost. Leave the shared prefix off for this model."
            )
        return [tensor for pair in pairs for tensor in pair]

    @property
    def dtype(self) -> torch.dtype:
        """The lowest precision among the prompt's keys and values (with autocast, not that of the weights)."""
        tensors = self._leaves or [next(self.model.parameters())]
        return min((tensor.dtype for tensor in tensors), key=lambda dtype: dtype.itemsize)

    def score(
        self,
        completions: Sequence[torch.Tensor],
        branch_forward: BranchForward = score_logits,
        num_rows: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Log-probabilities, entropies (or None) and mask of m completions (R_i,) in one forward, each (m, R).

        They share `num_rows` rows of that forward; None for as many as `cheapest_rows` says, or one row for each where
        the model cannot.

        Raises:
            ValueError: if the model cannot share rows and should, or `branch_forward` returns another shape.
        """
        if not self._is_open[0]:
            raise RuntimeError(
                "SharedPrompt.score outside its `with` block, where the prompt has not run: call it inside."
            )
        if torch.is_grad_enabled() and not self._with_grad:
            raise RuntimeError(
                "the prompt ran under no_grad, so gradients through its branches would lack its part: open the "
                "SharedPrompt block with gradients on."
            )
        self._check_weights()
        device = self.prompt_ids.device
        num_prefix = self.prompt_ids.shape[0] - 1
        sizes = [len(ids) for ids in completions]
        mask = torch.arange(max(sizes), device=device) < torch.tensor(sizes, device=device)[:, None]  # (m, R)
        refuse_inexact_lengths(self.model, num_prefix, num_prefix + 1 + mask.shape[1])
        if num_rows is None:
            num_rows = cheapest_rows(num_prefix, sizes) if self._can_pack else len(sizes)
        elif not 1 <= num_rows <= len(sizes) or (num_rows < len(sizes) and not self._can_pack):
            packs = "can" if self._can_pack else "cannot"
            raise ValueError(f"{len(sizes)} completions in {num_rows} rows, of a model that {packs} share a row")
        packed = pack_rows(completions, num_rows, self.prompt_ids[-1:], num_prefix, self.dtype)
        inputs = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "use_cache": False}
        if packed.attention_mask is not None:
            inputs["attention_mask"] = packed.attention_mask
        if self._leaves:
            pairs = zip(self._leaves[::2], self._leaves[1::2], strict=True)
            inputs["past_key_values"] = Cache(layers=[_BranchLayer(*pair) for pair in pairs])
        with _cache_reaches_checkpointed_layers(self.model):
            results = branch_forward(self.model, inputs, packed.labels)  # (n, T)
        if self._leaves:
            _check_every_layer_used(inputs["past_key_values"])
        logps, entropies = (
            None if values is None else packed.unpack(values, mask.shape[1]).masked_fill(~mask, 0.0)
            for values in results
        )
        return logps, entropies, mask

    def _check_weights(self) -> None:
        num_parameters = len(lasting_parameters(self.model))  # FSDP2 replaces the objects, so these are kept
        is_same = num_parameters == len(self._parameters) and weight_versions(self._parameters) == self._weights
        if not is_same or adapter_states(self.model) != self._adapters:
            raise RuntimeError(
                "weights changed inside a SharedPrompt block: its prompt ran with other weights than its branches. "
                "Step the optimizer and switch adapters only after the block."
            )

    def __exit__(self, exc_type, exc, traceback) -> None:
        roots, leaves, output = self._roots, self._leaves, self._output
        self._roots, self._leaves, self._output, self._is_open[0] = [], [], None, False
        if exc_type is not None or not self._with_grad:
            return
        self._check_weights()
        parts = [(root, leaf.grad) for root, leaf in zip(roots, leaves, strict=True) if root.requires_grad]
        missing = sum(grad is None for _, grad in parts)
        if missing:
            raise RuntimeError(
                f"{missing} of {len(parts)} keys and values of the prompt received no gradient: call backward on the "
                "loss of every branch inside the SharedPrompt block."
            )
        if parts and output is not None:
            parts.append((output, torch.zeros_like(output)))
        if not parts:  # a one-token prompt, or nothing before the last layer is trained
            return
        arrived = []
        hook = parts[0][0].register_hook(lambda grad: arrived.append(True))
        self.prompt_backward([root for root, _ in parts], [grad for _, grad in parts])
        hook.remove()
        if not arrived:
            raise RuntimeError(
                "`prompt_backward` ran no backward through the prompt, whose part of the gradient is lost: it has to "
                "do what `torch.autograd.backward(tensors, gradients)` does."
            )
