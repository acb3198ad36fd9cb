"""Metrics of texts: answers to questions, entities in tagged sentences, language models."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import datasets
import numpy as np

from qtool.evaluation.metrics.base import INTEGER, REAL, TEXT, Column, CountedMetric, Floats, f1, not_finite, ratio

Entity = tuple[str, int, int]


class SquadF1(CountedMetric):
    """Mean over examples of the F1 of the answer's words, in [0, 1], with the gold answer that it meets best.

    SQuAD v1.1, Rajpurkar et al. (2016), arXiv 1606.05250: bags of words after lower case, without punctuation and
    articles. An answer without words scores 0.
    """

    name_ = "squad_f1"
    columns = (TEXT, datasets.List(TEXT))

    @classmethod
    def counts(cls, predictions: Column, references: Column) -> Floats:
        """The example's score and 1."""
        rows = zip(predictions, references, strict=True)
        best = [max((cls.overlap(_words(text), _words(gold)) for gold in golds), default=0.0) for text, golds in rows]
        return np.column_stack([best, np.ones(len(best))])

    @staticmethod
    def overlap(answer: list[str], gold: list[str]) -> float:
        """The score of one answer with one gold answer, both as words."""
        common = (Counter(answer) & Counter(gold)).total()
        return 2 * common / (len(answer) + len(gold)) if common else 0.0


class ExactMatch(SquadF1):
    """Fraction of answers with the words of one of the gold answers, in [0, 1]; normalised as for SQuAD v1.1's F1."""

    name_ = "exact_match"

    @staticmethod
    def overlap(answer: list[str], gold: list[str]) -> float:
        """Whether both are the same."""
        return float(answer == gold)


class EntityF1(CountedMetric):
    """Micro F1 of entities, in [0, 1]: one counts when type, first and last word agree; 0 without any entity.

    References are what `entities` finds in the tags.
    """

    name_ = "entity_f1"
    columns = (datasets.List(TEXT), datasets.List(TEXT))
    value = staticmethod(f1)

    @staticmethod
    def counts(predictions: Column, references: Column) -> Floats:
        """Entities: hits, predicted, actual."""
        rows = zip(predictions, references, strict=True)
        return np.array([_entity_counts(mine, truth) for mine, truth in rows], dtype=np.float64)


class EntityPrecision(EntityF1):
    """Fraction of the predicted entities that are there, in [0, 1]; 0 where none is predicted."""

    name_ = "entity_precision"

    @staticmethod
    def value(sums: Floats) -> Floats:
        """`hits / predicted`."""
        return ratio(sums[..., 0], sums[..., 1], 0.0)


class EntityRecall(EntityF1):
    """Fraction of the entities that are predicted, in [0, 1]; 0 where there are none."""

    name_ = "entity_recall"

    @staticmethod
    def value(sums: Floats) -> Floats:
        """`hits / actual`."""
        return ratio(sums[..., 0], sums[..., 2], 0.0)


class Perplexity(CountedMetric):
    """`exp(Σ nll / Σ tokens)`: predictions are sums of negative log-likelihoods in nats, references their tokens."""

    name_ = "perplexity"
    columns = (REAL, INTEGER)
    scale = 1.0
    missing = staticmethod(not_finite)

    @staticmethod
    def counts(predictions: Column, references: Column) -> Floats:
        """Negative log-likelihood and tokens."""
        return np.column_stack([predictions, references]).astype(np.float64)

    @staticmethod
    def value(sums: Floats) -> Floats:
        """The formula of the class; infinite where it exceeds float64."""
        with np.errstate(over="ignore"):
            return np.exp(ratio(sums[..., 0], sums[..., 1]))

    @staticmethod
    def drop(candidate: Floats, baseline: Floats) -> Floats:
        """Percent by which the candidate's perplexity is above the baseline's: `100 · (c / b − 1)`."""
        with np.errstate(invalid="ignore"):
            return 100.0 * (candidate / baseline - 1.0)


def entities(tags: Sequence[str]) -> set[Entity]:
    """(type, first word, last word) of each entity in the tags of one sentence, such as `B-PER`, `I-PER`, `O`.

    The lenient reading of the CoNLL shared tasks' scorer (Tjong Kim Sang and De Meulder, 2003), which takes IOB1, IOB2,
    IOE and IOBES and repairs what breaks their rules: an entity also begins where the type changes or after `O`.
    Other prefixes, the U and L of BILOU too, separate nothing but types: U after U of the same type is one entity.
    """
    found: set[Entity] = set()
    first, before, type_before = 0, "O", "_"
    for place, tag in enumerate([*tags, "O"]):
        mark, kind = tag[0], tag[1:].split("-", 1)[-1] or "_"
        changed = kind != type_before
        closes = mark in "BSO" if before in "BI" else before in "ES"
        opens = mark in "BS" or (mark in "IE" and before in "OES")
        if closes or (changed and before != "O"):
            found.add((type_before, first, place - 1))
        if opens or (changed and mark != "O"):
            first = place
        before, type_before = mark, kind
    return found


def _entity_counts(predicted: Sequence[str], actual: Sequence[str]) -> tuple[int, int, int]:
    if len(predicted) != len(actual):
        raise ValueError(f"{len(predicted)} tags for a sentence of {len(actual)}")
    mine, truth = entities(predicted), entities(actual)
    return len(mine & truth), len(mine), len(truth)


_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()
