"""Run a model unit by unit, with only the tensors of one unit in memory.

The model lives on the meta device; `loaded` fills one unit from a reader and empties it again. Batches flow through as
hidden states. What transformers passes to its blocks (masks, positions) is captured once from a hook on block 0, so
nothing about the call is guessed, and the head runs inside the model's own forward with the body stubbed out.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool.anatomy import Anatomy, Unit

Batch = Mapping[str, torch.Tensor]
Reader = Callable[[str], torch.Tensor]


@dataclass
class Call:
    """The arguments with which the model calls a block, except the hidden states that come first."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Captured(Exception):
    def __init__(self, hidden: torch.Tensor, call: Call) -> None:
        super().__init__("block 0 was reached")
        self.hidden, self.call = hidden, call


class Stream:
    """A model skeleton (meta device) through which batches flow one unit at a time."""

    def __init__(self, model: Any, anatomy: Anatomy, reader: Reader) -> None:
        self.model, self.anatomy, self.reader = model, anatomy, reader

    @contextmanager
    def loaded(self, unit: Unit) -> Iterator[None]:
        """The unit's tensors in memory; the head also gets the word table that its output layer may share."""
        paths = [*unit.modules]
        if unit.kind == "head" and self.anatomy.tied_head:
            paths.append(self.anatomy.word_table)
        try:
            for path in paths:
                fill(self.model, path, self.reader)
            yield
        finally:
            for path in paths:
                self.model.get_submodule(path).to("meta")

    @torch.inference_mode()
    def embed(self, batch: Batch) -> tuple[torch.Tensor, Call]:
        """Hidden states `[batch, tokens, hidden]` that enter block 0, and the call that all blocks get."""

        def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Captured(args[0], Call(args[1:], kwargs))

        block = self.model.get_submodule(self.anatomy.blocks[0].modules[0])
        handle = block.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            self.model(**batch)
        except _Captured as captured:
            return captured.hidden, captured.call
        finally:
            handle.remove()
        raise AssertionError("the model's forward ended without calling its first block")

    @torch.inference_mode()
    def block(self, unit: Unit, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """One block: `[batch, tokens, hidden]` in and out."""
        out = self.model.get_submodule(unit.modules[0])(hidden, *call.args, **call.kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
        assert isinstance(hidden, torch.Tensor)
        return hidden

    @torch.inference_mode()
    def head(self, batch: Batch, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that the model returns, given what left the last block."""
        with ExitStack() as stack:
            for unit in self.anatomy.units[:-1]:
                stack.enter_context(_returning(self.model.get_submodule(unit.modules[0]), hidden))
            output = self.model(**batch, return_dict=True)  # a config may ask for tuples
        return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


@contextmanager
def _returning(module: nn.Module, value: torch.Tensor) -> Iterator[None]:
    """`module(...)` gives `value`, whatever it is called with."""
    module.forward = lambda *args, **kwargs: value
    try:
        yield
    finally:
        del module.forward


def fill(model: Any, path: str, reader: Reader) -> None:
    """Give the submodule at `path` its tensors: stored ones from `reader`, others as transformers initialises them."""
    module = model.get_submodule(path)
    tensors = {name: reader(f"{path}.{name}") for name in module.state_dict()}
    module.load_state_dict(tensors, strict=True, assign=True)
    for child in module.modules():
        computed = child._non_persistent_buffers_set
        for name in computed:
            child.register_buffer(name, torch.empty_like(child.get_buffer(name), device="cpu"), persistent=False)
        if computed:
            model._init_weights(child)
