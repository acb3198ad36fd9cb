"""What attention probabilities look like, head by head: a histogram, sparsity, half of the mass, dispersion.

Probabilities are seen one batch at a time and kept as counts and sums, so that memory does not grow with the data and
every number is exact for the float32 probabilities that the model computed (counts are integers, sums float64). Only
pairs that exist are counted: queries of padding are left out, and keys that a query may not see.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qtool.calibrate.probabilities import bins
from qtool.calibrate.probabilities import edges as ends_of_bins
from qtool.errors import InputError

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
_PARTS = 1  # bins of an octave


def edges() -> Floats:
    """Edges of the histogram, float64 `[25]`: a bin for each factor of 2 from 2^-24 to 1, closed below.

    They are the octaves of `calibrate.probabilities`; what is smaller, zero too, has a count of its own.
    """
    ends: Floats = ends_of_bins(_PARTS)[1:].numpy()
    return ends


@dataclass(frozen=True)
class Summary:
    """What is said of the rows of a head, a layer, or all of them.

    `counts` and `beneath` are pairs in and below the bins; `sparsity[i]` the share of pairs at or below the i-th
    threshold (what pruning there makes zero) and `lost[i]` the mass that goes with them, a share of all mass.
    `half_mean` and `half_median` are how many tokens carry half of a row's mass. `entropy` is the mean of rows in nats,
    `dispersion` the mean of each row's entropy by the logarithm of its length: 1 where attention is even, 0 where it
    goes to one token; rows of one token have none.
    """

    rows: int
    pairs: int
    counts: list[int]
    beneath: int
    sparsity: list[float]
    lost: list[float]
    half_mean: float
    half_median: float
    entropy: float
    dispersion: float | None

    def to_json(self) -> dict[str, Any]:
        """By the names of the fields."""
        return dict(vars(self))

    @property
    def mean_keys(self) -> float:
        """Tokens that a row sees, on average."""
        return self.pairs / self.rows

    def cumulative(self) -> list[float]:
        """The share of pairs below each edge."""
        return [float(value) / self.pairs for value in np.cumsum([self.beneath, *self.counts])]


class HeadTally:
    """Counts and sums of one attention module, a row a head."""

    def __init__(self, heads: int, thresholds: Sequence[float]) -> None:
        self.heads, self.thresholds = heads, [largest_float32(value) for value in thresholds]
        self.rows = self.long_rows = self.pairs = 0
        self.counts: Counts = np.zeros((heads, len(edges())), dtype=np.int64)  # the first is what is beneath
        self.below: Counts = np.zeros((heads, len(thresholds)), dtype=np.int64)
        self.lost: Floats = np.zeros((heads, len(thresholds)))
        self.mass: Floats = np.zeros(heads)
        self.halves: Counts = np.zeros((heads, 1), dtype=np.int64)  # rows by how many tokens carry half of their mass
        self.entropy: Floats = np.zeros(heads)
        self.dispersion: Floats = np.zeros(heads)

    def update(self, probabilities: torch.Tensor, valid: torch.Tensor) -> None:
        """Take in float32 `[batch, heads, queries, keys]`, 0 where `valid` (bool, broadcast to it) is false.

        A row without valid keys is no row. Counted on the host, wherever they are. Raises InputError for NaN.
        """
        probabilities, valid = probabilities.cpu(), valid.cpu()
        batch, heads, queries, keys = probabilities.shape
        seen = valid.expand(batch, 1, queries, keys)[:, 0]
        exists = seen.any(-1)
        lengths = seen.sum(-1)[exists].numpy()
        rows = probabilities.transpose(0, 1)[:, exists].float().numpy()
        if np.isnan(rows).any():
            raise InputError("the float model computes NaN in its attention on this data")
        self.rows += len(lengths)
        self.long_rows += int((lengths > 1).sum())
        self.pairs += int(lengths.sum())
        unseen = int(lengths.size * keys - lengths.sum())
        if keys >= self.halves.shape[1]:
            self.halves = np.pad(self.halves, ((0, 0), (0, keys + 1 - self.halves.shape[1])))
        for head in range(heads):
            self._count(head, rows[head], unseen)
            self._weigh(head, rows[head])
            self._disperse(head, rows[head], lengths)

    def _count(self, head: int, rows: NDArray[np.float32], unseen: int) -> None:
        """The histogram; pairs that do not exist are zeros, and taken off again."""
        places = bins(torch.from_numpy(rows), _PARTS)
        found = np.bincount(places.numpy().ravel(), minlength=self.counts.shape[1])
        found[0] -= unseen
        self.counts[head] += found
        for index, limit in enumerate(self.thresholds):
            self.below[head, index] += np.count_nonzero(rows <= limit) - unseen

    def _weigh(self, head: int, rows: NDArray[np.float32]) -> None:
        """Mass below the thresholds, and how many of the largest carry half of it."""
        ascending = np.sort(rows, axis=-1)
        sums = torch.from_numpy(ascending).cumsum(-1, dtype=torch.float64).numpy()
        total = sums[:, -1]
        # The n largest carry half as soon as the others have no more than half.
        needed = rows.shape[1] - np.count_nonzero(sums <= total[:, None] / 2, axis=-1)
        self.halves[head] += np.bincount(needed, minlength=self.halves.shape[1])
        self.mass[head] += total.sum()
        padded = np.pad(sums, ((0, 0), (1, 0)))
        for index, limit in enumerate(self.thresholds):
            smaller = np.count_nonzero(ascending <= limit, axis=-1)
            self.lost[head, index] += np.take_along_axis(padded, smaller[:, None], axis=-1).sum()

    def _disperse(self, head: int, rows: NDArray[np.float32], lengths: Counts) -> None:
        """Entropy of each row, in nats, and relative to that of even attention over the row's tokens."""
        entropy = torch.special.entr(torch.from_numpy(rows).double()).sum(-1).numpy()
        self.entropy[head] += entropy.sum()
        long = lengths > 1
        self.dispersion[head] += (entropy[long] / np.log(lengths[long])).sum()

    def summary(self, heads: slice = slice(None)) -> Summary:
        """Of one head, or of several together. Raises InputError when nothing was seen."""
        return summarise([(self, heads)])


