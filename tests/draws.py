"""Seeded random operands of integer operations."""

import torch

from qtool.numerics import Dyadic


class Draw:
    """Seeded random tensors."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.int64).to(dtype)

    def codes(self, *shape: int) -> torch.Tensor:
        drawn = self.integers(-127, 127, *shape, dtype=torch.int8)
        drawn[..., ::5] = 127  # extremes, where sums are largest
        return drawn

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def ratios(self, low: float, high: float, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
        exponent = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        sign = self.integers(0, 1, *shape) * 2 - 1
        dyadic = Dyadic.from_float(2.0**exponent * sign)
        return dyadic.multiplier, dyadic.shift
