import math
import stat
from itertools import product
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from qtool.errors import UsageError
from qtool.evaluation.metrics import METRICS, Accuracy, agreement, drop, paired_interval, points, value

TAGS = ([[], ["B-A", "I-A", "O"], ["B-A"]], [[], ["B-A", "I-A", "B-B"], ["I-A"]])
TEXTS = (["", "the Cat", "", "dog"], [[""], ["cat", "a dog"], ["x", ""], ["cats"]])
EXAMPLES: dict[str, tuple[list[Any], list[Any], float]] = {
    "accuracy": ([0, 1, 1, 2], [0, 1, 0, 2], 0.75),
    "f1": ([0, 1, 1, 1], [0, 1, 0, 0], 0.5),
    "matthews_correlation": ([1, 1, 0, 0, 1], [1, 1, 0, 1, 1], 3 / 24**0.5),
    "token_accuracy": ([[], [1, 2], [3]], [[], [1, 0], [3]], 2 / 3),
    "pearson": ([1.0, 2.0, 4.0], [1.0, 3.0, 2.0], 1 / (14 / 3 * 2) ** 0.5),
    "spearman": ([1.0, 2.0, 4.0], [1.0, 3.0, 2.0], 0.5),
    "squad_f1": (*TEXTS, 0.25),
    "exact_match": (*TEXTS, 0.75),
    "entity_f1": (*TAGS, 0.8),
    "entity_precision": (*TAGS, 1.0),
    "entity_recall": (*TAGS, 2 / 3),
    "perplexity": ([3.0, 0.0, 1.5], [4, 0, 5], math.exp(0.5)),
}
"""Predictions, references, value by hand."""

IDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


def flags(both: int, lost: int, won: int, neither: int) -> tuple[list[bool], list[bool]]:
    """(candidate correct, baseline correct) with these counts."""
    candidate = [True] * both + [False] * lost + [True] * won + [False] * neither
    baseline = [True] * both + [True] * lost + [False] * won + [False] * neither
    return candidate, baseline


@given(IDS)
def test_accuracy_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    predictions, references = [p for p, _ in pairs], [r for _, r in pairs]
    assert points("accuracy", predictions, references) == pytest.approx(
        100 * accuracy_score(references, predictions), abs=1e-9
    )


def test_accuracy_by_hand_is_exact() -> None:
    assert points("accuracy", [0] * 776 + [1] * 96, [0] * 872) == 100 * 776 / 872
    assert points("accuracy", [0, 1], [1, 0]) == 0.0
    assert points("accuracy", [3], [3]) == 100.0


def test_accuracy_is_an_evaluate_metric() -> None:
    metric = Accuracy()
    assert isinstance(metric, evaluate.Metric)
    metric.add_batch(predictions=[0, 1], references=[0, 0])
    metric.add(prediction=1, reference=1)
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize("name", list(METRICS))
def test_metrics_leave_nothing_on_disk(name: str, tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    predictions, references, _ = EXAMPLES[name]
    METRICS[name](cache_dir=str(tmp_path / "metrics")).compute(predictions=predictions, references=references)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", list(METRICS))
def test_compute_and_points_give_the_value_by_hand(name: str) -> None:
    predictions, references, expected = EXAMPLES[name]
    assert value(name, predictions, references) == pytest.approx(expected, abs=1e-12)
    scale = 1 if name == "perplexity" else 100
    assert points(name, predictions, references) == pytest.approx(scale * expected, abs=1e-10)
    metric = METRICS[name]()
    assert metric.compute(predictions=predictions, references=references) == {
        name: value(name, predictions, references)
    }
    for prediction, reference in zip(predictions, references, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == {name: value(name, predictions, references)}


@pytest.mark.parametrize("name", list(METRICS))
def test_arrays_are_as_good_as_lists(name: str) -> None:
    predictions, references, expected = EXAMPLES[name]
    kind = object if isinstance(references[0], list) else None
    arrays = [
        np.array([*side, None], dtype=kind)[:-1] if kind else np.array(side) for side in (predictions, references)
    ]
    assert value(name, *arrays) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", list(METRICS))
def test_no_example_has_no_score_and_lengths_must_agree(name: str) -> None:
    assert math.isnan(points(name, [], []))
    predictions, references, _ = EXAMPLES[name]
    with pytest.raises(ValueError, match=f"{len(predictions) - 1} predictions for {len(references)} references"):
        points(name, predictions[1:], references)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        *((name, -1) for name in ("accuracy", "f1", "matthews_correlation")),
        *(("token_accuracy", answers) for answers in (None, [0, -1])),
        *((name, None) for name in METRICS if name.startswith(("entity", "squad", "exact"))),
        *((name, bad) for name in ("pearson", "spearman", "perplexity") for bad in (math.nan, math.inf, None)),
    ],
)
def test_a_missing_prediction_is_nan(name: str, missing: Any) -> None:
    predictions, references, _ = EXAMPLES[name]
    assert math.isnan(points(name, [missing, *predictions[1:]], references))
    assert math.isnan(points(name, [*predictions[:-1], missing], references))


