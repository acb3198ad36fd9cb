"""From what a head was seen to do, and what is wished for, to its codebook."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Literal

import torch

from qtool.calibrate.probabilities import Distribution
from qtool.numerics.codebook import Codebook
from qtool.rounding.codebooks import fitted, with_means

_HIGHEST = 0.5  # no threshold is above it: what is left of a row must not vanish


@dataclass(frozen=True)
class Wish:
    """`bits` of a code (None: only prune), its bins, whether levels are the means of what was seen, and a threshold.

    Without a threshold, optimal bins begin where that is best, others cover the whole range (the paper's other forms).
    """

    bits: int | None
    mapping: Literal["optimal", "log", "linear"]
    means: bool
    threshold: float | None


def make(wish: Wish, seen: Distribution | None, lost: float | None) -> Codebook:
    """Of all heads, or one for all. `lost` is the mean mass of a row that a head may lose; then `seen` says where."""
    if lost is not None:
        assert seen is not None
        thresholds = seen.threshold(lost, of="mass").clamp_max_(_HIGHEST).tolist()
    else:
        thresholds = [wish.threshold]
    if wish.bits is None:
        return _pruning([value for value in thresholds if value is not None], strict=lost is None)
    if wish.mapping == "optimal":
        assert seen is not None
        at_least = [0.0 if value is None else value for value in thresholds]
        return fitted(seen, wish.bits, torch.tensor(at_least, dtype=torch.float64).expand(len(seen.counts)))
    heads = [Codebook.even(wish.mapping, wish.bits, value) for value in thresholds]
    book = Codebook(*(torch.stack([getattr(head, name) for head in heads]) for name in ("edges", "levels")))
    return with_means(book, seen) if wish.means and seen is not None else book


def _pruning(thresholds: Sequence[float], *, strict: bool) -> Codebook:
    """Zero, and all else as one code. The paper keeps what is strictly above its threshold."""
    edges = [[math.nextafter(value, 1) if strict else value] for value in thresholds]
    ones = [[0.0, 1.0]] * len(thresholds)
    return Codebook(torch.tensor(edges, dtype=torch.float64), torch.tensor(ones, dtype=torch.float64))


def common_threshold(seen: Sequence[Distribution], sparsity: float) -> float:
    """The threshold below which `sparsity` of all pairs of `seen` lie, in whatever head; at most a half.

    Of all ways to prune as many probabilities, the smallest ones have the least mass.
    """
    pooled = [
        Distribution(
            one.counts.sum(0, True), one.mass.sum(0, True), one.weights.sum(0, True), one.sums.sum(0, True), one.rows
        )
        for one in seen
    ]
    return min(_HIGHEST, float(reduce(add, pooled).threshold(sparsity)))
