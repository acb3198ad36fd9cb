"""Rounding column after column: the grid of each column, the order in which they come, and the codes so far."""

from typing import Literal

import torch

from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.qtensor import column_width
from qtool.rounding.mse import mse

BLOCK = 128
"""Columns whose corrections are made one by one; what follows a block is corrected by one product."""


class Columns:
    """The columns of a `[rows, columns]` matrix that is being rounded, by falling `energy` `[columns]` of their inputs.

    Scales are those with the least squared error of the matrix, so they do not depend on the order.
    """

    def __init__(self, weight: torch.Tensor, spec: QuantSpec, energy: torch.Tensor) -> None:
        self.spec, self.shape = spec, (weight.shape[0], weight.shape[1])
        self.params = mse(weight.float(), spec, layout="rows").params
        self.order = torch.argsort(energy, descending=True, stable=True)
        self._places = self.order.tolist()
        repeats = self.shape[0] // self.params.scale.shape[0]
        offset = self.params.offsets()
        self._scale = self.params.scale.double().repeat_interleave(repeats, 0)
        self._offset = (
            torch.zeros_like(self._scale) if offset is None else offset.double().repeat_interleave(repeats, 0)
        )
        self._width = column_width(spec, self.shape[1])
        self._codes = torch.zeros(self.shape, dtype=torch.int8, device=weight.device)

    def round(self, position: int, values: torch.Tensor) -> torch.Tensor:
        """Keep the nearest codes of `values` `[rows]`, the column at `position` of the order; returns their values."""
        column = self._places[position]
        scale, offset = (field[:, column // self._width] for field in (self._scale, self._offset))
        codes = ((values - offset) / scale).add_(0.5).floor_().clamp_(self.spec.qmin, self.spec.qmax)
        self._codes[:, column] = codes.to(torch.int8)
        return codes.mul_(scale).add_(offset)

    def finished(self, layout: Literal["rows", "tiled"]) -> QTensor:
        """The matrix on the host, when all columns are rounded."""
        return QTensor.store(self._codes.cpu(), self.params.cpu(), self.spec, layout)
