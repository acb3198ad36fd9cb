"""Correlations of real predictions with real references, in [−1, 1]; NaN where one side is constant."""

from collections.abc import Callable

import numpy as np

from qtool.evaluation.metrics.base import REAL, Column, CountedMetric, Floats, InMemoryMetric, not_finite, ratio

RESOLUTION = 1e-12
"""A variance below this part of the mean square is rounding, not spread."""


class Pearson(CountedMetric):
    """Pearson's linear correlation, in [−1, 1]; NaN where one side is constant."""

    name_ = "pearson"
    columns = (REAL, REAL)
    missing = staticmethod(not_finite)

    @staticmethod
    def counts(predictions: Column, references: Column) -> Floats:
        """`1, x, y, x², y², xy` of both sides after they are centred and scaled.

        Shift and scale change no correlation, and without them the sums of values around 1e6 would cancel. They come
        from the data: only rows of one call can be added.
        """
        x, y = _standard(predictions), _standard(references)
        return np.column_stack([np.ones(len(x)), x, y, x * x, y * y, x * y])

    @staticmethod
    def value(sums: Floats) -> Floats:
        """`(n Σxy − Σx Σy) / sqrt((n Σx² − (Σx)²) · (n Σy² − (Σy)²))`."""
        n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
        spread = np.sqrt(_spread(n, x, xx) * _spread(n, y, yy))
        return np.clip(ratio(n * xy - x * y, spread), -1.0, 1.0)


class Spearman(InMemoryMetric):
    """Spearman's rank correlation, in [−1, 1], tied values sharing their mean rank; NaN where one side is constant."""

    name_ = "spearman"
    columns = (REAL, REAL)
    missing = staticmethod(not_finite)

    @classmethod
    def statistic(cls, predictions: Column, references: Column) -> Callable[[Floats], Floats]:
        """Pearson's correlation of the ranks that the weighted examples have among themselves."""
        left, right = _ranks(predictions), _ranks(references)

        def correlation(weights: Floats) -> Floats:
            mean = (weights.sum(-1, keepdims=True) + 1) / 2
            x, y = left(weights) - mean, right(weights) - mean
            # Multiples of 1/4, added without rounding: the spread of a constant is 0 and nothing else.
            spread = np.sqrt((weights * x * x).sum(-1) * (weights * y * y).sum(-1))
            return np.clip(ratio((weights * x * y).sum(-1), spread), -1.0, 1.0)

        return correlation


def _standard(column: Column) -> Floats:
    values = np.asarray(column, dtype=np.float64)
    if values.min() == values.max():  # the mean of equal numbers may be another number
        return np.zeros(len(values))
    values = values - values.mean()
    scaled: Floats = values / np.abs(values).max()
    return scaled


def _spread(n: Floats, total: Floats, squares: Floats) -> Floats:
    spread = n * squares - total**2
    return np.where(spread > RESOLUTION * n * squares, spread, 0.0)


def _ranks(column: Column) -> Callable[[Floats], Floats]:
    """Ranks `[..., examples]` as a function of weights of this shape; values are sorted once, not for each row."""
    group = np.unique(np.asarray(column, dtype=np.float64), return_inverse=True)[1]
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))

    def ranks(weights: Floats) -> Floats:
        sizes = np.add.reduceat(weights[..., order], starts, axis=-1)
        shared: Floats = np.cumsum(sizes, axis=-1) - (sizes - 1) / 2
        return shared[..., group]

    return ranks
