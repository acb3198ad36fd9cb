"""A CUDA device for machines without one: real numbers, computed on the CPU by tensors that say that they are on a GPU.

Inside `emulated_cuda()` torch has one GPU. `x.to("cuda")` gives an `OnGpu`, whose operations run on the tensor that it
holds; factories with `device="cuda"` give one too. What a real GPU refuses is refused: tensors of both devices in one
operation (scalars of the CPU may join), products of integer matrices, `numpy()`, generators of the other device.

To torch's C++ such a tensor is one of the CPU with a dispatcher in Python, so that autograd needs no streams. That is
why what Python code reads of it (`device`, `is_cuda`) is said here, and why `to` and `cpu` are defined here: C++ would
find nothing to do.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from qtool import kernels
from qtool.kernels import triton

GPU = torch.device("cuda", 0)
MIXED = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
_CPU = torch.device("cpu")
_aten: Any = torch.ops.aten

_PRODUCTS = {
    _aten.mm: "addmm_cuda", _aten.addmm: "addmm_cuda", _aten.bmm: "baddbmm_cuda", _aten.baddbmm: "baddbmm_cuda",
    _aten.matmul: "addmm_cuda", _aten.linear: "addmm_cuda", _aten.einsum: "baddbmm_cuda",
    _aten.mv: "addmv_impl_cuda", _aten.addmv: "addmv_impl_cuda", _aten.dot: "dot",
}  # fmt: skip
"""Operations that CUDA has for floats alone, by the name in its message."""
_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_, _aten._unsafe_index, _aten._index_put_impl_)
"""Operations whose indices may be on the CPU: CUDA fetches them."""


def _unlike_cpu(name: str) -> Callable[..., Any]:
    def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"can't convert cuda:0 device type tensor to numpy ({name}). Use Tensor.cpu() to copy the tensor to host "
            "memory first."
        )

    return refused


class OnGpu(torch.Tensor):
    """See the module. `inner` is the tensor that holds the numbers; both share their memory."""

    inner: torch.Tensor

    @staticmethod
    def of(inner: torch.Tensor) -> "OnGpu":
        """A tensor of the CPU, without its history, as one of the GPU."""
        assert type(inner) is torch.Tensor, type(inner)
        found: Any = torch.Tensor._make_subclass(OnGpu, inner)  # type: ignore[attr-defined]
        found.inner = inner
        return found  # type: ignore[no-any-return]

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})

    def get_device(self) -> int:
        return 0

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _to_method(self, *args, **kwargs)

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _moved(self, _CPU, self.dtype)

    def cuda(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": GPU, **kwargs})

    def __deepcopy__(self, memo: Any) -> "OnGpu":
        with torch.no_grad():
            copied = OnGpu.of(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True  # type: ignore[attr-defined]
        memo[id(self)] = copied
        return copied

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnGpu({self.inner!r})"

    numpy = _unlike_cpu("numpy")
    __array__ = _unlike_cpu("__array__")
    __dlpack__ = _unlike_cpu("__dlpack__")


def _to_method(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`x.to(…)`, with gradients that come back to the device of `x`: to C++ there is only one."""
    device, dtype, _, form = torch._C._nn._parse_to(
        *(_described(one) for one in args), **{name: value for name, value in kwargs.items() if name != "copy"}
    )
    if args and isinstance(args[0], torch.Tensor):
        device, dtype = args[0].device, args[0].dtype
    return _moved(x, device or x.device, dtype or x.dtype, bool(kwargs.get("copy")), form)


def _described(argument: Any) -> Any:
    """`_parse_to` would look at a tensor's device in C++."""
    return argument.dtype if isinstance(argument, torch.Tensor) else argument


