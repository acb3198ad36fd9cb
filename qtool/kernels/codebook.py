"""Codes of attention weights by integer comparison: what integer kernels read of a codebook (docs/math.md, 9.1).

A softmax whose exponentials are whole numbers needs no quotient to find a code: a weight reaches an edge when it is at
least that share of the row's sum, or of the weight that the row's largest score has.
"""

from dataclasses import dataclass

import torch

EDGE_BITS = 24
"""Edges are in units of 2^-24."""
LEVEL_MAX = (1 << 14) - 1
"""Levels have up to two digits of 7 bits; those of a head whose largest is at most 127 are one."""


@dataclass(frozen=True)
class WholeCodebook:
    """A codebook of each head in integers. `edges` int32 `[heads, codes - 1]`, in units of 2^-24, do not fall.

    `levels` int32 `[heads, codes]`, 0 … `LEVEL_MAX`, are in a unit of each head, level 0 is 0; None: what has a code
    above 0 is kept as it is. `relative` and `renormalize` are as in `coding.coded_attention`. `largest` is that of the
    levels, where it is known: to look waits for a GPU.
    """

    edges: torch.Tensor
    levels: torch.Tensor | None
    relative: bool
    renormalize: bool
    largest: int | None = None

    def repeated(self, batch: int) -> "WholeCodebook":
        """Of all heads of `batch` texts, one after the other."""
        edges, levels = (
            None if part is None else part.expand(batch, -1, -1).flatten(0, 1) for part in (self.edges, self.levels)
        )
        assert edges is not None
        return WholeCodebook(edges, levels, self.relative, self.renormalize, self.largest)

    def __getitem__(self, heads: slice) -> "WholeCodebook":
        """Of some heads."""
        levels = None if self.levels is None else self.levels[heads]
        return WholeCodebook(self.edges[heads], levels, self.relative, self.renormalize, self.largest)

    def codes(self, weights: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """int64 codes of weights `[heads, queries, keys]` ≥ 0: how many edges, times `whole`, each reaches.

        `whole` int64 `[heads, queries, 1]`, below 2^39 - 1, is what edges are shares of. A weight of 0 has code 0.
        """
        limits = (self.edges[:, None].long() * whole + ((1 << EDGE_BITS) - 1)) >> EDGE_BITS
        return torch.searchsorted(limits.clamp_(min=1), weights.long().contiguous(), right=True)

    def standing(self, codes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What is multiplied by values in the place of the weights, int32: levels, or the weights that are kept."""
        if self.levels is None:
            return weights.masked_fill(codes == 0, 0)
        return self.levels[:, None].expand(-1, codes.shape[1], -1).gather(-1, codes)


def whole_edges(edges: torch.Tensor) -> torch.Tensor:
    """Edges of a codebook, float64, as `WholeCodebook` has them: rounded up, so that what is below stays below."""
    return (edges * (1 << EDGE_BITS)).ceil().clamp(0, 1 << EDGE_BITS).int()


def whole_levels(levels: torch.Tensor, most: int = LEVEL_MAX) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels of a codebook, float64 `[heads, codes]`, as integers, and what one of a head is worth, float64 `[heads]`.

    A head whose largest level is at most 127 times its smallest above 0 gets levels up to 127, scaled so that the worst
    rounding, relative to its level, is least, and none becomes 0. Others get levels up to `most`, at least 127; what is
    below half a unit is 0 there: many keys have such levels, which together would outweigh a row if they were 1.
    """
    found, units = zip(*(_whole(row, most) for row in levels), strict=True)
    return torch.stack(found).int(), torch.stack(units)


def _whole(levels: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    above = levels[levels > 0]
    if not len(above):
        return torch.zeros_like(levels), torch.ones((), dtype=torch.float64)
    largest = above.max()
    if largest > _DIGIT * above.min():
        unit = largest / most
        return (levels / unit).round(), unit
    units = largest / torch.arange(1, _DIGIT + 1, dtype=torch.float64)
    rounded = (above / units[:, None]).round().clamp_min(1)
    worst = (rounded * units[:, None] / above - 1).abs().amax(1)
    unit = units[int(worst.argmin())]
    return torch.where(levels > 0, (levels / unit).round().clamp_min(1), 0.0), unit


_DIGIT = 127
