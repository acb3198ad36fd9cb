"""What is kept of attention probabilities: how often each magnitude occurs in every head, and what mass lies there.

Bins are narrow in the logarithm and found without one: an octave is cut into 16 equal parts by the leading bits of a
float32, so that which bin a probability is in is exact, and the same everywhere. Memory does not grow with the data.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

OCTAVES = 24
"""Bins reach from 2^-24 to 1; what is smaller has a bin of its own, the first."""
PARTS = 16
"""Bins of an octave."""
BINS = 1 + OCTAVES * PARTS
_MANTISSA = 23  # bits of a float32 below its exponent


def edges(parts: int = PARTS) -> torch.Tensor:
    """The ends of all bins, float64 `[OCTAVES · parts + 2]`: 0, 2^-24, 2^-24 · 17/16, …, 1. Bin i is closed below.

    `parts` of an octave is a power of 2.
    """
    octaves = torch.arange(-OCTAVES, 0, dtype=torch.float64).exp2()
    steps = 1 + torch.arange(parts, dtype=torch.float64) / parts
    return torch.cat([torch.zeros(1), (octaves[:, None] * steps).flatten(), torch.ones(1)]).double()


def bins(probabilities: torch.Tensor, parts: int = PARTS) -> torch.Tensor:
    """int64 places 0 … OCTAVES · parts of float probabilities of any shape; 1 and what is beyond in the last.

    By exponent and leading bits, which are exact where a logarithm would not be; float rounding goes beyond 1.
    """
    kept = parts.bit_length() - 1  # leading bits of the mantissa that decide the bin
    first = (127 - OCTAVES) << kept  # 2^-24
    leading = probabilities.float().contiguous().view(torch.int32).bitwise_right_shift(_MANTISSA - kept)
    return leading.sub_(first - 1).clamp_(0, OCTAVES * parts).long()


@dataclass(frozen=True)
class Distribution:
    """How the probabilities of `rows` queries, or their shares of the largest in their row, are distributed by head.

    All are `[heads, BINS]`: `counts` int64 says how many pairs of a query and a key that it may see are in a bin,
    `mass` float64 the sum of their probabilities. Errors count by `weights` float64: the same for each probability, the
    square of the row's largest for a share of it; `sums` float64 is that of what is in the bin, weighted.
    """

    counts: torch.Tensor
    mass: torch.Tensor
    weights: torch.Tensor
    sums: torch.Tensor
    rows: int

    @classmethod
    def of(cls, rows: torch.Tensor, *, relative: bool = False) -> "Distribution":
        """Of float probabilities `[queries, heads, keys]`, negative where a query may not look. They must be finite.

        With `relative`, of their shares of the largest in their row. Tables are on the host, which adds up in one
        order: a GPU takes any, and its sums would differ from run to run.
        """
        rows = rows.cpu()
        heads = rows.shape[1]
        seen = rows >= 0
        found = rows[seen].double()
        largest = rows.amax(-1, keepdim=True).expand_as(rows)[seen].double() if relative else torch.ones_like(found)
        shares = torch.where(largest > 0, found / largest, 0.0)
        head = torch.arange(heads)[:, None].expand_as(rows)[seen]
        flat = bins(shares).add_(BINS * head)

        def table(values: torch.Tensor | None) -> torch.Tensor:
            return torch.bincount(flat, weights=values, minlength=heads * BINS).view(heads, BINS)

        weights = largest.square()
        return cls(table(None), table(found), table(weights), table(weights * shares), len(rows))

    def __add__(self, other: "Distribution") -> "Distribution":
        """Of both together."""
        mine, theirs = vars(self).values(), vars(other).values()
        return Distribution(*(a + b for a, b in zip(mine, theirs, strict=True)))

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> "Distribution":
        """What an observer of attention has seen."""
        return cls(state["counts"], state["mass"], state["weights"], state["sums"], int(state["tokens"]))

    @property
    def mean_length(self) -> float:
        """Keys that a query may see, on average."""
        return float(self.counts.sum()) / (self.rows * len(self.counts))

    def sparsity(self, threshold: float | torch.Tensor) -> torch.Tensor:
        """The share of pairs that are below `threshold` (a number or `[heads]`): float64 `[heads]`.

        Inside a bin probabilities are taken to be spread evenly.
        """
        return _below(self.counts.double(), threshold)

    def lost_mass(self, threshold: float | torch.Tensor) -> torch.Tensor:
        """The share of a row's mass that lies below `threshold`, on average: float64 `[heads]`."""
        return _below(self.mass, threshold)

    def threshold(self, share: float, *, of: str = "counts") -> torch.Tensor:
        """The threshold of each head below which `share` of its pairs lie, or with `of="mass"` of its mass.

        float64 `[heads]`, the inverse of `sparsity` and `lost_mass`.
        """
        weights = (self.counts if of == "counts" else self.mass).double()
        sums = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
        place = (sums < share).sum(-1).clamp_(max=BINS - 1)
        low = sums.gather(-1, (place - 1).clamp_min(0)[:, None])[:, 0] * (place > 0)
        inside = (share - low) / (sums.gather(-1, place[:, None])[:, 0] - low)
        ends = edges()
        return ends[place] + inside.clamp(0, 1) * (ends[place + 1] - ends[place])


def _below(weights: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """The share of `weights` `[heads, BINS]` below a threshold."""
    ends = edges()
    limit = torch.as_tensor(threshold, dtype=torch.float64).expand(len(weights))
    covered = ((limit[:, None] - ends[:-1]) / ends.diff()).clamp(0, 1)
    return (weights * covered).sum(-1) / weights.sum(-1)
