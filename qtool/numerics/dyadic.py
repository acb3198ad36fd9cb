"""`Dyadic`: rescaling integers by a real number without floats (I-BERT, Kim et al. 2021, dyadic requantization).

A ratio of scales r is written offline as m / 2^s with 31 significant bits (relative error at most 2^-31); at run time a
rescale is one int64 product and one arithmetic shift. Rounding is half up, the same rule as `QTensor`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import InputError

_MIN, _END = 1 << 30, 1 << 31
_MAX_SHIFT = 62


@dataclass(frozen=True, eq=False)
class Dyadic:
    """The numbers `multiplier / 2^shift`, two int32 tensors of one shape.

    `multiplier` is 0 or `2^30 <= |multiplier| < 2^31`, and `1 <= shift <= 62`; InputError otherwise.
    """

    multiplier: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        if self.multiplier.shape != self.shift.shape or {self.multiplier.dtype, self.shift.dtype} != {torch.int32}:
            raise InputError("a dyadic number needs multiplier and shift as int32 tensors of one shape")
        if self.multiplier.is_meta:
            return
        magnitude = self.multiplier.long().abs()  # in int32, abs(-2^31) would be -2^31
        normal = (magnitude == 0) | ((magnitude >= _MIN) & (magnitude < _END))
        if not (normal & (self.shift >= 1) & (self.shift <= _MAX_SHIFT)).all():
            raise InputError("a dyadic number needs a multiplier of 0 or 2^30 <= |m| < 2^31, and a shift from 1 to 62")

    @classmethod
    def from_float(cls, r: Tensor | float) -> "Dyadic":
        """The nearest dyadic numbers to `r` of any shape, zero where |r| is so small that every int32 is rescaled to 0.

        Raises InputError when a value is not finite or its magnitude is 2^30 or more: then a scale is wrong.
        """
        ratio = torch.as_tensor(r, dtype=torch.float64)
        fraction, exponent = torch.frexp(ratio.abs())
        mantissa = (fraction * _END + 0.5).floor()
        carry = mantissa == _END  # e.g. 1 - 1e-12: one past int32
        mantissa = torch.where(carry, mantissa / 2, mantissa)
        shift = 31 - exponent - carry.int()
        if not (ratio.isfinite() & (shift >= 1)).all():
            raise InputError("cannot rescale by a ratio that is not finite or not below 2^30; a scale is wrong")
        zero = (mantissa == 0) | (shift > _MAX_SHIFT)
        multiplier = (mantissa * ratio.sign()).masked_fill(zero, 0)
        return cls(multiplier.int(), shift.masked_fill(zero, 1).int())

    def requantize(self, acc: Tensor, qmin: int | None = None, qmax: int | None = None) -> Tensor:
        """`acc * m / 2^s` rounded half up, exactly, for integers `|acc| < 2^31` of a shape that broadcasts.

        Returns int64; int32 when both `qmin` and `qmax` clip the result. Raises TypeError for a float `acc` and
        OverflowError when an int64 `acc` breaks its bound: both are mistakes of the caller, not of the input.
        """
        _check_accumulator(acc)
        scaled = rescale(acc, self.multiplier, self.shift)
        if qmin is not None or qmax is not None:
            scaled = scaled.clamp(qmin, qmax)
        return scaled if qmin is None or qmax is None else scaled.int()

    def to_float(self) -> Tensor:
        """The represented numbers in float64, exact."""
        return self.multiplier.double() / torch.bitwise_left_shift(1, self.shift.long()).double()


def rescale(acc: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """`acc * multiplier / 2^shift` rounded half up, int64, without a check of the ranges that `Dyadic` guards."""
    shift = shift.long()
    # |acc * m| < 2^62 and the rounding term is at most 2^61, so int64 holds the sum
    scaled = acc.long() * multiplier
    return scaled.add_(torch.bitwise_left_shift(1, shift - 1)).bitwise_right_shift_(shift)


def _check_accumulator(acc: Tensor) -> None:
    if acc.dtype.is_floating_point or acc.dtype.is_complex:
        raise TypeError(f"requantize needs an integer accumulator, not {acc.dtype}")
    if acc.dtype != torch.int64 or acc.is_meta or acc.numel() == 0:
        return
    low, high = acc.aminmax()
    if low <= -_END or high >= _END:
        raise OverflowError(f"accumulator spans {int(low)}..{int(high)}; requantize is exact for |acc| < 2^31 only")
