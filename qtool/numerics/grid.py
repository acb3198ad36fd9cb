"""`Grid`: what the integers of a tensor mean while a model is lowered."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Grid:
    """Integers `q` of `bits` (sign included) stand for `unit · q + center`.

    `unit` and `center` are one float64 number or one a channel; `unsigned` says that q ≥ 0. Grids exist while
    quantizing; what is stored is the ratio of two of them.
    """

    unit: float | torch.Tensor
    bits: int
    center: float | torch.Tensor = 0.0
    unsigned: bool = False

    @property
    def limit(self) -> int:
        """The largest magnitude, `2^(bits-1) - 1`."""
        return (1 << (self.bits - 1)) - 1

    def real(self, q: torch.Tensor) -> torch.Tensor:
        """The numbers that integers stand for, float64, where the integers are."""
        unit, center = (x.to(q.device) if isinstance(x, torch.Tensor) else x for x in (self.unit, self.center))
        return q.double() * unit + center

    @classmethod
    def covering(cls, low: float, high: float, bits: int, *, centered: bool = False) -> "Grid":
        """The finest grid of `bits` from `low` to `high`: around their middle, or around zero."""
        limit = (1 << (bits - 1)) - 1
        center = (low + high) / 2 if centered else 0.0
        reach = max(high - center, center - low)
        return cls(reach / limit if reach > 0 else 1.0, bits, center)
