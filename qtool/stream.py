"""Run a model unit by unit, with only the tensors of one unit in memory (the head needs the embeddings beside it).

A stream is also the border of a device: what goes in and what comes out, between units, lies on the host, so that a
GPU holds a unit and a batch.

The model lives on the meta device; `loaded` fills one unit from a reader and empties it again. Batches flow through as
hidden states. What transformers passes to each block (masks, positions) is recorded from the model's own forward, so
nothing about the calls is guessed, and the head runs inside that forward too, with the blocks stubbed out.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qtool.anatomy import Anatomy, Unit
from qtool.device import CPU, mover
from qtool.errors import InputError
from qtool.nn.plan import one_by_one

Batch = Mapping[str, torch.Tensor]
Reader = Callable[[str], torch.Tensor]

_FORMS = (None, 2, 3)
"""What a model may expect of a block, tried in this order: the hidden states, or a tuple that begins with them."""

_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass
class Call:
    """The arguments with which the model calls a block, except the hidden states.

    Those come first, or under the name `keyword`.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None = None

    def moved(self, move: Callable[[Any], Any]) -> "Call":
        """With what `move` makes of its arguments."""
        return Call(move(self.args), move(self.kwargs), self.keyword)


class _Recorded(Exception):
    """The last block was reached: nothing behind it is needed."""


class _WrongForm(TypeError):
    """What came into a block is not what left the one before."""


