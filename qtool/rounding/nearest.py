"""Round to nearest."""

from typing import Literal

import torch

from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.qtensor import SCALE_RULES


def nearest(
    weight: torch.Tensor, spec: QuantSpec, *, layout: Literal["rows", "tiled"] = "tiled", scale_rule: str = "absmax"
) -> QTensor:
    """Codes of a float `[rows, columns]` matrix, half up, on the grid that `scale_rule` of SCALE_RULES gives a block.

    Raises InputError when the matrix is not finite or `spec`'s block does not fit.
    """
    return QTensor.quantize(weight, spec, layout=layout, params=SCALE_RULES[scale_rule](weight, spec))
