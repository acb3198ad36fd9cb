"""Many modules as one native call: their tensors as structs that the kernels read."""

import itertools
import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn

from qtool import kernels
from qtool.kernels.structs import address
from qtool.nn.module import fleeting

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FORWARDS: dict[type[nn.Module], Any] = {}  # of each class, as they were when it was first planned

H = TypeVar("H", bound=Callable[..., Any])

_chained = itertools.chain.from_iterable
_version = operator.attrgetter("_version")

_ONE_BY_ONE: ContextVar[bool] = ContextVar("modules one by one", default=False)


@contextmanager
def one_by_one() -> Iterator[None]:
    """While active, modules are called one by one. Float results then do not depend on which kernels join them."""
    token = _ONE_BY_ONE.set(True)
    try:
        yield
    finally:
        _ONE_BY_ONE.reset(token)


CHECKS: set[Callable[..., Any]] = set()
"""Hooks that look at nothing of a module but its settings; a plan that `runs_checks` has its user call them."""


def check(hook: H) -> H:
    """Marks a hook as one of `CHECKS`."""
    CHECKS.add(hook)
    return hook


class Plan:
    """Structs that point into tensors of `roots`, which stay where they are as long as the plan `holds`.

    `settings` are names of attributes that the structs depend on. With `called`, the roots are what runs the plan:
    their own hooks are called whether or not there is one.
    """

    runs_checks = False
    backend = ""
    """Which one runs it."""

    def __init__(self, roots: Sequence[nn.Module], settings: Sequence[str] = (), *, called: bool = False) -> None:
        self._kept: list[Any] = []
        modules = [module for root in roots for module in root.modules()]
        self._roots = [weakref.ref(root) for root in roots]  # one of them keeps this plan
        self._inner = [module for module in modules if all(module is not root for root in roots)]
        self._types: list[type[nn.Module]] = list(map(type, (*roots, *self._inner)))
        # All that is looked at before every forward, in steps that are taken in C: there are hundreds of tensors.
        self._tables: list[dict[str, Any]] = [
            table for module in modules for table in (module._modules, module._buffers, module._parameters)
        ]
        self._sizes, self._filled = list(map(len, self._tables)), list(filter(None, self._tables))
        self._names, self._values = list(_chained(self._filled)), list(self._entries())
        self._tensors = [value for value in self._values if isinstance(value, torch.Tensor)]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._state = self._state_now()
        self._settings = [
            (module.__dict__, name, module.__dict__[name])
            for module in modules
            for name in settings
            if name in module.__dict__
        ]
        self._hooks = [getattr(module, name) for module in (self._inner if called else modules) for name in _HOOKS]
        self._own = [module.__dict__ for module in self._inner]
        self._classes = set(self._types)
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
        if list(map(type, (*roots, *self._inner))) != self._types:
            return False
        if list(map(len, self._tables)) != self._sizes or list(_chained(self._filled)) != self._names:
            return False
        if not all(map(operator.is_, self._values, self._entries())):
            return False
        if any(table.get(name) is not value for table, name, value in self._settings):
            return False
        return self._state_now() == self._state

    def watched(self) -> bool:
        """Whether somebody wants to see or do what happens inside: then modules must be called one by one."""
        if any(self._hooks):
            awake = itertools.filterfalse(_asleep, self._hooked())
            if any(not self.runs_checks or hook not in CHECKS for hook in awake):
                return True
        if nn.modules.module._has_any_global_hook():
            return True
        if any(cls.forward is not _FORWARDS[cls] for cls in self._classes):
            return True
        roots = [root.__dict__ for known in self._roots if (root := known()) is not None]
        return any(["forward" in own for own in (*self._own, *roots)])

    def _entries(self) -> Iterator[Any]:
        return _chained(map(dict.values, self._filled))

    def _hooked(self) -> Iterator[Any]:
        for hooks in self._hooks:
            yield from hooks.values()

    def _state_now(self) -> tuple[list[int], list[int]]:
        """Where the numbers of all tensors are, and how often they were changed."""
        return list(map(torch.Tensor.data_ptr, self._tensors)), list(map(_version, self._counted))

    def _address(self, tensor: torch.Tensor | None) -> int | None:
        """Where the numbers of a tensor start, which is kept in memory."""
        tensor = None if tensor is None else tensor.detach().contiguous()
        self._kept.append(tensor)
        return address(tensor)


def _asleep(hook: Any) -> bool:
    """Whether it is one of those that transformers leaves on a model once `output_hidden_states` was asked for, and
    that see nothing of calls that do not ask."""
    if getattr(hook, "__module__", None) != "transformers.utils.output_capturing":
        return False
    collector = getattr(sys.modules[hook.__module__], "_active_collector", None)
    return collector is not None and not collector.get()


class NoPlan(Plan):
    """Says of unchanged modules that they do not fit, so that this is found out once."""


class SameName:
    """Of subclasses that modules are given under the name of their own class; copies and pickles as that does."""

    _make: Callable[[Any], Any]
    _original: Any

    @staticmethod
    def subclass(make: Callable[[Any], Any], mark: type, cls: Any, forward: Callable[..., Any]) -> Any:
        """A subclass of `cls`, marked, with another forward; `make` is the function that was asked for it."""
        theirs = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        body = {"forward": forward, "_make": staticmethod(make), "_original": cls, **theirs}
        return type(cls.__name__, (mark, cls), body)

    def _apply(self, *args: Any, **options: Any) -> Any:
        self.__dict__.pop("_plan", None)  # it points into tensors that leave, and would keep them in memory
        above: Any = super()
        return above._apply(*args, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "_make" not in vars(type(self)):  # somebody's own subclass, which is found under its own name
            return super().__reduce_ex__(protocol)
        return _rebuild, (self._make, self._original), self.__dict__


def _rebuild(make: Callable[[Any], Any], cls: Any) -> Any:
    return object.__new__(make(cls))


P = TypeVar("P", bound=Plan)


def kept_plan(
    owner: nn.Module, roots: Sequence[nn.Module], make: Callable[[], P], backends: Sequence[str] = ("native",)
) -> P | None:
    """The plan for `roots` that `owner` keeps, made again when a module or tensor changed.

    None with a backend that is none of `backends` or inside `one_by_one`, while units of the model are still to be
    loaded, and where somebody watches. Where operands are fleeting, so is the plan, which holds them.
    """
    name = kernels.backend(_device(roots)).name
    if name not in backends or _ONE_BY_ONE.get():
        return None
    known: P | None = owner.__dict__.get("_plan")
    if known is None or known.backend != name or not known.holds(roots):
        if any(tensor.is_meta for root in roots for tensor in (*root.buffers(), *root.parameters())):
            return None
        known = make()
        known.backend = name
        if not fleeting():
            owner.__dict__["_plan"] = known
    return None if known.watched() else known


def _device(roots: Sequence[nn.Module]) -> torch.device:
    """Where the tensors of modules are: of the first that has one."""
    found = next((tensor for root in roots for tensor in (*root.buffers(), *root.parameters())), None)
    return torch.device("cpu") if found is None else found.device
