"""Scores, and what is said about the difference of two scores on the same examples.

Metrics are `evaluate.Metric` classes that live here: `evaluate.load` of a bare name would run a file of that name from
the working directory. Points are hundredths: 100 is a perfect score.
"""

import math
import os
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Flags = Sequence[bool] | NDArray[np.bool_]


class InMemoryMetric(evaluate.Metric):  # type: ignore[misc]
    """A metric that leaves nothing on disk, so that it works on read-only machines and in parallel runs."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **options})

    def _build_data_dir(self) -> str:
        # The base class makes this folder even for a metric that is kept in memory.
        return os.path.join(self._data_dir_root, self.name, self.config_name)


class Accuracy(InMemoryMetric):
    """Fraction of predictions that equal their reference, in [0, 1]: `sum(p_i == r_i) / n`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Fraction of predictions that equal their reference.",
            citation="",
            inputs_description="predictions, references: class indices, one an example.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        hits = int(np.sum(np.asarray(predictions) == np.asarray(references)))
        return {"accuracy": hits / len(references)}


METRICS: dict[str, type[InMemoryMetric]] = {"accuracy": Accuracy}
"""Metrics by the name that a task gives."""


def points(metric: str, predictions: Sequence[int], references: Sequence[int]) -> float:
    """The metric called `metric` in points, 0–100; NaN when a prediction is missing (negative)."""
    if min(predictions) < 0:
        return math.nan
    computed = METRICS[metric]().compute(predictions=list(predictions), references=list(references))
    return 100.0 * float(computed[metric])


def majority(references: Sequence[int]) -> float:
    """Accuracy, in points, of always answering the most frequent class: `100 · max_k n_k / n`."""
    return 100.0 * float(np.bincount(np.asarray(references)).max()) / len(references)


def agreement(candidate: Sequence[int], baseline: Sequence[int]) -> float:
    """Percent of examples on which both predict the same, `100 · sum(c_i == b_i) / n`; NaN where one is missing."""
    left, right = np.asarray(candidate), np.asarray(baseline)
    if min(left.min(), right.min()) < 0:
        return math.nan
    return 100.0 * float(np.sum(left == right)) / len(left)


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