class _Move(torch.autograd.Function):
    """Between devices and types; gradients go back to where the input was."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, device: torch.device, dtype: torch.dtype, form: Any) -> torch.Tensor:
        ctx.source = x.device, x.dtype
        return _aten._to_copy.default(x, dtype=dtype, device=device, memory_format=form)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0].to(*ctx.source), None, None, None


def _moved(x: torch.Tensor, device: Any, dtype: torch.dtype, copy: bool = False, form: Any = None) -> torch.Tensor:
    if torch.device(device).type == x.device.type and dtype == x.dtype and not copy and form is None:
        return x
    return _Move.apply(x, torch.device(device), dtype, form)  # type: ignore[no-any-return, no-untyped-call]


@dataclass
class Gpu:
    """What an emulated GPU was asked for: operations that it ran, and how often somebody waited for it."""

    operations: int = 0
    waits: int = 0


_PRESENT = Gpu()


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation whose tensors may be on either device."""
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    device = kwargs.get("device")
    if function.overloadpacket is _aten._to_copy:
        return _copied(args[0], kwargs, device)
    if function.overloadpacket is _aten.to:  # whole in inference mode, where nothing is taken apart before
        return _to(**{**dict(zip((one.name for one in function._schema.arguments), args, strict=False)), **kwargs})
    here = _checked(function, args, kwargs, tensors)
    _PRESENT.operations += here
    asked = device is not None and torch.device(device).type == "cuda"
    # A formula of autograd makes zeros where it believes its input to be: to C++ that is the CPU.
    asked = asked or (here and torch._C._current_graph_task_id() != -1)
    if device is not None:
        kwargs = {**kwargs, "device": _CPU if torch.device(device).type == "cuda" else device}
        here = asked
    if kwargs.get("pin_memory"):
        kwargs = {**kwargs, "pin_memory": False}
    wrappers = {id(one.inner): one for one in tensors if isinstance(one, OnGpu)}
    args, kwargs = tree_map(_inner, (args, kwargs))
    found = function(*args, **kwargs)

    def outer(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in wrappers:
            known = wrappers[id(value)]
            assert known.shape == value.shape, f"{function} changes a shape in place, which is not emulated"
            return known
        return OnGpu.of(value) if here else value

    return tree_map(outer, found)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnGpu) else value


def _to(self: torch.Tensor, other: Any = None, device: Any = None, dtype: Any = None, **rest: Any) -> torch.Tensor:
    if other is not None:
        device, dtype = other.device, other.dtype
    stays = device is None or torch.device(device).type == self.device.type
    if stays and dtype in (None, self.dtype) and not rest.get("copy"):
        return self
    return _copied(self, {"dtype": dtype, "memory_format": rest.get("memory_format")}, device)


def _copied(source: torch.Tensor, kwargs: dict[str, Any], device: Any) -> torch.Tensor:
    to_gpu = source.is_cuda if device is None else torch.device(device).type == "cuda"
    rest = {name: value for name, value in kwargs.items() if name not in ("device", "non_blocking", "pin_memory")}
    if device is not None and torch.device(device).type not in ("cuda", "cpu"):
        rest["device"] = device
    found: torch.Tensor = _aten._to_copy.default(_inner(source), **rest)
    return OnGpu.of(found) if to_gpu else found


def _checked(function: Any, args: Any, kwargs: dict[str, Any], tensors: list[torch.Tensor]) -> bool:
    """Whether the operation runs on the GPU. Raises what CUDA raises."""
    packet = function.overloadpacket
    mine = [one for one in tensors if isinstance(one, OnGpu)]
    generator = kwargs.get("generator")
    device = kwargs.get("device")
    on_gpu = bool(mine) or (device is not None and torch.device(device).type == "cuda")
    if generator is not None and on_gpu and generator.device.type == "cpu":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if not mine:
        return False
    if packet in _PRODUCTS and not all(one.is_floating_point() or one.is_complex() for one in mine):
        raise NotImplementedError(f"\"{_PRODUCTS[packet]}\" not implemented for '{_kind(mine[-1])}'")
    if packet is _aten._int_mm:
        (rows, inner), columns = args[0].shape, args[1].shape[1]
        if rows <= 16 or inner % 8 or columns % 8:
            raise RuntimeError(f"self.size(0) needs to be greater than 16, and sizes multiples of 8; got {rows}")
    if packet in (_aten.copy_, _aten._local_scalar_dense, _aten.set_data):
        return isinstance(args[0], OnGpu)
    looked_at = tensors
    if packet in _INDEXING:  # self, and what is put there
        looked_at = [one for one in (args[0], *args[2:3]) if isinstance(one, torch.Tensor)]
        if not isinstance(args[0], OnGpu):  # CUDA's indices are not fetched for a tensor of the CPU
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    others = [one for one in looked_at if not isinstance(one, OnGpu) and not one.is_meta]
    written = function._schema.is_mutable and not isinstance(args[0], OnGpu)
    if written or any(one.dim() > 0 or packet.__name__.rstrip("_") not in _WITH_SCALARS for one in others):
        raise RuntimeError(f"{MIXED} ({function})")
    return True


