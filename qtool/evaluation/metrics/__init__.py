"""Scores, and what is said about the difference of two scores on the same examples.

Metrics are `evaluate.Metric` classes that live here: `evaluate.load` of a bare name would run a file of that name from
the working directory. Points are hundredths, 100 is a perfect score; a perplexity is its own number of points.
"""

from qtool.evaluation.metrics.base import CountedMetric, InMemoryMetric
from qtool.evaluation.metrics.classes import Accuracy
from qtool.evaluation.metrics.compare import (
    METRICS,
    Interval,
    agreement,
    drop,
    paired_bootstrap,
    paired_interval,
    points,
    value,
)

__all__ = ["METRICS", "Accuracy", "CountedMetric", "InMemoryMetric", "Interval", "agreement", "drop"]
__all__ += ["paired_bootstrap", "paired_interval", "points", "value"]
