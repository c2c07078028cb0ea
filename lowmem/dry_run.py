"""Runs training code without its memory and its arithmetic: tensors of floating point are fake, integers are real.

The obvious dry run makes every tensor fake and stops at the first question about data: is the mask all ones, has the
sequence ended, which rows belong to a prompt. Token ids, masks and lengths are small, so here they are computed really
and such questions get their true answers, while weights, activations, logits and optimizer state have shapes only.
Whole trainers run this way, generation included, and `lowmem.live_bytes` counts the same storages as in a real run.

    with DryRun() as dry:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)   # no memory, any size
        with LiveBytes() as meter:
            ...

What has no data gets a stated answer: `.item()` of a fake float is 0, of a fake bool False; sampling returns
`dry.sampled_token_id`; a mask made from fake floats selects everything.
"""

import contextlib

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class KernelWithoutFake(NotImplementedError):
    """A kernel that says nothing about the shapes it returns; its memory would be unknown, not zero."""


class DryRun(TorchDispatchMode):
    """Floats fake, integers and booleans real. Enter it before the meter: the mode entered last sees operators first.

    Attributes:
        sampled_token_id: what `torch.multinomial` returns for fake probabilities; choose one that ends nothing.
        num_ops: operators seen on fake tensors.

    Raises:
        KernelWithoutFake: at an operator that has no fake implementation, by name.
    """

    def __init__(self, sampled_token_id: int = 0):
        super().__init__()
        self.sampled_token_id = sampled_token_id
        self.num_ops = 0
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        self._patches.enter_context(_plain_module_apply())
        return super().__enter__()

    def __exit__(self, *exc):
        super().__exit__(*exc)
        self._patches.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # half of all calls, and no operator
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs) if tensors else self._make(func, args, kwargs)
        self.num_ops += 1
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).tolist()
        if func is aten.multinomial.default:
            shape = (*args[0].shape[:-1], args[1])
            return torch.full(shape, self.sampled_token_id, dtype=torch.int64, device="cpu")
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], [part for index in args[1] for part in _positions(index)], *args[2:])
        elif func in (aten.nonzero.default, aten.masked_select.default):
            return self._select(func, args)
        elif func is aten.equal.default:
            return True
        try:
            out = self.fake_mode.__torch_dispatch__(func, types, args, kwargs)
        except UnsupportedOperatorException as error:
            raise KernelWithoutFake(
                f"the kernel {func} has no fake implementation, so its memory is not known; register one with "
                "torch.library.register_fake, or choose an implementation without it"
            ) from error
        if func._schema.is_mutable:
            # an operator in place on a real tensor returns that tensor, whose data it cannot change
            return _mutated(func, args, kwargs, out)
        return out

    def _make(self, func, args, kwargs):
        """An operator without tensor arguments: floats are made fake, but for `arange` and scalars, whose data
        count."""
        if "arange" in func._schema.name or "scalar_tensor" in func._schema.name:
            return func(*args, **kwargs)
        with self.fake_mode:
            out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and not out.dtype.is_floating_point:
            return func(*args, **kwargs)
        return out

    def _select(self, func, args):
        if func is aten.nonzero.default:
            return torch.ones(args[0].shape, dtype=torch.bool).nonzero()
        mask = args[1]
        count = mask.numel() if isinstance(mask, FakeTensor) else int(mask.broadcast_to(args[0].shape).sum())
        with self.fake_mode:
            return args[0].new_empty(count)


def _positions(index) -> list:
    """A boolean index as the positions that it selects: those of the mask if it is real, else all."""
    if index is None or index.dtype not in (torch.bool, torch.uint8):
        return [index]
    mask = torch.ones(index.shape, dtype=torch.bool) if isinstance(index, FakeTensor) else index
    return list(mask.nonzero(as_tuple=True))


def _mutated(func, args, kwargs, out):
    first = args[0] if args else None
    if isinstance(out, torch.Tensor) and isinstance(first, torch.Tensor) and not isinstance(first, FakeTensor):
        if func._schema.arguments[0].is_write:
            return first
    return out


@contextlib.contextmanager
def _plain_module_apply():
    """`Module.to` and friends swap fake parameters, which references to them forbid; here they are replaced."""
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
