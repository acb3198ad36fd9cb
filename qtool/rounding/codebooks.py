"""Codebooks that fit what was observed: the bins and levels of each head with the least squared error.

What a query gets is Σ p·v. Were the values of its keys unrelated, its squared error would go by the sum of squared
errors of probabilities; were they all the same, by the errors' sum, and the many small ones together count. Between the
two, a squared error counts by 1/√p here (docs/logattn.md has what that gains). Levels are the means of what is in their
bins, so that errors cancel in a row's sum too.
"""

import torch

from qtool.calibrate.probabilities import BINS, Distribution, edges
from qtool.numerics.codebook import Codebook

Table = torch.Tensor
_TINY = torch.finfo(torch.float64).tiny
_LEAST = 2.0**-40  # what is smaller counts like this


def fitted(seen: Distribution, bits: int, at_least: torch.Tensor | None = None) -> Codebook:
    """A codebook of `2^bits` codes for each head of `seen`; its edges are ends of the distribution's bins.

    The best of all such edges are found (dynamic programming); with `at_least`, float64 `[heads]`, the best of those
    that prune what is smaller. Where so little room is left that there are fewer ends than codes, bins are equally wide
    in the logarithm.
    """
    lowest = torch.zeros(len(seen.counts)) if at_least is None else at_least
    heads = [
        _fitted(weights, sums, 1 << bits, float(low))
        for weights, sums, low in zip(seen.weights, seen.sums, lowest, strict=True)
    ]
    return Codebook(*(torch.stack(parts) for parts in zip(*heads, strict=True)))


def with_means(book: Codebook, seen: Distribution) -> Codebook:
    """`book` for each head of `seen`; levels are the means of what lies between its edges, where anything does."""
    heads = len(seen.counts)
    borders, levels = book.edges.expand(heads, -1), book.levels.expand(heads, -1)
    parts = zip(seen.weights, seen.sums, borders, levels, strict=True)
    return Codebook(borders.clone(), torch.stack([_means(*part) for part in parts]))


def _means(weights: Table, sums: Table, borders: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Levels of a head; the distribution's bins are taken to be evenly filled."""
    ends = edges()
    covered = ((ends[1:] - borders[:, None]) / ends.diff()).clamp(0, 1)  # above each border
    count, total = (
        -torch.cat([covered @ table, torch.zeros(1, dtype=torch.float64)]).diff() for table in (weights, sums)
    )
    return torch.cat([levels[:1], (total / count.clamp_min(_TINY)).where(count > 0, levels[1:])])


def _fitted(weights: Table, sums: Table, codes: int, lowest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Edges and levels of a head, float64 `[codes - 1]` and `[codes]`."""
    ends = edges()
    start = min(max(1, int(torch.searchsorted(ends, lowest))), BINS - 1)
    if BINS - start >= codes - 1:
        means = sums / weights.clamp_min(_TINY)  # as if a bin held its mean alone
        count = weights / means.clamp_min(_LEAST).sqrt()
        total, square = (_summed(count * power) for power in (means, means.square()))
        borders = ends[_best_places(_summed(count), total, square, codes - 1, start)]
    else:
        borders = ends[start] ** (torch.arange(codes - 1, 0, -1, dtype=torch.float64) / (codes - 1))
    middles = (borders * torch.cat([borders[1:], torch.ones(1, dtype=torch.float64)])).sqrt()
    return borders, _means(weights, sums, borders, torch.cat([torch.zeros(1, dtype=torch.float64), middles]))


def _summed(table: Table) -> Table:
    """Up to each end, `[BINS + 1]`."""
    return torch.cat([torch.zeros(1, dtype=torch.float64), table.cumsum(0)])


def _best_places(count: Table, total: Table, square: Table, bins: int, start: int) -> torch.Tensor:
    """Where `bins` bins begin, rising, with the least squared error: each stands for its mean, what is below for zero.

    The tables are sums up to each end, `[BINS + 1]`. The first bin begins at `start` or above.
    """
    inside = count[None] - count[:, None]
    error = (square[None] - square[:, None]) - (total[None] - total[:, None]).square() / inside.clamp_min(_TINY)
    places = torch.arange(BINS + 1)
    error = error.clamp_min_(0).masked_fill_(places[None] <= places[:, None], torch.inf)  # [from, to]
    best = square.masked_fill(places < start, torch.inf)
    steps = []
    for _ in range(bins):
        best, step = (best[:, None] + error).min(0)
        steps.append(step)
    found = [BINS]
    for step in reversed(steps):
        found.append(int(step[found[-1]]))
    return torch.tensor(found[:0:-1])
