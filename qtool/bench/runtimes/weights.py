"""Bytes of the weights of a torch model: as they would be saved, and those that a forward reads."""

from collections.abc import Iterator
from typing import Any

import torch

from qtool.nn.embedding import QEmbedding
from qtool.nn.integer.embedding import IntTableRows

_TABLES = (torch.nn.Embedding, QEmbedding, IntTableRows)
"""Modules that look up few of their rows."""


def state_bytes(model: Any) -> int:
    """Bytes that the weights of a model take when saved; packed layers of torch give them up as pairs."""
    found = 0
    stack = list(model.state_dict().values())
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            found += sum(part.numel() * part.element_size() for part in _parts(value))
        elif isinstance(value, tuple):
            stack += value
    return found


def read_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights that a forward reads as a whole: of tables only one that is an output layer's too.

    Buffers that no file holds, such as positions, are no weights.
    """
    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, _TABLES):
            continue
        shared = getattr(module, "weight", None)  # a tied layer's weight is registered elsewhere
        kept = (value for name, value in module._buffers.items() if name not in module._non_persistent_buffers_set)
        own = [*module._parameters.values(), *kept, shared]
        for tensor in (value for value in own if isinstance(value, torch.Tensor)):
            found |= {part.data_ptr(): part.numel() * part.element_size() for part in _parts(tensor)}
    return sum(found.values())


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor itself, or what one is made of whose class only imitates a tensor, such as torchao's."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        if (inner := getattr(tensor, name)) is not None:
            yield from _parts(inner)