@pytest.mark.parametrize(("missing", "there"), [(-1, 1), (np.int64(-1), 1), (None, "x"), (None, ["O"])])
def test_agreement_with_a_missing_prediction_is_nan(missing: Any, there: Any) -> None:
    assert math.isnan(agreement([there, missing], [there, there]))
    assert math.isnan(agreement([there, there], [missing, there]))
    assert agreement([there, there], [there, there]) == 100.0


def test_agreement_of_texts_and_lists() -> None:
    assert agreement(["a", "", "b", "b"], ["a", "", "b", "c"]) == 75.0
    assert agreement([["O", "B-X"], []], [["O", "O"], []]) == 50.0
    assert agreement(np.array([0, 1, 2]), [0, 1, 1]) == pytest.approx(200 / 3)


def test_drop_in_points_and_in_percent() -> None:
    assert drop("accuracy", 90.0, 92.5) == 2.5
    assert drop("perplexity", 20.2, 20.0) == pytest.approx(1.0)
    assert math.isnan(drop("perplexity", math.inf, math.inf)) and math.isnan(drop("f1", math.nan, 1.0))


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown metric 'matthews'; did you mean matthews_correlation"):
        points("matthews", [0], [0])


@given(IDS)
def test_agreement_by_counting(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = [p for p, _ in pairs], [r for _, r in pairs]
    same = sum(1 for p, r in pairs if p == r)
    assert agreement(ours, theirs) == pytest.approx(100 * same / len(pairs), abs=1e-12)


def test_interval_by_hand() -> None:
    # b = 2, c = 0, n = 8: p = 0.3, q = 0.1, variance (0.4 - 0.04) / 10 = 0.036, z = 1.959963984540054.
    low, high = paired_interval(*flags(5, 2, 0, 1))
    assert low == pytest.approx(20 - 100 * 1.959963984540054 * 0.036**0.5, abs=1e-9)
    assert high == pytest.approx(20 + 100 * 1.959963984540054 * 0.036**0.5, abs=1e-9)


def test_interval_in_exact_fractions() -> None:
    # Counts 1, 1, 7, 12: airway hyper-responsiveness of 21 children before and after a transplantation (Bentur et al.,
    # 2009), the example of Fagerland, Lydersen and Laake (2014), Statistics in Medicine 33. So p = 2/23 and q = 8/23,
    # the middle is -6/23 and the variance (10/23 - 36/529) / 23 = 194/12167.
    middle, deviation = -6 / 23, (194 / 12167) ** 0.5
    expected = [100 * (middle + sign * 1.959963984540054 * deviation) for sign in (-1, 1)]
    assert paired_interval(*flags(1, 1, 7, 12)) == pytest.approx(expected, abs=1e-9)


@given(*[st.integers(0, 300)] * 4)
def test_interval_holds_the_estimate_and_mirrors(both: int, lost: int, won: int, neither: int) -> None:
    n = both + lost + won + neither
    if n == 0:
        return
    candidate, baseline = flags(both, lost, won, neither)
    low, high = paired_interval(candidate, baseline)
    assert -100 <= low < high <= 100
    assert low - 1e-9 <= 100 * (lost - won) / n <= high + 1e-9
    mirrored = paired_interval(baseline, candidate)
    assert (-mirrored[1], -mirrored[0]) == pytest.approx((low, high), abs=1e-9)
    wider = paired_interval(candidate, baseline, level=0.99)
    assert wider[0] <= low and high <= wider[1]


def test_interval_of_no_change_is_not_a_point() -> None:
    low, high = paired_interval(*flags(776, 0, 0, 96))
    assert low == -high and 0.2 < high < 0.5


@pytest.mark.parametrize(("lost", "won"), [(0.01, 0.01), (0.05, 0.02), (0.2, 0.1), (0.3, 0.3)])
def test_exact_coverage_on_small_sets(lost: float, won: float) -> None:
    """The probability that the interval holds the true drop, summed over every outcome of 60 examples."""
    n, covered = 60, 0.0
    for b, c in product(range(n + 1), repeat=2):
        if b + c > n:
            continue
        low, high = paired_interval(*flags(n - b - c, b, c, 0))
        if low <= 100 * (lost - won) <= high:
            ways = math.comb(n, b) * math.comb(n - b, c)
            covered += ways * lost**b * won**c * (1 - lost - won) ** (n - b - c)
    assert 0.94 <= covered <= 1.0


def test_simulated_coverage_on_872_examples() -> None:
    draw = np.random.default_rng(0)
    lost, won, rounds, covered = 0.012, 0.008, 2000, 0
    for b, c, rest in draw.multinomial(872, [lost, won, 1 - lost - won], size=rounds):
        low, high = paired_interval(*flags(int(rest), int(b), int(c), 0))
        covered += low <= 100 * (lost - won) <= high
    assert 0.935 <= covered / rounds <= 0.975
