"""Metrics against scikit-learn, scipy, seqeval, torch and exact fractions."""

import math
import warnings
from collections.abc import Sequence
from fractions import Fraction
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.metrics import precision_score as seqeval_precision
from seqeval.metrics import recall_score as seqeval_recall
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from qtool.evaluation.metrics import METRICS, CountedMetric, value
from qtool.evaluation.metrics.text import entities

NEAR = 1e-9


def pairs(one: st.SearchStrategy[Any], most: int = 50) -> st.SearchStrategy[list[tuple[Any, Any]]]:
    return st.lists(st.tuples(one, one), min_size=1, max_size=most)


def sides(rows: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [left for left, _ in rows], [right for _, right in rows]


@given(pairs(st.integers(0, 1)))
@example([(0, 0)])
@example([(1, 1)])
@example([(1, 0), (1, 0)])
@example([(0, 1), (0, 0)])
def test_f1_is_that_of_scikit_learn(rows: list[tuple[int, int]]) -> None:
    predictions, references = sides(rows)
    assert value("f1", predictions, references) == pytest.approx(
        f1_score(references, predictions, zero_division=0.0), abs=NEAR
    )


@given(st.integers(0, 5).flatmap(lambda most: pairs(st.integers(0, most))))
@example([(0, 0)])
@example([(2, 2), (2, 2)])
@example([(0, 1), (1, 0)])
@example([(1, 0), (1, 1), (1, 2)])
@example([(0, 0), (7, 7), (7, 0)])
def test_matthews_correlation_is_that_of_scikit_learn(rows: list[tuple[int, int]]) -> None:
    predictions, references = sides(rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A single label was found", category=UserWarning)
        expected = matthews_corrcoef(references, predictions)
    assert value("matthews_correlation", predictions, references) == pytest.approx(expected, abs=NEAR)


@given(pairs(st.lists(st.integers(0, 3), max_size=6)))
def test_token_accuracy_is_that_of_all_tokens(rows: list[tuple[list[int], list[int]]]) -> None:
    short = [sides(list(zip(left, right, strict=False))) for left, right in rows]
    predictions, references = sides(short)
    flat = [[token for row in side for token in row] for side in (predictions, references)]
    found = value("token_accuracy", predictions, references)
    if flat[0]:
        assert found == pytest.approx(accuracy_score(flat[1], flat[0]), abs=NEAR)
    else:
        assert math.isnan(found)


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation from exact fractions, NaN for a constant."""
    mx, my = (sum(map(Fraction, side)) / len(side) for side in (x, y))
    left, right = [Fraction(v) - mx for v in x], [Fraction(v) - my for v in y]
    spread = sum(v * v for v in left) * sum(v * v for v in right)
    covariance = sum(a * b for a, b in zip(left, right, strict=True))
    return math.nan if spread == 0 else math.copysign(math.sqrt(covariance * covariance / spread), covariance)


@given(
    pairs(st.integers(-1000, 1000) | st.integers(0, 2)),
    st.sampled_from([0.0, 1e6, -1e6]),
    st.sampled_from([1e-3, 1.0, 1e-200, 1e150]),
)
@example([(0, 5)], 0.0, 1.0)
@example([(1, 1), (1, 2), (1, 3)], 1e6, 1e-3)
@example([(0, 1), (1, 0)], 1e6, 1e-3)
@example([(7, 7)] * 3, 0.0, 1e-3)
def test_pearson_is_exact_and_that_of_scipy(rows: list[tuple[int, int]], shift: float, scale: float) -> None:
    x, y = ([shift + scale * v for v in side] for side in sides(rows))
    found = value("pearson", x, y)
    assert found == pytest.approx(correlation(x, y), abs=NEAR, nan_ok=True)
    if len(rows) > 1 and scale in (1e-3, 1.0):  # the others square beyond scipy's range
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            expected = stats.pearsonr(x, y).statistic
        assert found == pytest.approx(expected, abs=NEAR, nan_ok=True)


def test_pearson_of_values_that_differ_in_the_last_bit() -> None:
    x = [1.0, math.nextafter(1.0, 2.0), 1.0, 1.0]
    assert value("pearson", x, [0.0, 1.0, 0.0, 0.0]) == pytest.approx(1.0, abs=NEAR)
    assert math.isnan(value("pearson", [0.1] * 3, [0.0, 1.0, 2.0]))


@given(pairs(st.integers(-3, 3) | st.floats(-1e6, 1e6)))
@example([(0, 0)] * 4)
@example([(0, 1), (0, 2)])
@example([(-0.0, 1), (0.0, 2), (1, 3)])
def test_spearman_is_that_of_scipy(rows: list[tuple[float, float]]) -> None:
    x, y = sides(rows)
    found = value("spearman", x, y)
    if len(rows) == 1:
        assert math.isnan(found)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        expected = stats.spearmanr(x, y).statistic
    assert found == pytest.approx(expected, abs=NEAR, nan_ok=True)


@pytest.mark.parametrize(
    ("answer", "golds", "f1", "exact"),
    [
        ("Denver Broncos", ["Denver Broncos"], 1, 1),
        ("the Denver Broncos!", ["denver  broncos"], 1, 1),
        ("Broncos", ["Denver Broncos"], Fraction(2, 3), 0),
        ("Broncos", ["Denver Broncos", "The Broncos"], 1, 1),
        ("in the city of Paris", ["Paris", "the city"], Fraction(2, 5), 0),  # one word of 4 and 1
        ("a cat and a cat", ["cat cat cat"], Fraction(2, 3), 0),  # two words of 3 and 3
        ("red-fox", ["redfox"], 1, 1),
        ("red - fox", ["red fox"], 1, 1),
        ("U.S.", ["US"], 1, 1),
        ("theory", ["ory"], 0, 0),
        ("x—the—y", ["x— —y"], 1, 1),  # an article leaves a space
        ("1,000", ["1000", "one thousand"], 1, 1),
        ("Dvořák«s", ["dvořáks"], 0, 0),  # only ASCII punctuation goes
        ("", ["x"], 0, 0),
        ("x", [""], 0, 0),
        ("the", ["a"], 0, 1),  # both without words
        ("", [""], 0, 1),
    ],
)
def test_squad_by_hand(answer: str, golds: list[str], f1: Fraction, exact: int) -> None:
    assert value("squad_f1", [answer], [golds]) == pytest.approx(float(f1), abs=NEAR)
    assert value("exact_match", [answer], [golds]) == exact


WORD = st.tuples(
    st.sampled_from(["paris", "1999", "theory", "ana", "the", "a", "an"]),
    st.sampled_from([str.lower, str.upper, str.title]),
    st.sampled_from(["{} ", "{}, ", '"{}"\n', " ({}).\t", "- {} "]),
)


@given(st.lists(st.tuples(st.lists(WORD, max_size=5), st.lists(st.lists(WORD, max_size=5), max_size=3)), min_size=1))
def test_squad_of_texts_whose_words_are_known(rows: list[tuple[list[Any], list[list[Any]]]]) -> None:
    def text(words: list[Any]) -> str:
        return "".join(frame.format(case(word)) for word, case, frame in words)

    def bare(words: list[Any]) -> list[str]:
        return [word for word, _, _ in words if word not in ("a", "an", "the")]

    def overlap(left: list[str], right: list[str]) -> float:
        rest, common = list(right), 0
        for word in left:
            if word in rest:
                rest.remove(word)
                common += 1
        if common == 0:
            return 0.0
        precision, recall = common / len(left), common / len(right)
        return 2 * precision * recall / (precision + recall)

    answers, golds = [text(answer) for answer, _ in rows], [[text(gold) for gold in all_] for _, all_ in rows]
    best = [max([overlap(bare(answer), bare(gold)) for gold in all_], default=0.0) for answer, all_ in rows]
    same = [any(bare(answer) == bare(gold) for gold in all_) for answer, all_ in rows]
    assert value("squad_f1", answers, golds) == pytest.approx(sum(best) / len(rows), abs=NEAR)
    assert value("exact_match", answers, golds) == pytest.approx(sum(same) / len(rows), abs=NEAR)


TAG = st.sampled_from(["O", "O", "B", "I", "E", "S"]) | st.builds(
    "{}-{}".format, st.sampled_from("BIESUL"), st.sampled_from(["PER", "LOC", "MISC-X"])
)
SENTENCE = st.lists(st.tuples(TAG, TAG), max_size=12).map(sides)


@given(st.lists(SENTENCE, min_size=1, max_size=6))
@example([([], [])])
@example([(["O", "O"], ["O", "O"])])
@example([(["O"], ["B-PER"])])
@example([(["I-PER"], ["O"])])
@example([(["U-PER", "U-PER", "L-PER", "B-PER"], ["B-PER", "L-PER", "U-PER", "O"])])
@example([(["I-PER", "B-PER", "I-LOC"], ["E-PER", "E-PER", "S-LOC"])])
def test_entities_are_those_of_seqeval(sentences: list[tuple[list[str], list[str]]]) -> None:
    predictions, references = sides(sentences)
    peers = {"f1": seqeval_f1, "precision": seqeval_precision, "recall": seqeval_recall}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*seems not to be NE tag", category=UserWarning)
        for name, peer in peers.items():
            expected = peer(references, predictions, zero_division=0)
            assert value(f"entity_{name}", predictions, references) == pytest.approx(float(expected), abs=NEAR)
        for tags in (*predictions, *references):
            assert entities(tags) == set(get_entities(tags))


def test_entities_by_hand() -> None:
    iob1 = ["I-PER", "I-PER", "B-PER", "O", "I-LOC", "I-ORG"]
    assert entities(iob1) == {("PER", 0, 1), ("PER", 2, 2), ("LOC", 4, 4), ("ORG", 5, 5)}
    assert entities(["B-PER", "E-PER", "S-PER", "S-PER"]) == {("PER", 0, 1), ("PER", 2, 2), ("PER", 3, 3)}
    assert entities(["B-PER", "L-PER", "O", "U-LOC"]) == {("PER", 0, 1), ("LOC", 3, 3)}


def test_tags_must_be_as_many_as_words() -> None:
    with pytest.raises(ValueError, match="1 tags for a sentence of 2"):
        value("entity_f1", [["O"]], [["O", "O"]])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_perplexity_is_that_of_cross_entropy(lengths: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = [3 * torch.randn(n, 11, generator=draw, dtype=torch.float64) for n in lengths]
    labels = [torch.randint(11, (n,), generator=draw) for n in lengths]
    sums = [
        torch.nn.functional.cross_entropy(left, right, reduction="sum").item()
        for left, right in zip(logits, labels, strict=True)
    ]
    found = value("perplexity", sums, lengths)
    if sum(lengths) == 0:
        assert math.isnan(found)
        return
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(labels)).exp().item()
    assert found == pytest.approx(expected, rel=NEAR)


def test_perplexity_beyond_float64_is_infinite() -> None:
    assert value("perplexity", [800.0], [1]) == math.inf


COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "accuracy": st.tuples(st.integers(0, 3), st.integers(0, 3)),
    "f1": st.tuples(st.integers(0, 2), st.integers(0, 2)),
    "matthews_correlation": st.tuples(st.integers(0, 4), st.integers(0, 4)),
    "token_accuracy": st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=4).map(sides),
    "squad_f1": st.tuples(st.text("a b."), st.lists(st.text("a b."), min_size=1, max_size=2)),
    "exact_match": st.tuples(st.text("a b."), st.lists(st.text("a b."), min_size=1, max_size=2)),
    **{name: SENTENCE for name in ("entity_f1", "entity_precision", "entity_recall")},
    "perplexity": st.tuples(st.floats(0, 100), st.integers(0, 20)),
}


@pytest.mark.parametrize("name", list(COLUMNS))
@given(data=st.data())
def test_counts_of_parts_add_up_to_the_whole(name: str, data: st.DataObject) -> None:
    metric = METRICS[name]
    assert issubclass(metric, CountedMetric)
    parts = [data.draw(st.lists(COLUMNS[name], min_size=1, max_size=10)) for _ in range(2)]
    sums = [metric.counts(*sides(part)).sum(0) for part in parts]
    # Fewer classes leave columns out at the end.
    added = np.array([sum(pair) for pair in zip_longest(*sums, fillvalue=0.0)])
    assert float(metric.value(added)) == pytest.approx(value(name, *sides(parts[0] + parts[1])), rel=1e-9, nan_ok=True)


@given(pairs(st.floats(-1e3, 1e3)))
def test_counts_of_pearson_add_within_one_call(rows: list[tuple[float, float]]) -> None:
    metric = METRICS["pearson"]
    assert issubclass(metric, CountedMetric)
    counts = metric.counts(*sides(rows))
    added = counts[: len(rows) // 2].sum(0) + counts[len(rows) // 2 :].sum(0)
    assert float(metric.value(added)) == pytest.approx(value("pearson", *sides(rows)), abs=NEAR, nan_ok=True)


def test_every_metric_but_spearman_is_counted() -> None:
    assert {name for name, metric in METRICS.items() if issubclass(metric, CountedMetric)} == {*COLUMNS, "pearson"}
    assert {*METRICS} == {*COLUMNS, "pearson", "spearman"}
