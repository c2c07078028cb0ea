"""Runs training code without its memory and its arithmetic: tensors of floating point are shapes, integers are real.

The obvious dry run makes every tensor fake and stops at the first question about data: is the mask all ones, has the
sequence ended, which rows belong to a prompt. Token ids, masks and lengths are small, so here they are computed really
and such questions get their true answers, while weights, activations, logits and optimizer state have shapes only.
Whole trainers run this way, generation included, and `lowmem.live_bytes` counts the same storages as in a real run.

    with DryRun() as dry:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)   # no memory, any size
        with LiveBytes() as meter:
            ...

PyTorch's `FakeTensorMode` says what an operator returns, once for each signature (`_Result`); a model repeats the same
few hundred in every layer, row and token, and asking it every time took most of a plan's time.

What has no data gets a stated answer: `.item()` of a shape is 0, of a boolean one False; sampling returns
`dry.sampled_token_id`; a mask made from floats selects everything.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

aten = torch.ops.aten


class KernelWithoutFake(NotImplementedError):
    """A kernel that says nothing about the shapes it returns; its memory would be unknown, not zero."""


class Shape(torch.Tensor):
    """A tensor of the CPU with sizes, strides and a storage that has a size and no memory."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} was called on a tensor without data outside its DryRun")

    def tolist(self):
        return self.item() if self.ndim == 0 else [part.tolist() for part in self]

    def __repr__(self):
        return f"Shape({tuple(self.shape)}, {self.dtype})"


def _new(size, stride, offset, dtype, nbytes) -> Shape:
    return torch.Tensor._make_wrapper_subclass(
        Shape, size, strides=stride, storage_offset=offset, dtype=dtype, device="cpu", storage_size=nbytes
    )


def _view(base: torch.Tensor, size, stride, offset, dtype) -> Shape:
    """Shares the storage of `base`; of another type where an operator reinterprets it."""
    with torch._C._DisableTorchDispatch():
        if base.dtype != dtype:
            out = torch.empty(0, dtype=dtype).set_(base.untyped_storage(), offset, size, stride)
        else:
            out = torch.as_strided(base, size, stride, offset)
        return torch.Tensor._make_subclass(Shape, out)


@dataclass(slots=True)
class _Output:
    """A tensor that an operator returns: new, a view of argument number `alias`, or that argument itself.

    Attributes:
        alias: index of the tensor argument whose storage it has; None for a new storage.
        sibling: index of an earlier output with the same new storage.
    """

    size: tuple
    stride: tuple
    offset: int
    dtype: torch.dtype
    nbytes: int
    alias: int | None
    sibling: int | None
    is_argument: bool

    def make(self, tensors: list[torch.Tensor], made: list) -> torch.Tensor:
        if self.is_argument:
            return tensors[self.alias]
        if self.alias is None and self.sibling is None:
            return _new(self.size, self.stride, self.offset, self.dtype, self.nbytes)
        base = made[self.sibling] if self.alias is None else tensors[self.alias]
        return _view(base, self.size, self.stride, self.offset, self.dtype)


@dataclass(slots=True)
class _Result:
    """What an operator returns for a signature; `single` where that is one tensor."""

    leaves: list
    spec: Any
    single: bool

    def make(self, tensors: list[torch.Tensor]):
        if self.single:
            return self.leaves[0].make(tensors, ())
        made: list = []
        for leaf in self.leaves:
            made.append(leaf.make(tensors, made) if isinstance(leaf, _Output) else leaf)
        return tree_unflatten(made, self.spec)


