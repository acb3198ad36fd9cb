"""LayerNorm on integers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.nn.integer.module import Bound, IntModule
from qtool.numerics.grid import Grid


class IntNorm(IntModule):
    """i-LayerNorm (math.md, 7): int32 `[..., size]` → int32 `[..., size]` of `out_bits`.

    Buffers, int32: `weight` and `shift`, γ as dyadic numbers; `bias`, β on the target grid; `eps`, int64 `[1]`, n·ε in
    units of the squared input.
    """

    weight: torch.Tensor
    shift: torch.Tensor
    bias: torch.Tensor
    eps: torch.Tensor

    def __init__(self, size: int, in_bits: int, out_bits: int, *, device: str) -> None:
        super().__init__()
        self.size, self.in_bits, self.out_bits = size, in_bits, out_bits
        for name in ("weight", "shift", "bias"):
            self.register_buffer(name, torch.empty(size, dtype=torch.int32, device=device))
        self.register_buffer("eps", torch.empty(1, dtype=torch.int64, device=device))

    def lower(self, gamma: torch.Tensor, beta: torch.Tensor, eps: float, source: Grid, target: Grid) -> None:
        """Fill the buffers from float `[size]` parameters; units of source and target are one number each."""
        from qtool.kernels.reference import NORM_BITS
        from qtool.numerics.dyadic import Dyadic

        ratio = gamma.double() * self.size**0.5 / 2.0**NORM_BITS / float(target.unit)
        dyadic = Dyadic.from_float(ratio)
        self.weight, self.shift = dyadic.multiplier, dyadic.shift
        self.bias = torch.floor(beta.double() / float(target.unit) + 0.5).clamp(-target.limit, target.limit).int()
        self.eps = torch.tensor([round(self.size * eps / float(source.unit) ** 2)], dtype=torch.int64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """int32 on any grid whose unit is the source's: LayerNorm takes the mean away, whatever it is."""
        to_output = self.weight, self.shift
        return kernels.backend(x.device).integer_norm(x, self.eps, to_output, self.bias, self.out_bits)

    def bounds(self) -> list[Bound]:
        """The variance, and what γ and β add up to."""
        widest = (1 << self.in_bits) * self.size
        variance = self.size << (2 * self.in_bits)
        return [
            Bound("sum", widest, (1 << 62) - 1),
            Bound("variance", variance + int(self.eps), (1 << 62) - 1),
        ]

    def description(self) -> dict[str, Any]:
        """Size and widths."""
        return {"type": "int_norm", "size": self.size, "in_bits": self.in_bits, "out_bits": self.out_bits}

    @classmethod
    def from_description(cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str) -> "IntNorm":
        """See `QModule`."""
        return cls(description["size"], description["in_bits"], description["out_bits"], device=device)