class Stream:
    """A model skeleton (meta device) through which batches flow one unit at a time; caches are switched off.

    Units compute on `device`.
    """

    def __init__(self, model: Any, anatomy: Anatomy, reader: Reader, device: torch.device = CPU) -> None:
        self.model, self.anatomy, self.reader, self.device = model, anatomy, reader, device
        model.config.use_cache = False
        self._forms: dict[str, int | None] = {}

    @contextmanager
    def loaded(self, unit: Unit, reader: Reader | None = None) -> Iterator[None]:
        """The unit's tensors in the device's memory, from `reader` or the stream's own.

        With the head come the embeddings, which the model's forward begins with.
        """
        units = (self.anatomy.embeddings, unit) if unit.kind == "head" else (unit,)
        holders = dict(_holders(self.model, units))
        try:
            with self._plain_errors():
                fill(self.model, holders, reader or self.reader)
            if self.device.type != "cpu":
                self._move(holders, self.device)
            yield
        finally:
            self._move(holders, torch.device("meta"))
            give_back()

    def _move(self, paths: Iterable[str], device: torch.device) -> None:
        for path in paths:
            self.model.get_submodule(path)._apply(lambda tensor: tensor.to(device), recurse=False)

    @torch.inference_mode()
    def embed(self, batch: Batch) -> tuple[torch.Tensor, tuple[Call, ...]]:
        """Hidden states `[batch, tokens, hidden]` that enter block 0, and the call of every block, on the host.

        Raises InputError for a model that does not pass what leaves one block to the next.
        """
        said, host = "", mover(CPU)
        batch = mover(self.device)(dict(batch))
        with self._plain_errors():
            for form in _FORMS:
                recorder = _Recorder(form, self._name, len(self.anatomy.blocks))
                try:
                    with _replaced(self._blocks(), recorder.forward):
                        self.model(**batch)
                except _Recorded:
                    return host(recorder.entered), tuple(call.moved(host) for call in recorder.calls)
                except torch.OutOfMemoryError:
                    raise
                except _ERRORS as error:
                    if not recorder.calls:
                        raise
                    said = f" ({_line(error)})"
        raise InputError(f"{self._name} does not run block after block{said}; such models are not supported")

    @torch.inference_mode()
    def block(self, unit: Unit, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """One block: `[batch, tokens, hidden]` in and out, on the host."""
        return self.forward_block(unit, hidden, call).cpu()

    def forward_block(self, unit: Unit, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """As `block`, where gradients may be wanted, but the result stays on the device. Modules run one by one: what a
        method makes of the numbers and the golden outputs do not depend on which kernels join them."""
        module, move = self.model.get_submodule(unit.modules[0]), mover(self.device)
        hidden, call = move(hidden), call.moved(move)
        with self._plain_errors(), one_by_one(), self._repeatable():
            if call.keyword is None:
                out = module(hidden, *call.args, **call.kwargs)
            else:
                out = module(*call.args, **call.kwargs, **{call.keyword: hidden})
            several = isinstance(out, tuple | list)
            self._forms[unit.name] = len(out) if several else None
            hidden = out[0] if several else out
            assert isinstance(hidden, torch.Tensor), f"a block returns {type(hidden).__name__}, no tensor"
        return hidden

    def _repeatable(self) -> AbstractContextManager[Any]:
        """A GPU adds up gradients of fused attention in any order: where some are wanted, it is taken apart.

        Or the same run would learn other numbers.
        """
        fused = self.device.type == "cuda" and torch.is_grad_enabled()
        found: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH) if fused else nullcontext()
        return found

    @torch.inference_mode()
    def head(self, batch: Batch, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that the model returns, given what left the last block (which must have run before)."""
        forms = [self._forms.get(unit.name) for unit in self.anatomy.blocks]
        batch, hidden = mover(self.device)((dict(batch), hidden))

        def stub(index: int, *args: Any, **kwargs: Any) -> Any:
            return _formed(hidden, forms[index])

        with self._plain_errors(), _replaced(self._blocks(), stub):
            output = self.model(**batch, return_dict=True)  # a config may ask for tuples
        return {name: value.cpu() for name, value in output.items() if isinstance(value, torch.Tensor)}

    @property
    def _name(self) -> str:
        return self.anatomy.architecture

    def _blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(unit.modules[0]) for unit in self.anatomy.blocks]

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """A layout that was only guessed may not fit: that is a fact about the model, and one line."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except _ERRORS as error:
            if not self.anatomy.generic:
                raise
            raise InputError(f"{self._name} cannot be run unit by unit: {_line(error)}") from error


class _Recorder:
    """Stands for every block: notes how it is called and hands its input on, as a new tensor that can be recognised."""

    def __init__(self, form: int | None, name: str, count: int) -> None:
        self.form, self.name, self.count = form, name, count
        self.calls: list[Call] = []
        self.entered = self._passed = torch.empty(0)

    def forward(self, index: int, *args: Any, **kwargs: Any) -> Any:
        if index != len(self.calls):
            raise InputError(f"{self.name} runs its blocks more than once or in another order, which is not supported")
        keyword = None if args else next((key for key in kwargs if "hidden" in key), "")
        hidden = args[0] if keyword is None else kwargs.pop(keyword, None)
        if not isinstance(hidden, torch.Tensor) or (index and hidden is not self._passed):
            raise _WrongForm("what enters a block is not what left the one before")
        self.calls.append(Call(args[1:], kwargs, keyword))
        if not index:
            self.entered = hidden
        if len(self.calls) == self.count:
            raise _Recorded
        self._passed = hidden.view_as(hidden)
        return _formed(self._passed, self.form)


def _formed(hidden: torch.Tensor, form: int | None) -> Any:
    return hidden if form is None else (hidden, *[None] * (form - 1))


def _line(error: Exception) -> str:
    """The first line of a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stored(weights: Reader, name: str) -> torch.Tensor:
    """A float tensor in the dtype that its file has, where `weights` can give it so (a checkpoint can), else as read.

    Half the memory or none of it: what is stored is mapped. Rounding computes in float64 and takes any dtype.
    """
    read: Reader = getattr(weights, "stored", weights)
    return read(name)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what tensors of some megabytes leave, more with every batch."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def _replaced(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Calling `modules[i]` calls `forward(i, …)`."""
    try:
        for index, module in enumerate(modules):
            module.forward = partial(forward, index)
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _holders(model: Any, units: Sequence[Unit]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that directly hold tensors of `units`, by path."""
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        names = (f"{dot}{name}" for name in (*module._parameters, *module._buffers))
        if any(unit.owns(name) for name in names for unit in units):
            yield path, module


def whole(model: Any, reader: Reader) -> Any:
    """A skeleton with all of its tensors in memory, not only those of a unit."""
    fill(
        model, {path: module for path, module in model.named_modules() if module._parameters or module._buffers}, reader
    )
    model.tie_weights()
    return model


def fill(model: Any, holders: Mapping[str, nn.Module], reader: Reader) -> None:
    """Give `holders` their tensors: stored ones from `reader`, others as transformers initialises them."""
    for module in holders.values():  # first, because that would initialise weights too
        computed = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
        for name in computed:
            module.register_buffer(name, torch.empty_like(module.get_buffer(name), device="cpu"), persistent=False)
        if computed:
            model._init_weights(module)
    for path, module in holders.items():
        slots = {**module._parameters, **module._buffers}
        stored = [
            name for name, slot in slots.items() if slot is not None and name not in module._non_persistent_buffers_set
        ]
        dot = f"{path}." if path else ""
        module.load_state_dict({name: reader(f"{dot}{name}") for name in stored}, strict=False, assign=True)
