"""A deterministic memory meter: bytes of live tensor storages, by phase.

Unlike resident memory it does not depend on the C allocator, and unlike `torch.cuda.max_memory_allocated` it works on
any device. It counts what PyTorch operators return, so memory that a kernel allocates and frees inside itself is not
seen; docs/measuring.md says how far the meters agree.

    meter = LiveBytes()
    meter.track(model.parameters())
    with meter:
        meter.phase = "train_forward"
        loss = model(**batch).loss
    meter.peak_bytes, meter.peak_bytes_by_phase
"""

import weakref
from collections.abc import Iterable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage from the operator that returns it until the storage is freed.

    Views share a storage, which is counted once; a storage that is resized is counted anew. Works on real and on fake
    tensors (push it inside the fake mode).

    Args:
        phase: the first one.
        device: type of the only device that counts ("cuda"); None counts all, what is offloaded to the host included.

    Attributes:
        live_bytes: bytes live now.
        peak_bytes: largest `live_bytes` so far.
        peak_phase: the phase in which `peak_bytes` was reached.
        peak_bytes_by_phase: largest `live_bytes` in each phase.
        phase: name under which peaks are kept from now on.
    """

    def __init__(self, phase: str = "other", device: str | None = None):
        super().__init__()
        self.device = device
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_phase = phase
        self.peak_bytes_by_phase: dict[str, int] = {}
        self._sizes: dict[int, tuple[int, weakref.ref]] = {}  # storage address of the C++ object -> bytes, reference
        self.phase = phase

    @property
    def phase(self) -> str:
        return self._phase

    @phase.setter
    def phase(self, name: str) -> None:
        self._phase = name
        self._note_peak()

    def track(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts tensors that were made before the meter was entered (parameters, buffers)."""
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self._count(out.untyped_storage())
        elif out is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if self.device is not None and storage.device.type != self.device:
            return
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is not None:
            if known[0] == size:
                return
            self._free(key, known[1])
        if size == 0:
            return
        meter = weakref.ref(self)

        def freed(reference: weakref.ref) -> None:
            owner = meter()
            if owner is not None:
                owner._free(key, reference)

        self._sizes[key] = (size, weakref.ref(storage, freed))
        self.live_bytes += size
        self._note_peak()

    def _free(self, key: int, reference: weakref.ref) -> None:
        known = self._sizes.get(key)
        if known is not None and known[1] is reference:  # the address may belong to a younger storage already
            del self._sizes[key]
            self.live_bytes -= known[0]

    def _note_peak(self) -> None:
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_phase = self.live_bytes, self._phase
        if self.live_bytes > self.peak_bytes_by_phase.get(self._phase, -1):
            self.peak_bytes_by_phase[self._phase] = self.live_bytes
