"""What the live bytes of a step are: the meter of `lowmem.live_bytes` with a category for every storage.

trace = MemoryTrace(vocab_size)
trace.track_as("weights", model.parameters())
with trace:
    trace.phase = "train_forward"
    ...
trace.peak_bytes, trace.peak_categories            # sums to the peak, to the byte
trace.categories_by_phase["optimizer"]             # at that phase's own peak
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lowmem.live_bytes import LiveBytes

CATEGORIES = ("weights", "gradients", "optimizer", "activations", "logits", "cache")
SEGMENTS = 8
aten = torch.ops.aten


class MemoryTrace(LiveBytes):
    """`LiveBytes` that says what lives.

    A storage is `logits` if the last dimension is the vocabulary, `cache` if it is a key or value grown while
    generating, `gradients` and `optimizer` when `relabel` says so, else `activations` (temporary tensors included).

    Attributes:
        peak_categories: category -> bytes at `peak_bytes`.
        categories_by_phase: phase -> category -> bytes at that phase's peak.
        half_scratch_bytes: float32 copies of both factors and the product of the largest matrix product in half
            precision: what a CPU without kernels for it takes inside the kernel.
        segment_peaks: peaks of phases, the backward's in `SEGMENTS` parts by the share of gradients that it has
            made. Within a part bytes are affine in rows and layers; within a whole backward they are not, because its
            peak moves from the logits at its start to the gradients at its end.
        train_flops: floating point operations of matrix products and attention in the training phases.
        timeline: `(phase, {category: bytes})` whenever a phase changes or live bytes have moved by `resolution_bytes`.
    """

    def __init__(self, vocab_size: int, resolution_bytes: int = 2**20, phase: str = "other"):
        self.vocab_size, self.resolution_bytes = vocab_size, resolution_bytes
        self.categories: Counter[str] = Counter()
        self.peak_categories: dict[str, int] = {}
        self.categories_by_phase: dict[str, dict[str, int]] = {}
        self.timeline: list[tuple[str, dict[str, int]]] = []
        self._labels: dict[int, str] = {}  # as LiveBytes._sizes
        self._label = "activations"
        self._shown_bytes = 0
        self.train_flops = 0
        self.half_scratch_bytes = 0
        self.segment_peaks: dict[str, int] = {}
        self._num_gradients = self._gradients_done = 0
        super().__init__(phase)

    def track_as(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors that were made before the meter was entered."""
        self._label = category
        self.track(tensors)
        self._label = "activations"

    def relabel(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Moves live storages to a category; tensors that are not counted are left out."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            label = self._labels.get(key)
            if label not in (None, category):
                size = self._sizes[key][0]
                self.categories[label] -= size
                self.categories[category] += size
                self._labels[key] = category

    def hook_gradients(self, model: torch.nn.Module) -> None:
        """From now on accumulated gradients of the model's parameters are `gradients`."""

        def made(parameter):
            self.relabel("gradients", [parameter.grad])
            self._gradients_done += 1

        for parameter in model.parameters():
            if parameter.requires_grad:
                self._num_gradients += 1
                parameter.register_post_accumulate_grad_hook(made)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `lowmem.dry_run`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self._note_scratch(args, out)
        if formula is not None and self._phase.startswith("train"):
            self.train_flops += formula(*args, **(kwargs or {}), out_val=out)
        for leaf in [out] if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._label = self._classify(func, leaf)
                self._count(leaf.untyped_storage())
        self._label = "activations"
        return out

    def _note_scratch(self, args, out) -> None:
        tensors = [
            t for t in (*args, out) if isinstance(t, torch.Tensor) and t.dtype in (torch.bfloat16, torch.float16)
        ]
        self.half_scratch_bytes = max(self.half_scratch_bytes, 4 * sum(t.numel() for t in tensors))

    def _classify(self, func, tensor: torch.Tensor) -> str:
        if tensor.ndim > 1 and tensor.shape[-1] == self.vocab_size and tensor.is_floating_point():
            return "logits"
        if self._phase == "optimizer":
            return "optimizer"
        if self._phase == "generate" and func is aten.cat.default and tensor.ndim == 4:
            return "cache"
        return "activations"

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, before = storage._cdata, self.live_bytes
        super()._count(storage)
        added = self.live_bytes - before
        if added:
            self._labels[key] = self._label
            self.categories[self._label] += added
            self._snapshot()

    def _free(self, key: int, reference) -> None:
        before = self.live_bytes
        super()._free(key, reference)
        if self.live_bytes != before:
            self.categories[self._labels.pop(key)] += self.live_bytes - before
            if self._shown_bytes - self.live_bytes > self.resolution_bytes:
                self._show()

    def _note_peak(self) -> None:
        super()._note_peak()
        if sum(self.categories.values()) == self.live_bytes:  # a new phase, not a storage on its way in
            self._snapshot()

    def _snapshot(self) -> None:
        segment = self._phase
        if segment == "train_backward" and self._num_gradients:
            segment += f"-{min(SEGMENTS - 1, SEGMENTS * self._gradients_done // self._num_gradients)}"
        else:
            self._gradients_done = 0
        if self.live_bytes > self.segment_peaks.get(segment, -1):
            self.segment_peaks[segment] = self.live_bytes
        if self.live_bytes == self.peak_bytes:
            self.peak_categories = dict(self.categories)
        if self.live_bytes == self.peak_bytes_by_phase.get(self._phase):
            self.categories_by_phase[self._phase] = dict(self.categories)
        changed_phase = bool(self.timeline) and self.timeline[-1][0] != self._phase
        if changed_phase or abs(self.live_bytes - self._shown_bytes) > self.resolution_bytes:
            self._show()

    def _show(self) -> None:
        self._shown_bytes = self.live_bytes
        self.timeline.append((self._phase, dict(self.categories)))
