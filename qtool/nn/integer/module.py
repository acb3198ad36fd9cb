"""What integer modules share: integers in, integers out, and one multiplication where numbers leave the model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool.nn.module import QModule
from qtool.numerics.dyadic import Dyadic

_INTEGER_OUTPUTS: ContextVar[bool] = ContextVar("integer outputs", default=False)


@contextmanager
def integer_outputs() -> Iterator[None]:
    """While active, models return the int32 numbers that they compute, before the multiplication at the very end."""
    token = _INTEGER_OUTPUTS.set(True)
    try:
        yield
    finally:
        _INTEGER_OUTPUTS.reset(token)


def gives_integers() -> bool:
    """Whether `integer_outputs` is active."""
    return _INTEGER_OUTPUTS.get()


def leave(x: torch.Tensor, exponent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """int32 in units of 2^-exponent as floats of `dtype`, or untouched inside `integer_outputs`."""
    if _INTEGER_OUTPUTS.get():
        return x
    wide = torch.float64 if dtype == torch.float64 else torch.float32  # 16 bits would overflow before the division
    return torch.ldexp(x.to(wide), -exponent).to(dtype)


@dataclass(frozen=True)
class Bound:
    """The largest magnitude that an accumulator can reach with the present weights, and what its type holds."""

    what: str
    reaches: int
    limit: int


class IntModule(QModule):
    """A module that computes with integers alone; its description and its buffers hold no float."""

    _scales = ()

    def bounds(self) -> list[Bound]:
        """Every accumulator of the module (math.md, 10)."""
        return []

    def rescale_buffers(self, prefix: str, shape: tuple[int, ...], device: str) -> None:
        """Empty buffers for a dyadic number a channel."""
        for name in ("multiplier", "shift"):
            self.register_buffer(f"{prefix}{name}", torch.empty(shape, dtype=torch.int32, device=device))

    def fill_rescale(self, prefix: str, ratio: torch.Tensor) -> None:
        """Set those buffers to the nearest dyadic numbers. Raises InputError for a ratio that is not below 2^30."""
        slot = getattr(self, f"{prefix}multiplier")
        dyadic = Dyadic.from_float(ratio.expand(slot.shape))
        setattr(self, f"{prefix}multiplier", dyadic.multiplier)
        setattr(self, f"{prefix}shift", dyadic.shift)


class IntComposite(IntModule):
    """A module of integer modules, which lie at the paths that their float models had inside the replaced one.

    `parts` maps a role to a path and a description. Tensors of an artifact then keep the names of the float model's.
    """

    kind: str

    def __init__(self, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str) -> None:
        super().__init__()
        from qtool.nn import MODULES

        self.parts = {role: str(part["path"]) for role, part in description["parts"].items()}
        for role, inside in sorted(self.parts.items(), key=lambda item: item[1].count(".")):
            part = description["parts"][role]
            module = MODULES[part["type"]].from_description(model, f"{path}.{inside}", part, device=device)
            *parents, name = inside.split(".")
            holder: nn.Module = self
            for parent in parents:
                if not hasattr(holder, parent):
                    holder.add_module(parent, nn.Module())
                holder = getattr(holder, parent)
            holder.add_module(name, module)

    def part(self, role: str) -> Any:
        """The module that plays a role."""
        return self.get_submodule(self.parts[role])

    def description(self) -> dict[str, Any]:
        """The descriptions of all parts."""
        parts = {role: {"path": path, **self.part(role).description()} for role, path in self.parts.items()}
        return {"type": self.kind, "parts": parts}

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "IntComposite":
        """See `QModule`."""
        return cls(model, path, description, device=device)
