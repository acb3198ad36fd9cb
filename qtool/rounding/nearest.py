"""Round to nearest."""

from typing import Literal

import torch

from qtool.numerics import QTensor, QuantSpec


def nearest(weight: torch.Tensor, spec: QuantSpec, *, layout: Literal["rows", "tiled"] = "tiled") -> QTensor:
    """Codes of a float `[rows, columns]` matrix, half up, on the grid max|block| / qmax.

    Raises InputError when the matrix is not finite or `spec`'s block does not divide it.
    """
    return QTensor.quantize(weight, spec, layout=layout)
