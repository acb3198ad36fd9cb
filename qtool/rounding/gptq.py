"""GPTQ (Frantar et al. 2023): round a column, then move what is left of it into the columns still to come."""

from typing import Literal

import torch

from qtool.numerics import QTensor, QuantSpec
from qtool.rounding.columns import BLOCK, Columns
from qtool.rounding.moments import Moments

_DAMPING = 0.01  # of the mean energy of an input, added to each


def gptq(
    weight: torch.Tensor, spec: QuantSpec, moments: Moments, *, layout: Literal["rows", "tiled"] = "tiled"
) -> QTensor:
    """Codes of a float `[rows, columns]` matrix that keep its outputs on the data behind `moments`.

    What is rounded is the matrix W* that comes closest to the float outputs on the inputs that the lowered model has:
    `(YᵀY + λ) W*ᵀ = (YᵀX + λ) Wᵀ`, with Y = X the weight itself. A column that no input reaches is rounded to nearest.
    Computes where the moments are, and returns the matrix on the host. Raises InputError as `nearest` does.
    """
    damped = _damped(moments.own)
    target = _corrected(weight.detach().to(moments.own.device).double(), moments, damped)
    columns = Columns(target, spec, moments.own.diagonal())
    upper = _upper(damped[columns.order][:, columns.order])
    values = target[:, columns.order]
    for start in range(0, values.shape[1], BLOCK):
        stop = min(start + BLOCK, values.shape[1])
        errors = torch.empty(len(values), stop - start, dtype=torch.float64, device=values.device)
        for column in range(start, stop):
            left = values[:, column] - columns.round(column, values[:, column])
            error = errors[:, column - start] = left / upper[column, column]
            values[:, column + 1 : stop] -= error[:, None] * upper[column, column + 1 : stop]
        values[:, stop:] -= errors @ upper[start:stop, stop:]
    return columns.finished(layout)


def _damped(own: torch.Tensor) -> torch.Tensor:
    """`own` with a larger diagonal, so that it can be inverted."""
    mean = own.diagonal().mean()
    one = torch.eye(len(own), dtype=own.dtype, device=own.device)
    return own + one * (_DAMPING * mean if mean > 0 else 1.0)


def _corrected(weight: torch.Tensor, moments: Moments, damped: torch.Tensor) -> torch.Tensor:
    """W* `[rows, columns]`."""
    wanted = (moments.cross + (damped - moments.own)) @ weight.t()
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(damped)).t().contiguous()


def _upper(damped: torch.Tensor) -> torch.Tensor:
    """U with `UᵀU` the inverse of `damped`: its rows are what the elimination of each column leaves to the others."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper
