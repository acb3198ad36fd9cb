"""What a metric is: a function of how often each example counts, and mostly of sums of counts over the examples."""

import inspect
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np
from numpy.typing import NDArray

Column = Sequence[Any] | NDArray[Any]
Floats = NDArray[np.float64]

INTEGER, REAL, TEXT = datasets.Value("int64"), datasets.Value("float64"), datasets.Value("string")


class InMemoryMetric(evaluate.Metric, ABC):  # type: ignore[misc]
    """A metric that leaves nothing on disk, so that it works on read-only machines and in parallel runs.

    `name_` is its name in `METRICS` and in what `compute` returns, `columns` are the types of one prediction and one
    reference, `scale` makes points of its values.
    """

    name_: ClassVar[str]
    columns: ClassVar[tuple[Any, Any]]
    scale: ClassVar[float] = 100.0

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **options})

    def _build_data_dir(self) -> str:
        # The base class makes this folder even for a metric that is kept in memory.
        return os.path.join(self._data_dir_root, self.name, self.config_name)

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(dict(zip(("predictions", "references"), self.columns, strict=True)))
        return evaluate.MetricInfo(description=inspect.cleandoc(self.__doc__ or ""), citation="", features=features)

    def _compute(self, predictions: Column, references: Column) -> dict[str, float]:
        return {self.name_: self.score(predictions, references)}

    @classmethod
    def score(cls, predictions: Column, references: Column) -> float:
        """The value in the metric's own unit; NaN when a prediction is missing or there is no example."""
        if not cls.usable(predictions, references):
            return math.nan
        return float(cls.statistic(predictions, references)(np.ones(len(references))))

    @classmethod
    def usable(cls, predictions: Column, references: Column) -> bool:
        """Whether there are examples and no prediction is missing.

        Raises:
            ValueError: there are not as many predictions as references.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        return len(references) > 0 and not cls.missing(predictions)

    @staticmethod
    def missing(predictions: Column) -> bool:
        """Whether a prediction is missing: None here, a negative class, a number that is not finite."""
        return any(prediction is None for prediction in predictions)

    @classmethod
    @abstractmethod
    def statistic(cls, predictions: Column, references: Column) -> Callable[[Floats], Floats]:
        """The value `[...]` as a function of weights `[..., examples]`: how often each example occurs."""

    @staticmethod
    def drop(candidate: Floats, baseline: Floats) -> Floats:
        """What the candidate loses, from values in points: `baseline − candidate`."""
        return baseline - candidate


class CountedMetric(InMemoryMetric):
    """A function of sums over examples: what parts of a data set contribute can be added."""

    @staticmethod
    @abstractmethod
    def counts(predictions: Column, references: Column) -> Floats:
        """What each example adds to the sums, `[examples, k]`."""

    @staticmethod
    def value(sums: Floats) -> Floats:
        """The value `[...]` of summed counts `[..., k]`; here `sums_0 / sums_1`, NaN for 0 / 0."""
        return ratio(sums[..., 0], sums[..., 1])

    @classmethod
    def statistic(cls, predictions: Column, references: Column) -> Callable[[Floats], Floats]:
        """`value(weights · counts)`."""
        counts = cls.counts(predictions, references)
        return lambda weights: cls.value(weights @ counts)


def ratio(top: Floats, bottom: Floats, empty: float = math.nan) -> Floats:
    """`top / bottom`, and `empty` where `bottom` is 0."""
    quotient: Floats = np.divide(top, bottom, out=np.full(np.shape(bottom), empty), where=np.not_equal(bottom, 0))
    return quotient


def f1(sums: Floats) -> Floats:
    """`2 · hits / (predicted + actual)` of sums `[..., 3]` in this order; 0 where nothing is predicted nor there."""
    return ratio(2 * sums[..., 0], sums[..., 1] + sums[..., 2], 0.0)


def not_finite(predictions: Column) -> bool:
    """Whether a real prediction is missing: NaN, None or infinite."""
    return not np.isfinite(np.asarray(predictions, dtype=np.float64)).all()
