"""Clip the largest weights so that all others are rounded on a finer grid."""

from typing import Literal

import torch

from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.qtensor import QParams

_CANDIDATES = 80  # scales that are tried, from max|block| / qmax down to a fifth of it
_CHUNK = 1 << 20  # weights at a time


def mse(weight: torch.Tensor, spec: QuantSpec, *, layout: Literal["rows", "tiled"] = "tiled") -> QTensor:
    """Nearest codes of a float `[rows, columns]` matrix on the scales that leave each block the least squared error.

    The grid search is that of OMSE (Choukroun et al. 2019), whose first candidate is the scale of `nearest`: no block
    is worse than there. Raises InputError as `nearest` does.
    """
    widest = QParams.absmax(weight, spec)
    row_blocks, column_blocks = widest.scale.shape
    rows, columns = weight.shape[0] // row_blocks, weight.shape[1] // column_blocks
    blocks = weight.detach().view(row_blocks, rows, column_blocks, columns)
    at_once = max(1, _CHUNK // (rows * weight.shape[1]))
    parts = zip(blocks.split(at_once), widest.scale.split(at_once), strict=True)
    scale = torch.cat([_least_squares(part.double(), start, spec) for part, start in parts])
    return QTensor.quantize(weight, spec, layout=layout, params=QParams(scale))


def _least_squares(blocks: torch.Tensor, start: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """The best scale of each block of `[row blocks, rows, column blocks, columns]`, float32, from `start` downwards."""
    best, least = start, torch.full(start.shape, torch.inf, dtype=torch.float64)
    for share in torch.linspace(1.0, 0.2, _CANDIDATES, dtype=torch.float64):
        scale = (start.double() * share).float().clamp_min(torch.finfo(torch.float32).tiny)
        step = scale.double()[:, None, :, None]
        rounded = (blocks / step).add_(0.5).floor_().clamp_(spec.qmin, spec.qmax).mul_(step)
        error = rounded.sub_(blocks).square_().sum((1, 3))
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
