"""GPFQ (Lybrand and Saab 2021; Zhang, Zhou and Saab 2023): greedy path-following quantization."""

from typing import Literal

import torch

from qtool.numerics import QTensor, QuantSpec
from qtool.rounding.columns import BLOCK, Columns
from qtool.rounding.moments import Moments


def gpfq(
    weight: torch.Tensor, spec: QuantSpec, moments: Moments, *, layout: Literal["rows", "tiled"] = "tiled"
) -> QTensor:
    """Codes of a float `[rows, columns]` matrix whose outputs follow the float outputs column by column.

    Each column takes the code that brings `Σ q_s Y_s` closest to `Σ w_s X_s` over the columns so far, which only needs
    `moments`: the recursion over the data gives the same integers. The alphabet fits the bits of `spec`, unlike that of
    the published code, and scales are those of its blocks. A column that no input reaches is rounded to nearest. Raises
    InputError as `nearest` does.
    """
    exact = weight.detach().to(moments.own.device).double()
    columns = Columns(exact, spec, moments.own.diagonal())
    order = columns.order
    values = exact[:, order]
    own, cross = moments.own[order][:, order], moments.cross.t()[order][:, order]
    rounded = torch.zeros_like(values)
    carried = torch.zeros_like(values)  # Σ w_s <X_s, Y_t> - Σ q_s <Y_s, Y_t> over the blocks before
    energy = own.diagonal()
    for start in range(0, values.shape[1], BLOCK):
        stop = min(start + BLOCK, values.shape[1])
        for t in range(start, stop):
            sums = (
                carried[:, t]
                + values[:, start : t + 1] @ cross[start : t + 1, t]
                - rounded[:, start:t] @ own[start:t, t]
            )
            rounded[:, t] = columns.round(t, sums / energy[t] if energy[t] > 0 else values[:, t])
        now = slice(start, stop)
        carried[:, stop:] += values[:, now] @ cross[now, stop:] - rounded[:, now] @ own[now, stop:]
    return columns.finished(layout)