def summarise(parts: Sequence[tuple[HeadTally, slice]]) -> Summary:
    """Of heads of several modules together. Raises InputError when nothing was seen."""
    members = [len(range(*heads.indices(tally.heads))) for tally, heads in parts]
    rows = sum(tally.rows * count for (tally, _), count in zip(parts, members, strict=True))
    if not rows:
        raise InputError("attention saw no token; every row of the data is empty")
    long_rows = sum(tally.long_rows * count for (tally, _), count in zip(parts, members, strict=True))
    pairs = sum(tally.pairs * count for (tally, _), count in zip(parts, members, strict=True))
    counts = sum(tally.counts[heads].sum(0) for tally, heads in parts)
    mass = math.fsum(float(tally.mass[heads].sum()) for tally, heads in parts)
    below = sum(tally.below[heads].sum(0) for tally, heads in parts)
    lost = sum(tally.lost[heads].sum(0) for tally, heads in parts)
    width = max(tally.halves.shape[1] for tally, _ in parts)
    halves = sum(np.pad(t.halves[heads].sum(0), (0, width - t.halves.shape[1])) for t, heads in parts)
    dispersion = math.fsum(float(tally.dispersion[heads].sum()) for tally, heads in parts)
    return Summary(
        rows=rows,
        pairs=pairs,
        counts=np.asarray(counts)[1:].tolist(),
        beneath=int(np.asarray(counts)[0]),
        sparsity=(np.asarray(below) / pairs).tolist(),
        lost=(np.asarray(lost) / mass).tolist(),
        half_mean=float(np.asarray(halves) @ np.arange(width)) / rows,
        half_median=_median(np.asarray(halves)),
        entropy=math.fsum(float(tally.entropy[heads].sum()) for tally, heads in parts) / rows,
        dispersion=dispersion / long_rows if long_rows else None,
    )


def _median(counts: Counts) -> float:
    """Of numbers 0, 1, 2 … that occurred so often: the middle one, or the mean of the two in the middle."""
    total, upto = int(counts.sum()), np.cumsum(counts)
    low, high = (int(np.searchsorted(upto, place, side="right")) for place in ((total - 1) // 2, total // 2))
    return (low + high) / 2


def largest_float32(limit: float) -> np.float32:
    """The largest float32 that is not above `limit`: a float32 is at or below one where it is at or below the other."""
    nearest = np.float32(limit)
    below: np.float32 = np.nextafter(nearest, np.float32(-np.inf))
    return nearest if float(nearest) <= limit else below
