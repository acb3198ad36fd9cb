"""Ways to round a weight matrix to integer codes: functions `(weight, spec, …) → QTensor` that know no model."""

from collections.abc import Callable

from qtool.numerics import QTensor
from qtool.rounding.mse import mse
from qtool.rounding.nearest import nearest

ROUNDINGS: dict[str, Callable[..., QTensor]] = {"nearest": nearest, "mse": mse}

__all__ = ["ROUNDINGS", "mse", "nearest"]