_WITH_SCALARS = frozenset(
    {
        *("add", "sub", "rsub", "mul", "div", "minimum", "maximum", "pow", "remainder", "where", "masked_fill", "fill"),
        *("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "bitwise_xor"),
        *("bitwise_left_shift", "bitwise_right_shift", "__lshift__", "__rshift__", "__ilshift__", "__irshift__"),
        *("index_put", "_index_put_impl", "index"),
    }
)
"""Operations in which a scalar of the CPU may join, in place too: those whose kernels take one as a number."""


def _kind(tensor: torch.Tensor) -> str:
    names = {torch.int8: "Char", torch.uint8: "Byte", torch.int16: "Short", torch.int32: "Int", torch.int64: "Long"}
    return names.get(tensor.dtype, "Bool")


class _Gpu(TorchDispatchMode):
    """Sends every operation through `_run`: factories too, and those on tensors of the CPU, which may be moved."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Indexed(TorchFunctionMode):
    """`cuda` is `cuda:0`: a torch without CUDA cannot ask which one is current.

    `as_tensor` of a tensor moves it in C++, past every dispatcher; gradients of `to` would not come back: see
    `_to_method`.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.device:  # makes one, and takes none
            return GPU if args == (0,) else function(*args, **(kwargs or {}))
        if function is scaled_dot_product_attention and kwargs and kwargs.get("is_causal") and args[0].is_cuda:
            # Taken apart, it would make its mask where C++ believes the query to be.
            mask = torch.ones(args[0].shape[-2], args[1].shape[-2], dtype=torch.bool, device=GPU).tril()
            kwargs = {**kwargs, "attn_mask": mask, "is_causal": False}
        known = torch._has_compatible_shallow_copy_type
        if function is known and any(isinstance(one, OnGpu) for one in args):
            return False  # so that a module makes new parameters
        if getattr(function, "__name__", "") == "cuda" and args and not isinstance(args[0], OnGpu):
            function, args, kwargs = torch.Tensor.to, (args[0], GPU), {}
        args, kwargs = tuple(map(_indexed, args)), {name: _indexed(value) for name, value in (kwargs or {}).items()}
        kwargs |= {"device": GPU} if type(kwargs.get("device")) is int else {}
        moves = function is torch.as_tensor and isinstance(args[0], torch.Tensor)
        moves = moves or (function is torch.Tensor.to and GPU in (*args[1:], *kwargs.values()))
        return _to_method(*args, **kwargs) if moves else function(*args, **kwargs)


def _indexed(value: Any) -> Any:
    bare = value == "cuda" if isinstance(value, str) else isinstance(value, torch.device) and value == _BARE
    return GPU if bare else value


_BARE = torch.device("cuda")

_CUDA: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "_lazy_init": lambda: None,
    "get_device_name": lambda device=None: "Emulated GPU",
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": lambda device=None: SimpleNamespace(
        name="Emulated GPU", major=9, minor=0, total_memory=8 << 30, multi_processor_count=1
    ),
    "mem_get_info": lambda device=None: (6 << 30, 8 << 30),
    "memory_reserved": lambda device=None: 0,
    "memory_allocated": lambda device=None: 0,
    "empty_cache": lambda: None,
    "device": lambda device: nullcontext(),
    "is_current_stream_capturing": lambda: True,  # graphs are not emulated: so nobody records one
}


@contextmanager
def emulated_cuda(backend: str | None = "reference") -> Iterator[Gpu]:
    """While active, torch has a GPU that is the CPU; `backend` computes on it (None: the usual one)."""
    gpu = _PRESENT
    gpu.operations = gpu.waits = 0

    def wait(device: Any = None) -> None:
        gpu.waits += 1

    with pytest.MonkeyPatch.context() as patch:
        for name, function in _CUDA.items():
            patch.setattr(torch.cuda, name, function)
        patch.setattr(torch.cuda, "synchronize", wait)
        patch.setattr(torch.version, "cuda", "13.0")
        if backend is None:
            patch.delenv("QTOOL_BACKEND", raising=False)
        else:
            patch.setenv("QTOOL_BACKEND", backend)
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # dispatchers are those of a thread
        lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        caches: tuple[Any, ...] = (triton.reason, kernels._default)
        _clear(caches)
        try:
            with _Indexed(), _Gpu():
                yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
            _clear(caches)


def _clear(caches: tuple[Any, ...]) -> None:
    for cached in caches:
        assert isinstance(cached, functools._lru_cache_wrapper)
        cached.cache_clear()
