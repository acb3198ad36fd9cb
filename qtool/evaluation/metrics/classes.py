"""Metrics of class indices."""

import datasets
import numpy as np

from qtool.evaluation.metrics.base import INTEGER, Column, CountedMetric, Floats, f1, ratio


class ClassMetric(CountedMetric):
    """A metric of one class index (0, 1, …) an example."""

    columns = (INTEGER, INTEGER)

    @staticmethod
    def missing(predictions: Column) -> bool:
        """Whether a class is negative."""
        return bool(np.min(predictions) < 0)


class Accuracy(ClassMetric):
    """Fraction of predictions that equal their reference, in [0, 1]: `sum(p_i == r_i) / n`."""

    name_ = "accuracy"

    @staticmethod
    def counts(predictions: Column, references: Column) -> Floats:
        """Hits and examples."""
        hits = np.equal(predictions, references)
        return np.column_stack([hits, np.ones(len(hits))])


class F1(ClassMetric):
    """F1 of class 1 against all others, in [0, 1]: `2 · hits / (predicted + actual)`, 0 where no example is of it."""

    name_ = "f1"
    value = staticmethod(f1)

    @staticmethod
    def counts(predictions: Column, references: Column) -> Floats:
        """Examples of class 1: hits, predicted, actual."""
        predicted, actual = np.equal(predictions, 1), np.equal(references, 1)
        return np.column_stack([predicted & actual, predicted, actual]).astype(np.float64)


class MatthewsCorrelation(ClassMetric):
    """Matthews' correlation coefficient, in [−1, 1], for any number of classes; 0 where one side is one class only.

    With c hits among s examples, p_k predictions and t_k references of class k, it is

        (c · s − Σ p_k t_k) / sqrt((s² − Σ p_k²) · (s² − Σ t_k²)),

    Gorodkin (2004), "Comparing two K-category assignments by a K-category correlation coefficient", Computational
    Biology and Chemistry 28.
    """

    name_ = "matthews_correlation"

    @staticmethod
    def counts(predictions: Column, references: Column) -> Floats:
        """Hits, then (p_k, t_k) for each class.

        The formula reads no more of the confusion matrix than that, and data with fewer classes fill the first columns.
        """
        pairs = np.stack([predictions, references], axis=1)
        marks = np.equal(pairs[:, None, :], np.arange(pairs.max() + 1)[:, None])
        return np.column_stack([pairs[:, 0] == pairs[:, 1], marks.reshape(len(pairs), -1)]).astype(np.float64)

    @staticmethod
    def value(sums: Floats) -> Floats:
        """The formula of the class."""
        hits, predicted, actual = sums[..., 0], sums[..., 1::2], sums[..., 2::2]
        squared = actual.sum(-1) ** 2
        spread = (squared - (predicted**2).sum(-1)) * (squared - (actual**2).sum(-1))
        return ratio(hits * actual.sum(-1) - (predicted * actual).sum(-1), np.sqrt(spread), 0.0)


class TokenAccuracy(CountedMetric):
    """Accuracy over all answers, in [0, 1], where every example carries a list of them."""

    name_ = "token_accuracy"
    columns = (datasets.List(INTEGER), datasets.List(INTEGER))

    @staticmethod
    def missing(predictions: Column) -> bool:
        """Whether a list is None, or holds a negative class."""
        return any(answers is None or min(answers, default=0) < 0 for answers in predictions)

    @staticmethod
    def counts(predictions: Column, references: Column) -> Floats:
        """Hits and answers."""
        rows = zip(predictions, references, strict=True)
        hits = [sum(p == r for p, r in zip(mine, truth, strict=True)) for mine, truth in rows]
        return np.column_stack([hits, [len(truth) for truth in references]]).astype(np.float64)
