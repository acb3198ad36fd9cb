"""The paired bootstrap against a loop over the same draws, and how often it holds the truth."""

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest

from qtool.evaluation.metrics import METRICS, compare, drop, paired_bootstrap, paired_interval, points

Sides = tuple[list[Any], list[Any], list[Any]]
NAMES = ["O", "B-A", "I-A", "B-B", "I-B"]
WORDS = ["the cat", "a dog", "cat dog", "dog", ""]


def sides(metric: str, examples: int, seed: int = 3) -> Sides:
    """Candidate, baseline and references: the baseline is mostly right, the candidate mostly follows it."""
    draw = np.random.default_rng(seed)

    def near(truth: Any, most: int, chance: float) -> Any:
        return np.where(draw.random(truth.shape) < chance, truth, draw.integers(most, size=truth.shape))

    if metric in ("pearson", "spearman"):
        truth = draw.integers(6, size=examples).astype(float)
        baseline = truth + np.round(draw.normal(size=examples), 1)
        return (baseline + draw.normal(size=examples)).tolist(), baseline.tolist(), truth.tolist()
    if metric == "perplexity":
        tokens = draw.integers(1, 30, size=examples)
        baseline = 2.0 * tokens + draw.normal(size=examples)
        return (1.01 * baseline + 0.1).tolist(), baseline.tolist(), tokens.tolist()
    shape = (examples, 7) if metric.startswith(("token", "entity")) else (examples,)
    most = 2 if metric == "f1" else 5
    truth = draw.integers(most, size=shape)
    baseline = near(truth, most, 0.8)
    ids: Sides = tuple(side.tolist() for side in (near(baseline, most, 0.7), baseline, truth))  # type: ignore[assignment]
    if metric.startswith("entity"):
        return tuple([[NAMES[tag] for tag in row] for row in side] for side in ids)  # type: ignore[return-value]
    if metric in ("squad_f1", "exact_match"):
        candidate, baseline, truth = ([WORDS[word] for word in side] for side in ids)
        return candidate, baseline, [[text, "cat"] for text in truth]
    return ids


def by_loop(metric: str, data: Sides, resamples: int, seed: int, level: float = 0.95) -> list[float]:
    """The interval from one draw of all indices and a score for each of them."""
    drops = []
    for indices in np.random.default_rng(seed).integers(len(data[2]), size=(resamples, len(data[2]))):
        candidate, baseline, references = ([side[i] for i in indices] for side in data)
        drops.append(drop(metric, points(metric, candidate, references), points(metric, baseline, references)))
    found = np.array(drops)
    tail = 50 * (1 - level)
    return [float(np.percentile(found[~np.isnan(found)], q)) for q in (tail, 100 - tail)]


@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("cells", [1, 130, 2**20])
def test_bootstrap_is_the_loop_over_the_same_draws(metric: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "CELLS", cells)
    data = sides(metric, 29)
    found = paired_bootstrap(metric, *data, resamples=41, seed=7, level=0.8)
    assert found == pytest.approx(by_loop(metric, data, 41, 7, 0.8), abs=1e-9)
    assert found[0] < found[1]


@pytest.mark.parametrize("metric", list(METRICS))
def test_bootstrap_repeats_itself_and_knows_no_change(metric: str) -> None:
    candidate, baseline, references = sides(metric, 60)
    first = paired_bootstrap(metric, candidate, baseline, references, resamples=200)
    assert first == paired_bootstrap(metric, candidate, baseline, references, resamples=200)
    assert first != paired_bootstrap(metric, candidate, baseline, references, resamples=200, seed=1)
    assert paired_bootstrap(metric, baseline, baseline, references, resamples=50) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("metric", "missing"), [("accuracy", -1), ("squad_f1", None), ("spearman", math.nan), ("perplexity", math.nan)]
)
def test_a_missing_prediction_has_no_interval(metric: str, missing: Any) -> None:
    candidate, baseline, references = sides(metric, 20)
    assert np.isnan(paired_bootstrap(metric, [*candidate[:-1], missing], baseline, references)).all()
    assert np.isnan(paired_bootstrap(metric, candidate, [missing, *baseline[1:]], references)).all()
    assert np.isnan(paired_bootstrap(metric, [], [], [])).all()


