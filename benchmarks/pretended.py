"""A GPU for machines that have none: tensors that say they are on another device, while a CPU computes them.

Within `Pretended()` a tensor that is moved to, or made on, `DEVICE` stays apart from the host's as on a GPU:
an operation that mixes both is an error, and what makes the host wait for the device is counted. Storage that
is alive on the device is counted too, byte by byte. With `values=False` nothing is computed and nothing takes
memory: shapes and types alone say how much a step would hold (`python -m benchmarks.gpu --estimate`).

Inside, a tensor of the device wraps one of the CPU, or of PyTorch's meta device. The CPU's kernels stand for
the GPU's: the same types in and out, attention by a kernel that keeps no [L, L] matrix either.
"""

import weakref
from collections import Counter
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("privateuseone:0")  # the one kind of device that PyTorch leaves to others
BLOCK = 512  # bytes; CUDA's caching allocator rounds up to it
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
}
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
}
UNKNOWN = {aten._local_scalar_dense.default, aten.nonzero.default}
COPIES = {aten.copy_.default, aten._foreach_copy_.default}
JOINS = {aten.stack.default, aten.cat.default}  # these take no number of the host's, as others do


class WrongDevice(RuntimeError):
    """An operation on tensors of the host and of the device."""


class Elsewhere(torch.Tensor):
    """A tensor on DEVICE; `inside` is the one that it wraps."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = DEVICE

    @staticmethod
    def __new__(cls, inside):
        # to C++ a CPU's, so that autograd needs no driver and the CPU's rules of autocast hold
        with torch.inference_mode(False):
            wrapper = torch.Tensor._make_wrapper_subclass(
                cls,
                inside.shape,
                strides=inside.stride(),
                storage_offset=inside.storage_offset(),
                dtype=inside.dtype,
                device="cpu",
            )
        wrapper.inside = inside
        return wrapper

    def __repr__(self):
        return f"Elsewhere({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise WrongDevice(f"{func}: a tensor of the pretended device outside of `with Pretended()`")


class _Methods(TorchFunctionMode):
    """What Python asks of a tensor by name, and C++ would answer by looking at memory of the host."""

    def __init__(self, pretended):
        self.pretended = pretended

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and _is_there(kwargs.get("device")):
            return self._move(torch.tensor(*args, **{**kwargs, "device": "cpu"}), DEVICE, None, False)
        if func is not torch.Tensor.to and _is_there(kwargs.get("device")):  # torch.zeros(…, device=DEVICE)
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
            if not any(isinstance(arg, Elsewhere) for arg in args):
                return self.pretended.wrap(func(*args, **kwargs, device=self.pretended.inside))
        if func is torch.Tensor.backward and isinstance(args[0], Elsewhere):
            self.pretended.backward = True
            with self:  # a block that is computed a second time asks here too
                torch.autograd.backward(*args, kwargs.pop("gradient", None), **kwargs)
            self.pretended.backward = False
            return None
        if func is torch.Tensor.cpu:
            return self._move(args[0], torch.device("cpu"), None, False)
        if func is torch.Tensor.to and not any(isinstance(arg, torch.Tensor) for arg in args[1:]):
            copy = kwargs.pop("copy", False)
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            moved = self._move(args[0], device, dtype, non_blocking)
            return moved.clone() if copy and moved is args[0] else moved
        if func in (torch.Tensor.tolist, torch.Tensor.numpy) and isinstance(args[0], Elsewhere):
            return func(self._move(args[0], torch.device("cpu"), None, False), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _move(self, x, device, dtype, non_blocking):
        x = x if dtype is None else x.to(dtype)
        if device is None or _is_there(device) == isinstance(x, Elsewhere):
            return x
        if isinstance(x, Elsewhere):
            if non_blocking:  # PyTorch's optimisers, which ask C++ where their parameters are
                return x
            self.pretended.waits["copy to the host"] += 1
            return x.inside.detach().clone() if self.pretended.values else torch.zeros(x.shape, dtype=x.dtype)
        if not non_blocking:
            self.pretended.waits["copy from the host"] += 1
        return self.pretended.wrap(x.detach().to(self.pretended.inside, copy=True))


def _is_there(device):
    return device is not None and torch.device(device).type == DEVICE.type


def _map(do, value):
    """The arguments or results of an operation with `do` applied to each tensor among them."""
    if isinstance(value, torch.Tensor):
        return do(value)
    if isinstance(value, dict):
        return {key: _map(do, item) for key, item in value.items()}
    return type(value)(_map(do, item) for item in value) if isinstance(value, (list, tuple)) else value


class Pretended(TorchDispatchMode):
    """`with Pretended() as gpu:` gives the device. gpu.live and gpu.peak: bytes that are, and at most were,
    held there. gpu.waits: {what: how often} the host waited. gpu.products: {dtype: matrix products}."""

    def __init__(self, values=True):
        super().__init__()
        self.values, self.live, self.peak = values, 0, 0
        self.inside = torch.device("cpu" if values else "meta")
        self.waits, self.products = Counter(), Counter()
        self.backward = False  # then what C++ makes, zeros for a gradient, is meant to be on the device
        self._storages, self._methods = weakref.WeakSet(), _Methods(self)

    def __enter__(self):
        self._before = torch.__future__.get_swap_module_params_on_conversion(), torch.autocast
        # Module.to cannot change a tensor's class
        torch.__future__.set_swap_module_params_on_conversion(True)
        torch.autocast = self._autocast
        torch.privateuseone = SimpleNamespace(  # what checkpoint and manual_seed ask of a device's module
            get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
            _is_in_bad_fork=lambda: False,
            manual_seed_all=lambda seed: None,
        )
        super().__enter__()
        self._methods.__enter__()
        return self

    def __exit__(self, *error):
        self._methods.__exit__(*error)
        super().__exit__(*error)
        torch.__future__.set_swap_module_params_on_conversion(self._before[0])
        torch.autocast = self._before[1]
        del torch.privateuseone

    def _autocast(self, kind, *args, **options):
        return self._before[1]("cpu" if kind == DEVICE.type else kind, *args, **options)

    def wrap(self, inside):
        storage = inside.untyped_storage()
        if storage not in self._storages:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self._storages.add(storage)
            weakref.finalize(storage, self._freed, size)
            self.live += size
            self.peak = max(self.peak, self.live)
        return Elsewhere(inside)

    def _freed(self, size):
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = []
        _map(tensors.append, (args, kwargs))
        here = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
        if not here:
            if self.backward and not tensors and "device" in kwargs:
                return self.wrap(func(*args, **{**kwargs, "device": self.inside}))
            return func(*args, **kwargs)
        if func not in COPIES:
            for tensor in tensors:
                if not isinstance(tensor, Elsewhere) and (tensor.ndim or func in JOINS):
                    raise WrongDevice(f"{func}: tensors on {DEVICE} and on {tensor.device}")
        self._count(func, args, here)
        if not self.values and (func in UNKNOWN or "::_fused_" in func.name()):
            return self._unknown(func, args[0])
        if "device" in kwargs:
            kwargs["device"] = self.inside
        inside = _map(self._inside, (args, kwargs))
        out = _map(self.wrap, func(*inside[0], **inside[1]))
        return return_and_correct_aliasing(func, args, kwargs, out)

    def _inside(self, tensor):
        if isinstance(tensor, Elsewhere):
            return tensor.inside
        return tensor if self.values or not tensor.ndim else tensor.to("meta")  # a copy from the host

    def _count(self, func, args, here):
        if func in WAITS:
            self.waits[str(func)] += 1
        elif func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.waits["index by truth values"] += 1
        elif func is aten.copy_.default and len(here) < 2 and not (len(args) > 2 and args[2]):
            self.waits["copy"] += 1
        if func in PRODUCTS:
            self.products[here[-1].dtype] += 1

    def _unknown(self, func, tensor):
        """What depends on values that are not there: a number is 0, and places are as many as can be."""
        if "::_fused_" in func.name():  # optimisers: all in place
            return None
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=tensor.dtype).item()
        return self.wrap(torch.empty(tensor.numel(), tensor.ndim, dtype=torch.long, device="meta"))
