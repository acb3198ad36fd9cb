import math
import stat
from itertools import product
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score

from qtool.evaluation.metrics import METRICS, Accuracy, agreement, majority, paired_interval, points

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
    METRICS[name](cache_dir=str(tmp_path / "metrics")).compute(predictions=[0, 1], references=[0, 1])
    assert list(tmp_path.iterdir()) == []


def test_a_missing_prediction_is_nan() -> None:
    assert math.isnan(points("accuracy", [0, -1], [0, 0]))
    assert math.isnan(agreement([0, -1], [0, 1])) and math.isnan(agreement([0, 1], [-1, 1]))


@given(IDS)
def test_agreement_and_majority_by_counting(pairs: list[tuple[int, int]]) -> None:
    ours, theirs = [p for p, _ in pairs], [r for _, r in pairs]
    same = sum(1 for p, r in pairs if p == r)
    assert agreement(ours, theirs) == pytest.approx(100 * same / len(pairs), abs=1e-12)
    assert majority(ours) == pytest.approx(100 * max(ours.count(k) for k in range(4)) / len(ours), abs=1e-12)


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
