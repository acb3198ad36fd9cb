"""What quantized modules have in common: integer buffers, scales that keep their dtype, a description."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from qtool import kernels

_FLEETING: ContextVar[bool] = ContextVar("operands are not kept", default=False)


@contextmanager
def fleeting_operands() -> Iterator[None]:
    """While active, modules keep no operands: a backend that copies codes holds those of one module at a time."""
    token = _FLEETING.set(True)
    try:
        yield
    finally:
        _FLEETING.reset(token)


def fleeting() -> bool:
    """Whether `fleeting_operands` is active."""
    return _FLEETING.get()


class QModule(nn.Module, ABC):
    """A module whose weights are integer codes.

    Buffers hold codes and scales in the layout of the file. `.to(dtype)`, `.half()` and the like change `output_dtype`
    and leave the scales in float32: a scale rounded to 16 bits would silently cost accuracy.
    """

    output_dtype: torch.dtype = torch.float32
    _scales: tuple[str, ...] = ("weight_scale",)

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What `from_description` needs to rebuild this module without its tensors; JSON-clean."""

    @classmethod
    @abstractmethod
    def from_description(cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str) -> "QModule":
        """An empty module for `path` of `model`, on `device`."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QModule":
        self.__dict__.pop("_plan", None)  # of a composite: it points into tensors that leave
        scales = [scale for name in self._scales if (scale := getattr(self, name, None)) is not None]

        def keep_scales(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            changed = moved.dtype != tensor.dtype and any(tensor is scale for scale in scales)
            return tensor.to(moved.device) if changed else moved

        super()._apply(keep_scales, recurse)  # type: ignore[no-untyped-call]
        # What `fn` does to a tensor of the present type, and not to a scale: a move after `.half()` must not undo it.
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype, device="cpu")).dtype
        return self


class CodesModule(QModule):
    """A module whose `weight`, int8 codes, is multiplied by: the backend's operand is made once and kept."""

    weight: torch.Tensor
    _operand: tuple[torch.Tensor, int, kernels.Backend, Any] | None = None

    @abstractmethod
    def _prepare(self, codes: torch.Tensor) -> Any:
        """What the product needs, from the stored codes."""

    def _prepared(self) -> Any:
        """The operand of the weights that are present now."""
        codes = self.weight
        if codes.is_inference() or fleeting():  # tensors of inference mode do not count their changes
            return self._prepare(codes)
        known, ops = self._operand, kernels.backend(codes.device)
        if known is None or known[0] is not codes or known[1] != codes._version or known[2] is not ops:
            known = self._operand = codes, codes._version, ops, self._prepare(codes)
        return known[3]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "CodesModule":
        self._operand = None  # or the codes that leave, for the meta device say, would stay in memory
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: they prepare their own operand."""
        return {**self.__dict__, "_operand": None}
