"""Many modules as one native call: their tensors as structs that the kernels read."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

from qtool import kernels
from qtool.kernels.structs import address

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARDS: dict[type[nn.Module], Any] = {}  # of each class, as they were when it was first planned

_ONE_BY_ONE: ContextVar[bool] = ContextVar("modules one by one", default=False)


@contextmanager
def one_by_one() -> Iterator[None]:
    """While active, modules are called one by one. Float results then do not depend on which kernels join them."""
    token = _ONE_BY_ONE.set(True)
    try:
        yield
    finally:
        _ONE_BY_ONE.reset(token)


class Plan:
    """Structs that point into tensors of `roots`, which stay where they are as long as the plan `holds`."""

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self._kept: list[Any] = []
        modules = [module for root in roots for module in root.modules()]
        self._roots = [weakref.ref(root) for root in roots]  # one of them keeps this plan
        self._modules = [weakref.ref(module) for module in modules]
        self._children = [(module._modules, list(module._modules.values())) for module in modules]
        self._tensors = [
            (table, name, tensor, _state(tensor))
            for module in modules
            for table in (module._buffers, module._parameters)
            for name, tensor in table.items()
        ]
        self._hooks = [getattr(module, name) for module in modules for name in _HOOKS]
        self._classes = {type(module) for module in modules}
        for cls in self._classes:
            _FORWARDS.setdefault(cls, cls.forward)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles of a module have other tensors: they start without a plan."""
        return type(None), ()

    def holds(self, roots: Sequence[nn.Module]) -> bool:
        """Whether `roots` have the modules and the tensors that the plan points to, unchanged and where they were.

        What is written past torch's version counters, through `.data` or in inference mode, is not noticed.
        """
        if [known() for known in self._roots] != list(roots):
            return False
        if any(list(table.values()) != known for table, known in self._children):
            return False
        for table, name, tensor, state in self._tensors:  # hundreds, before every forward
            if table.get(name) is not tensor or _state(tensor) != state:
                return False
        return True

    def watched(self) -> bool:
        """Whether somebody wants to see or do what happens inside: then modules must be called one by one."""
        if any(self._hooks) or nn.modules.module._has_any_global_hook():
            return True
        if any(cls.forward is not _FORWARDS[cls] for cls in self._classes):
            return True
        return any("forward" in module.__dict__ for known in self._modules if (module := known()) is not None)

    def _address(self, tensor: torch.Tensor | None) -> int | None:
        """Where the numbers of a tensor start, which is kept in memory."""
        tensor = None if tensor is None else tensor.detach().contiguous()
        self._kept.append(tensor)
        return address(tensor)


P = TypeVar("P", bound=Plan)


def kept_plan(owner: nn.Module, roots: Sequence[nn.Module], make: Callable[[], P]) -> P | None:
    """The plan for `roots` that `owner` keeps, made again when a module or tensor changed.

    None without the native backend or inside `one_by_one`, while units of the model are still to be loaded, and where
    somebody watches.
    """
    if kernels.backend().name != "native" or _ONE_BY_ONE.get():
        return None
    known: P | None = owner.__dict__.get("_plan")
    if known is None or not known.holds(roots):
        if any(tensor.is_meta for root in roots for tensor in (*root.buffers(), *root.parameters())):
            return None
        known = owner.__dict__["_plan"] = make()
    return None if known.watched() else known


def _state(tensor: torch.Tensor | None) -> tuple[int, int] | None:
    """Where a tensor's numbers are, and how often they were changed."""
    if tensor is None:
        return None
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
