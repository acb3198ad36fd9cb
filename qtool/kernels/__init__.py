"""The table of operations that quantized modules call, and the backend that carries them out.

An operation has one meaning, given by `reference.py`; any other backend is right when it returns the reference's
integers bit for bit. The device of its tensors decides: on a GPU the Triton kernels, on the CPU the
native ones where their library is here, else the reference. `QTOOL_BACKEND` chooses one by name.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from qtool.errors import UnavailableError, one_of
from qtool.kernels import native, triton


class Backend(Protocol):
    """What every backend offers. Activations are `[tokens, in_features]`; weights are int8 codes in a stored layout."""

    name: str

    # Integer arithmetic; each means what the function of its name in `reference` does.
    def saturate(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...
    def rescale(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...
    def quantize_rows(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]: ...
    def integer_linear(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...
    def integer_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...
    def integer_attention(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...
    def integer_gelu(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...
    def integer_tanh(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...

    def prepare(self, codes: torch.Tensor, shape: tuple[int, int], width: int | None = None) -> Any:
        """The operand that `int8_linear` wants, from stored codes (tiled, or one row a slice) of logical `shape`.

        uint8 codes are tiles of nibbles. `width` is how many inputs of a row share a scale: None for all; the last
        ones may be fewer.
        """

    def row_sums(self, operand: Any) -> torch.Tensor:
        """int32 `[out]`: the sum of each row of the codes that `prepare` was given."""

    def int8_linear(
        self,
        x: torch.Tensor,
        operand: Any,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        act_scale: torch.Tensor | None,
        weight_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x @ W^T + bias` by an int8 × int8 → int32 product: float32 in, float32 out.

        `weight_scale` is `[row blocks, column blocks]`, and so is `weight_offset`, what code 0 of asymmetric weights
        stands for. `act_scale` is one static scale, or None for a scale per token.
        """

    def prepare_codes(self, codes: torch.Tensor, shape: tuple[int, int], width: int) -> Any:
        """The operand that `code_linear` wants, from tiled codes; `width` inputs of a row share a scale."""

    def code_linear(
        self,
        x: torch.Tensor,
        operand: Any,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        weight_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x @ (codes · scale + offset)^T + bias` with float activations; the codes are never all unpacked.

        Backends agree up to the rounding of float32 sums. Scales and offsets are `[row blocks, column blocks]`.
        """

    def int8_attention(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the function of this name in `attention` does."""

    def wide_attention(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the method of this name of `reference.Reference` does."""

    def coded_attention(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What the function of this name in `coding` does."""

    def row_table_linear(
        self, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`x @ (codes * scale)^T + bias` with float activations, for a head that shares an embedding table's codes."""


BACKENDS: tuple[str, ...] = ("triton", "native", "reference")
"""On a GPU the first, on the CPU the second where its library is; the reference computes everywhere."""

_CPU = torch.device("cpu")

_CHOSEN: ContextVar[Backend | None] = ContextVar("backend", default=None)


def backend(device: torch.device = _CPU) -> Backend:
    """The backend for tensors on `device`, the same as long as the process lives, or that of `using`.

    Raises UnavailableError for one that does not exist here or does not compute on this device.
    """
    return _CHOSEN.get() or _default(device.type)


@contextmanager
def using(name: str) -> Iterator[None]:
    """While active, `backend()` is the one called `name`. Raises UnavailableError for one that does not exist here."""
    token = _CHOSEN.set(_make(name))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


@functools.cache
def _default(device: str) -> Backend:
    wanted = os.environ.get("QTOOL_BACKEND")
    if wanted and wanted not in BACKENDS:
        raise UnavailableError(f"QTOOL_BACKEND={wanted}: {one_of(wanted, BACKENDS, 'backend')}")
    if wanted == "native" and device == "cuda":
        raise UnavailableError("QTOOL_BACKEND=native computes on the CPU; leave it out, or leave out --device cuda")
    if wanted == "triton" and device != "cuda" and not triton.interpreted():
        raise UnavailableError(
            "QTOOL_BACKEND=triton computes on a GPU: add --device cuda, or TRITON_INTERPRET=1 to interpret its kernels"
        )
    here = "triton" if device == "cuda" else "native" if native.available() else "reference"
    return _make(wanted or here)


@functools.cache
def _make(name: str) -> Backend:
    from qtool.kernels import reference

    if name == "reference":
        return reference.Reference()
    if name == "triton":
        if problem := triton.reason():
            raise UnavailableError(f"the triton backend is not available: {problem}")
        from qtool.kernels.triton.backend import Triton

        return Triton()
    if not native.available():
        raise UnavailableError(f"the native backend is not available: {native.reason()}")
    native.isa()  # refused now, not in the middle of a run
    from qtool.kernels.integer import Native

    return Native()
