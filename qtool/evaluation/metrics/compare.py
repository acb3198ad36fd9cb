"""The table of metrics, points, and intervals for the difference of two models on the same examples."""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from qtool.errors import UsageError, one_of
from qtool.evaluation.metrics.base import Column, Floats, InMemoryMetric
from qtool.evaluation.metrics.classes import F1, Accuracy, MatthewsCorrelation, TokenAccuracy
from qtool.evaluation.metrics.correlation import Pearson, Spearman
from qtool.evaluation.metrics.text import EntityF1, EntityPrecision, EntityRecall, ExactMatch, Perplexity, SquadF1

Interval = tuple[float, float]
Flags = Sequence[bool] | NDArray[np.bool_]

CELLS = 2**20
"""Weights that a bootstrap holds at a time: 8 MB an array."""

_CLASSES = (Accuracy, F1, MatthewsCorrelation, TokenAccuracy, Pearson, Spearman)
_TEXTS = (SquadF1, ExactMatch, EntityF1, EntityPrecision, EntityRecall, Perplexity)

METRICS: dict[str, type[InMemoryMetric]] = {kind.name_: kind for kind in (*_CLASSES, *_TEXTS)}
"""Metrics by the name that a task gives."""


def value(metric: str, predictions: Column, references: Column) -> float:
    """The metric called `metric` in its own unit, as its `compute` gives it; NaN when a prediction is missing."""
    return _named(metric).score(predictions, references)


def points(metric: str, predictions: Column, references: Column) -> float:
    """The metric called `metric` in points, a perplexity as it is; NaN when a prediction is missing.

    Missing is a negative class, None instead of a text or list, and a number that is not finite.
    """
    return _named(metric).scale * value(metric, predictions, references)


def drop(metric: str, candidate: float, baseline: float) -> float:
    """What the candidate loses, from both scores in points: `baseline − candidate`; of perplexity, percent above."""
    return float(_named(metric).drop(np.float64(candidate), np.float64(baseline)))


def agreement(candidate: Column, baseline: Column) -> float:
    """Percent of examples on which both predict the same, `100 · sum(c_i == b_i) / n`; NaN where one is missing.

    Predictions are class indices (negative is missing), texts or lists (None is missing).
    """
    if any(p is None or (isinstance(p, (int, np.integer)) and p < 0) for p in (*candidate, *baseline)):
        return math.nan
    same = [bool(c == b) for c, b in zip(candidate, baseline, strict=True)]
    return 100.0 * sum(same) / len(same)


def paired_interval(candidate_correct: Flags, baseline_correct: Flags, level: float = 0.95) -> Interval:
    """Confidence interval (low, high), in points, of the drop: the baseline's accuracy minus the candidate's.

    Both sequences are about the same n examples. With b examples that only the baseline gets right, c that only the
    candidate does, `p = (b + 1) / (n + 2)`, `q = (c + 1) / (n + 2)` and z the normal quantile of `level`, it is

        p − q ± z · sqrt((p + q − (p − q)²) / (n + 2)),   cut at ±1,

    the adjusted Wald interval of Bonett and Price (2012), "Adjusted Wald confidence interval for a difference of
    binomial proportions based on paired data", Journal of Educational and Behavioral Statistics 37(4), 479–488. The
    pseudo-counts keep its width above zero when no prediction, or every one, has changed.
    """
    candidate, baseline = np.asarray(candidate_correct, dtype=bool), np.asarray(baseline_correct, dtype=bool)
    total = len(candidate) + 2
    lost = (int(np.sum(baseline & ~candidate)) + 1) / total
    won = (int(np.sum(candidate & ~baseline)) + 1) / total
    half = NormalDist().inv_cdf(0.5 + level / 2) * math.sqrt((lost + won - (lost - won) ** 2) / total)
    return 100.0 * max(lost - won - half, -1.0), 100.0 * min(lost - won + half, 1.0)


def paired_bootstrap(
    metric: str,
    candidate: Column,
    baseline: Column,
    references: Column,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Confidence interval (low, high) of `drop` for any metric, in points (perplexity: percent).

    The percentile interval of Efron and Tibshirani (1993), "An Introduction to the Bootstrap", chapter 13: the
    quantiles `(1 ± level) / 2` of the drop over `resamples` draws, with replacement, of as many examples as there are;
    both models get the same draws. Draws without a finite value (constant ranks, say) are left out while they are fewer
    than half; else, with a single example, or when a prediction is missing, both ends are NaN. Equal predictions give
    (0, 0), however few there are.
    """
    kind, examples = _named(metric), len(references)
    if examples < 2:  # nothing can be drawn differently
        return math.nan, math.nan
    if not (kind.usable(candidate, references) and kind.usable(baseline, references)):
        return math.nan, math.nan
    ours, theirs = (kind.statistic(side, references) for side in (candidate, baseline))
    draws = _draws(examples, resamples, seed)
    drops = np.concatenate([kind.drop(kind.scale * ours(drawn), kind.scale * theirs(drawn)) for drawn in draws])
    kept = drops[np.isfinite(drops)]
    if 2 * len(kept) <= resamples:
        return math.nan, math.nan
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _draws(examples: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each example is drawn, `[rows, examples]` at a time; a row is one resample."""
    source, most = np.random.default_rng(seed), max(1, CELLS // examples)
    for start in range(0, resamples, most):
        rows = min(most, resamples - start)
        cells = source.integers(examples, size=(rows, examples)) + examples * np.arange(rows)[:, None]
        yield np.bincount(cells.ravel(), minlength=rows * examples).reshape(rows, examples).astype(np.float64)


def _named(metric: str) -> type[InMemoryMetric]:
    if metric not in METRICS:
        raise UsageError(one_of(metric, list(METRICS), "metric"))
    return METRICS[metric]
