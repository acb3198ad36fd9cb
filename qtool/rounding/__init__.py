"""Ways to round a weight matrix to integer codes: functions `(weight, spec, …) → QTensor` that know no model."""

from collections.abc import Callable

from qtool.numerics import QTensor
from qtool.rounding.gpfq import gpfq
from qtool.rounding.gptq import gptq
from qtool.rounding.moments import Moments
from qtool.rounding.mse import mse
from qtool.rounding.nearest import nearest

ROUNDINGS: dict[str, Callable[..., QTensor]] = {"nearest": nearest, "mse": mse}
"""Those that look at the matrix alone."""

DATA_ROUNDINGS: dict[str, Callable[..., QTensor]] = {"gptq": gptq, "gpfq": gpfq}
"""Those that also need the `Moments` of what the matrix reads."""

__all__ = ["DATA_ROUNDINGS", "ROUNDINGS", "Moments", "gpfq", "gptq", "mse", "nearest"]
