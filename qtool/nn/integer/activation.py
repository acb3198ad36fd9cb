"""Element-wise functions on integers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.nn.integer.module import Bound, IntModule
from qtool.numerics.grid import Grid

TANH_BITS = 16
_GELU_ROOT, _GELU_A = 1.769, 0.2888  # I-BERT, eq. 8
_PRODUCT_BITS = 30
_LOWEST_GELU = -0.19  # the polynomial's minimum, with room for its rounding


class IntTable(IntModule):
    """Any function as a table of 2^`in_bits` int16 entries, one for each input: exact to the grids' rounding.

    Buffer: `table`, int16 `[2^in_bits]`. int32 `[...]` of `in_bits` → int32 `[...]` of 16 bits.
    """

    table: torch.Tensor

    def __init__(self, in_bits: int, *, device: str) -> None:
        super().__init__()
        self.in_bits = in_bits
        self.register_buffer("table", torch.empty(1 << in_bits, dtype=torch.int16, device=device))

    def lower(self, function: Callable[[torch.Tensor], torch.Tensor], source: Grid, *, shifted: bool) -> Grid:
        """Fill the table; returns the grid of its values, which with `shifted` starts at the function's minimum."""
        half = 1 << (self.in_bits - 1)
        values = function(source.real(torch.arange(-half, half)))
        low, high = values.min().item(), values.max().item()
        if shifted:
            limit = (1 << 15) - 1
            target = Grid((high - low) / limit if high > low else 1.0, 16, low, unsigned=True)
        else:
            target = Grid.covering(low, high, 16)
        codes = torch.floor((values - target.center) / float(target.unit) + 0.5)
        self.table = codes.clamp(-target.limit, target.limit).to(torch.int16)
        return target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Look every element up."""
        return self.table[x.long() + (1 << (self.in_bits - 1))].int()

    def description(self) -> dict[str, Any]:
        """The width of the index."""
        return {"type": "int_table", "in_bits": self.in_bits}

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "IntTable":
        """See `QModule`."""
        return cls(description["in_bits"], device=device)


class IntGelu(IntModule):
    """i-GELU, the paper's polynomial (math.md, 5): int32 `[...]` of `in_bits` → int32 `[...]` of 16 bits.

    Buffers: `constants`, int64 `[4]`: the polynomial's root, its one, the places by which `erf + 1` is shifted before
    the product, and the offset of the target; `multiplier` and `shift`, int32 `[1]`.
    """

    constants: torch.Tensor
    multiplier: torch.Tensor
    shift: torch.Tensor

    def __init__(self, in_bits: int, *, shifted: bool, device: str) -> None:
        super().__init__()
        self.in_bits, self.shifted = in_bits, shifted
        self.register_buffer("constants", torch.empty(4, dtype=torch.int64, device=device))
        self.rescale_buffers("", (1,), device)

    def lower(self, source: Grid) -> Grid:
        """Fill the constants for a grid around zero; returns the grid of the values."""
        unit = float(source.unit)
        root = unit / 2**0.5
        one = int(1 / (_GELU_A * root * root) + 0.5)
        low, high = (_LOWEST_GELU, unit * source.limit) if self.shifted else (0.0, unit * source.limit)
        target = Grid((high - low) / ((1 << 15) - 1), 16, low if self.shifted else 0.0, unsigned=self.shifted)
        places = max(0, (2 * one * source.limit).bit_length() - _PRODUCT_BITS)
        offset = round(-low / float(target.unit)) if self.shifted else 0
        self.constants = torch.tensor([int(_GELU_ROOT / root), one, places, offset])
        product = torch.tensor(unit * _GELU_A * root * root * 2.0**places / 2, dtype=torch.float64)
        self.fill_rescale("", product / float(target.unit))
        return target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Polynomial, rescale, offset."""
        ops, (root, one, places, offset) = kernels.backend(x.device), self.constants
        y = ops.rescale(ops.integer_gelu(x, root, one, places), self.multiplier, self.shift) + offset
        return ops.saturate(y.clamp_min(0) if self.shifted else y, 16)

    def bounds(self) -> list[Bound]:
        """The product of the input and `erf + 1`, which a 31-bit multiplier follows."""
        product = ((1 << (self.in_bits - 1)) - 1) * ((2 * int(self.constants[1]) >> int(self.constants[2])) + 1)
        return [Bound("polynomial", product, (1 << 31) - 1)]

    def description(self) -> dict[str, Any]:
        """Width and whether values are shifted to start at zero."""
        return {"type": "int_gelu", "in_bits": self.in_bits, "shifted": self.shifted}

    @classmethod
    def from_description(cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str) -> "IntGelu":
        """See `QModule`."""
        return cls(description["in_bits"], shifted=description["shifted"], device=device)


class IntRelu(IntModule):
    """max(x, 0): int32 → int32 on the same grid, which has its zero at 0."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Element by element."""
        return x.clamp_min(0)

    def description(self) -> dict[str, Any]:
        """Nothing but its name."""
        return {"type": "int_relu"}

    @classmethod
    def from_description(cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str) -> "IntRelu":
        """See `QModule`."""
        return cls()


class IntTanh(IntModule):
    """i-tanh (math.md, 8): int32 in units of ln2/2^grid → int32 in units of 2^-15."""

    def __init__(self, grid: int) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Element by element."""
        return kernels.backend(x.device).integer_tanh(x, self.grid)

    def description(self) -> dict[str, Any]:
        """The grid of its input."""
        return {"type": "int_tanh", "grid": self.grid}

    @classmethod
    def from_description(cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str) -> "IntTanh":
        """See `QModule`."""
        return cls(description["grid"])
