"""What a codebook makes of float32 probabilities, by table: the same levels as `Codebook`, many times faster.

The leading bits of a float32 name a stretch of numbers so narrow that at most one edge lies inside. A table says which
edge that is, and the levels on both sides of it.
"""

import torch

from qtool.errors import InputError
from qtool.numerics.codebook import Codebook

_ONE = 0x3F800000  # bits of 1.0
_DROPPED = (16, 14, 12, 10)
"""Bits of a float32 that are looked at only by comparing with the edge; fewer where edges lie closer."""


class Coding:
    """Levels of probabilities `[...]` by a codebook without leading dimensions. Raises InputError for one that has."""

    def __init__(self, book: Codebook) -> None:
        if book.edges.dim() != 1:
            raise InputError("tables are made of codebooks that all heads share")
        self._edges = _at_or_above(book.edges)
        levels = book.levels.float()
        self._dropped = next((bits for bits in _DROPPED if self._alone(bits)), _DROPPED[-1])
        starts = (torch.arange((_ONE >> self._dropped) + 1, dtype=torch.int32) << self._dropped).view(torch.float32)
        codes = torch.bucketize(starts, self._edges, right=True)
        self._low, self._high = levels[codes], levels[(codes + 1).clamp_(max=len(levels) - 1)]
        self._next = torch.cat([self._edges, torch.tensor([torch.inf])])[codes]
        if not self._alone(self._dropped):
            raise InputError("two edges of a codebook are closer than tables can tell apart")

    def _alone(self, dropped: int) -> bool:
        """Whether no stretch has two edges inside."""
        inside = self._edges[self._edges.view(torch.int32) & ((1 << dropped) - 1) != 0]
        return len((inside.view(torch.int32) >> dropped).unique()) == len(inside)

    def __call__(self, probabilities: torch.Tensor) -> torch.Tensor:
        """float32 levels of contiguous float32 numbers from 0; what is beyond 1 is taken for 1."""
        places = (probabilities.view(torch.int32) >> self._dropped).clamp_(max=len(self._low) - 1).flatten()
        if self._low.device != places.device:
            self._low, self._high, self._next = (x.to(places.device) for x in (self._low, self._high, self._next))
        low, high, edge = (torch.index_select(table, 0, places) for table in (self._low, self._high, self._next))
        return torch.where(probabilities.flatten() >= edge, high, low).view_as(probabilities)


def _at_or_above(edges: torch.Tensor) -> torch.Tensor:
    """The smallest float32 that is not below each edge: a float32 has reached one where it has reached the other."""
    nearest = edges.float()
    return torch.where(nearest.double() < edges, nearest.nextafter(torch.tensor(torch.inf)), nearest)