class DryRun(TorchDispatchMode):
    """Floats are shapes, integers and booleans real. Enter it before the meter: the mode entered last sees operators
    first.

    Attributes:
        sampled_token_id: what `torch.multinomial` returns for probabilities without data; choose one that ends
            nothing.
        num_ops: operators seen on tensors without data.

    Raises:
        KernelWithoutFake: at an operator that has no fake implementation, by name.
    """

    def __init__(self, sampled_token_id: int = 0):
        super().__init__()
        self.sampled_token_id = sampled_token_id
        self.num_ops = 0
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._known: dict[tuple, _Result] = {}
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        self._patches.enter_context(_plain_module_apply())
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self._patches.close()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; the guard costs more than a known operator

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        key: list = [func]
        tensors: list[torch.Tensor] = []
        has_shape = _signature(args, key, tensors)
        for name, value in kwargs.items():
            key.append(name)
            has_shape |= _signature((value,), key, tensors)
        if not has_shape:
            return func(*args, **kwargs) if tensors else self._make(func, args, kwargs, tuple(key))
        self.num_ops += 1
        if func in _ANSWERS:
            return _ANSWERS[func](self, *args)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], [part for index in args[1] for part in _positions(index)], *args[2:])
            key, tensors = [func], []
            _signature(args, key, tensors)
        elif func in _RESHAPES:  # of the tensor itself; no data is touched
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)
            return args[0]
        key = tuple(key)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._ask(func, args, kwargs, tensors)
        return known.make(tensors)

    def _ask(self, func, args, kwargs, tensors) -> _Result:
        """What `FakeTensorMode` returns for these arguments; modes around this one (a plan within a plan) do not see
        it."""
        with _disable_current_modes():
            return self._asked(func, args, kwargs, tensors)

    def _asked(self, func, args, kwargs, tensors) -> _Result:
        fakes = [self._fake(tensor) for tensor in tensors]
        order = iter(fakes)
        fake_args, fake_kwargs = tree_map_only(torch.Tensor, lambda _: next(order), (args, kwargs))
        before = [(fake.shape, fake.stride(), fake.untyped_storage().nbytes()) for fake in fakes]
        try:
            with self.fake_mode:
                out = func(*fake_args, **fake_kwargs)
        except UnsupportedOperatorException as error:
            raise KernelWithoutFake(
                f"the kernel {func} has no fake implementation, so its memory is not known; register one with "
                "torch.library.register_fake, or choose an implementation without it"
            ) from error
        if before != [(fake.shape, fake.stride(), fake.untyped_storage().nbytes()) for fake in fakes]:
            raise KernelWithoutFake(f"the kernel {func} changes the shape of its argument, which is not known here")
        leaves, spec = tree_flatten(out)
        storages = {fake.untyped_storage()._cdata: i for i, fake in reversed(list(enumerate(fakes)))}
        same = {id(fake): i for i, fake in reversed(list(enumerate(fakes)))}
        results, own = [], {}
        for number, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                results.append(leaf)
                continue
            storage = leaf.untyped_storage()
            alias = same.get(id(leaf), storages.get(storage._cdata))
            sibling = own.setdefault(storage._cdata, number) if alias is None else None
            results.append(
                _Output(
                    *(tuple(leaf.shape), leaf.stride(), leaf.storage_offset(), leaf.dtype, storage.nbytes(), alias),
                    None if sibling == number else sibling,
                    id(leaf) in same,
                )
            )
        return _Result(results, spec, isinstance(out, torch.Tensor))

    def _fake(self, tensor: torch.Tensor) -> FakeTensor:
        nbytes = tensor.untyped_storage().nbytes()
        base = torch.empty(nbytes // tensor.element_size(), dtype=tensor.dtype, device="meta")
        meta = torch.as_strided(base, tensor.shape, tensor.stride(), tensor.storage_offset())
        return FakeTensor(self.fake_mode, meta, torch.device("cpu"))

    def _make(self, func, args, kwargs, key):
        """An operator without tensor arguments: floats get no memory, but for `arange` and scalars, whose data
        count."""
        if "arange" in func._schema.name or "scalar_tensor" in func._schema.name:
            return func(*args, **kwargs)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._ask(func, args, kwargs, [])
        first = known.leaves[0]
        if isinstance(first, _Output) and first.dtype.is_floating_point:
            return known.make([])
        return func(*args, **kwargs)


def _signature(values, key: list, tensors: list[torch.Tensor]) -> bool:
    """Adds what decides the result's shape to `key`, and the tensors to `tensors`; whether one has no data."""
    has_shape = False
    for value in values:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            key += (value.shape, value.stride(), value.storage_offset(), value.dtype)
            has_shape |= type(value) is Shape or isinstance(value, Shape)
        elif isinstance(value, (list, tuple)):
            key.append(len(value))
            has_shape |= _signature(value, key, tensors)
        else:
            key += (type(value), value)
    return has_shape


def _item(dry: DryRun, tensor: torch.Tensor):
    return torch.zeros((), dtype=tensor.dtype).tolist()


def _sampled(dry: DryRun, probabilities: torch.Tensor, count: int, *_):
    return torch.full((*probabilities.shape[:-1], count), dry.sampled_token_id, dtype=torch.int64, device="cpu")


def _nonzero(dry: DryRun, tensor: torch.Tensor):
    return torch.ones(tensor.shape, dtype=torch.bool).nonzero()


def _selected(dry: DryRun, tensor: torch.Tensor, mask: torch.Tensor):
    count = mask.numel() if isinstance(mask, Shape) else int(mask.broadcast_to(tensor.shape).sum())
    return _new((count,), (1,), 0, tensor.dtype, count * tensor.element_size())


_RESHAPES = {aten.unsqueeze_.default, aten.t_.default, aten.transpose_.default, aten.as_strided_.default}
_RESHAPES |= {aten.squeeze_.default, aten.squeeze_.dim, aten.squeeze_.dims}

_ANSWERS = {
    aten._local_scalar_dense.default: _item,
    aten.multinomial.default: _sampled,
    aten.nonzero.default: _nonzero,
    aten.masked_select.default: _selected,
    aten.equal.default: lambda *_: True,
}


def _positions(index) -> list:
    """A boolean index as the positions that it selects: those of the mask if it is real, else all."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    mask = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, Shape) else index
    return list(mask.nonzero(as_tuple=True))


@contextlib.contextmanager
def _plain_module_apply():
    """`Module.to` and friends swap parameters, which references to tensors without data forbid; here they are
    replaced."""
    original = nn.Module._apply

    def apply(module, fn, recurse=True):
        if recurse:
            for child in module.children():
                child._apply(fn)
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                with torch.no_grad():
                    moved = fn(tensor)
                if moved is not tensor and isinstance(tensor, nn.Parameter):
                    moved = nn.Parameter(moved, tensor.requires_grad)
                tensors[name] = moved
        return module

    nn.Module._apply = apply
    try:
        yield
    finally:
        nn.Module._apply = original