@pytest.mark.parametrize("metric", ["pearson", "spearman"])
def test_draws_without_a_value_are_left_out_while_they_are_few(metric: str) -> None:
    # One of 12 examples differs: a draw misses it with (11/12)^12 = 0.35. Of 2 examples, about half the draws are one.
    flat = [0.1] * 11 + [5.0]
    data = (flat, [float(i) for i in range(12)], [float(i % 7) for i in range(12)])
    found = paired_bootstrap(metric, *data, resamples=400, seed=2)
    assert found == pytest.approx(by_loop(metric, data, 400, 2), abs=1e-9)
    assert np.isnan(paired_bootstrap(metric, [1.0] * 12, *data[1:])).all()
    two, undefined = ([0.0, 1.0], [1.0, 0.0], [0.0, 1.0]), set()
    for seed in range(10):
        draws = np.random.default_rng(seed).integers(2, size=(51, 2))
        most = bool(np.mean(draws[:, 0] == draws[:, 1]) > 0.5)
        found = paired_bootstrap(metric, *two, resamples=51, seed=seed)
        assert np.isnan(found).all() if most else found == pytest.approx((-200.0, -200.0))
        undefined.add(most)
    assert undefined == {True, False}


def test_a_perplexity_beyond_float64_has_no_interval() -> None:
    assert np.isnan(paired_bootstrap("perplexity", [8e3, 9e3, 8e3], [20.0, 21.0, 20.0], [10, 10, 10])).all()


def test_bootstrap_of_accuracy_is_close_to_the_closed_interval() -> None:
    candidate, baseline, references = sides("accuracy", 4000)
    closed = paired_interval(np.equal(candidate, references), np.equal(baseline, references))
    assert paired_bootstrap("accuracy", candidate, baseline, references) == pytest.approx(closed, abs=0.25)


def test_coverage_of_accuracy() -> None:
    draw, covered, rounds = np.random.default_rng(1), 0, 300
    for seed in range(rounds):
        outcome = draw.choice(3, size=200, p=[0.12, 0.04, 0.84])  # lost, won, unchanged: a drop of 8 points
        candidate, baseline = np.where(outcome == 0, 0, 1), np.where(outcome == 1, 0, 1)
        low, high = paired_bootstrap("accuracy", candidate, baseline, np.ones(200, int), resamples=300, seed=seed)
        covered += low <= 8.0 <= high
    assert 0.90 <= covered / rounds <= 0.985


def test_coverage_of_perplexity() -> None:
    # The nll of n tokens is Gamma(n) for the baseline; the candidate adds 0.02 a token in the mean: exp(0.02) - 1.
    draw, covered, rounds = np.random.default_rng(2), 0, 300
    for seed in range(rounds):
        tokens = draw.integers(20, 60, size=150)
        baseline = draw.gamma(tokens)
        candidate = baseline + draw.gamma(0.5 * tokens, 0.04)
        low, high = paired_bootstrap("perplexity", candidate, baseline, tokens, resamples=300, seed=seed)
        covered += low <= 100 * (math.exp(0.02) - 1) <= high
    assert 0.89 <= covered / rounds <= 0.985


@pytest.mark.parametrize("metric", ["accuracy", "matthews_correlation", "pearson", "entity_f1"])
def test_bootstrap_of_ten_thousand_examples_is_small(metric: str) -> None:
    data = sides(metric, 10_000)
    paired_bootstrap(metric, *data, resamples=1)  # what is made once is not counted
    tracemalloc.start()
    try:
        paired_bootstrap(metric, *data, resamples=250)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The weights of 250 draws at once, with their indices, would take 60 MB.
    assert peak < 48e6
