"""A CUDA graph for machines without a GPU: operations on tensors and Triton's kernels go onto a tape and are played.

As in a graph, what is played are operations on the tensors of the recording, with the numbers that Python had then: a
position or a length that Python counted would be an old one. Recording computes, to know shapes, and takes back what it
wrote into tensors from outside. What waits for the device is refused as CUDA refuses it.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from triton.runtime.interpreter import GridExecutor

_aten: Any = torch.ops.aten
_WAITING = (
    *(_aten._local_scalar_dense, _aten.item, _aten.is_nonzero, _aten.nonzero, _aten.masked_select),
    *(_aten.repeat_interleave, _aten._unique2, _aten.unique_consecutive, _aten.unique_dim, _aten.bincount),
    *(_aten.equal, _aten.allclose),
    _aten.lift_fresh,  # `torch.tensor(…)`: a copy of what the host has
)

Step = Callable[[], Any]


class Tape:
    """Takes the place of `graphs.Recording`."""

    made: ClassVar[list["Tape"]] = []
    _present: ClassVar["Tape | None"] = None

    def __init__(self, function: Callable[..., Any], tensors: Mapping[str, torch.Tensor], place: Any) -> None:
        self.place = place
        with torch.inference_mode(False), torch.no_grad():
            self._inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        self._steps: list[tuple[Step, list[torch.Tensor]]] = []
        self._own = {tensor.untyped_storage().data_ptr() for tensor in self._inputs.values()}
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.plays = 0
        self.kernels = 0
        """How many a GPU would start, as each operation that is neither a view nor memory alone is at least one."""
        Tape._present = self
        try:
            with _Taping(self):
                self.output = function(**self._inputs)
        finally:
            Tape._present = None
            for tensor, content in self._before.values():
                tensor.copy_(content)
        self.made.append(self)

    def add(self, step: Step) -> Any:
        """Compute a step, and keep it."""
        result = step()
        found = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._own |= {tensor.untyped_storage().data_ptr() for tensor in found}
        self._steps.append((step, found))
        return result

    def keep(self, tensor: torch.Tensor) -> None:
        """Remember what a tensor from outside holds, which is about to be written."""
        place = tensor.untyped_storage().data_ptr()
        if place not in self._own and tensor.data_ptr() not in self._before:
            self._before[tensor.data_ptr()] = tensor, tensor.clone()

    def play(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """See `graphs.Recording`."""
        self.plays += 1
        for name, tensor in tensors.items():
            self._inputs[name].copy_(tensor)
        with torch.inference_mode():
            for step, places in self._steps:
                found = [leaf for leaf in tree_leaves(step()) if isinstance(leaf, torch.Tensor)]
                for place, value in zip(places, found, strict=True):
                    if place.data_ptr() != value.data_ptr():
                        place.copy_(value)
        return tree_map_only(torch.Tensor, torch.Tensor.clone, self.output)

    @classmethod
    def capturing(cls) -> bool:
        """What `torch.cuda.is_current_stream_capturing` says."""
        return cls._present is not None


class _Taping(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket in _WAITING or _counts(function, args):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({function})")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, torch.Tensor):
                self._tape.keep(value)
        memory = function.overloadpacket in (_aten.empty, _aten.empty_strided, _aten.new_empty, _aten.empty_like)
        self._tape.kernels += not (memory or function.is_view)
        return self._tape.add(lambda: function(*args, **kwargs))


def _counts(function: Any, args: Any) -> bool:
    """Whether the size of the result, or where it goes, depends on numbers: indices that are masks."""
    if function.overloadpacket not in (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_):
        return False
    return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])


_launch = GridExecutor.__call__


def _taped_launch(self: Any, *args: Any, **kwargs: Any) -> None:
    """A kernel that is interpreted, as one step of what is recorded."""

    def step() -> None:
        with _disable_current_modes():
            _launch(self, *args, **kwargs)

    if Tape._present is None:
        _launch(self, *args, **kwargs)
    else:
        Tape._present.kernels += 1
        Tape._present.add(step)


def tape(patch: Any) -> list[Tape]:
    """Let graphs be tapes; those that will be made."""
    from qtool import recorded
    from qtool.kernels.triton import graphs

    patch.setattr(Tape, "made", [])
    patch.setattr(graphs, "Recording", Tape)
    patch.setattr(GridExecutor, "__call__", _taped_launch)
    patch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    patch.setattr(torch.cuda, "is_current_stream_capturing", Tape.capturing)
    patch.setattr(recorded, "_on_gpu", lambda tensors: not Tape.capturing())
    patch.setattr(recorded, "_is_on_gpu", lambda value: isinstance(value, torch.Tensor))
    return Tape.made
