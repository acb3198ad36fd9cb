from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from qtool.errors import InputError
from qtool.evaluation import probe as module
from qtool.evaluation.probe import STRENGTHS, Probe, pooled


def clouds(rows: int, seed: int) -> tuple[NDArray[np.float32], list[int]]:
    """Three overlapping clouds of points with 6 features of very different scale."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 3, rows)
    values = draw.normal(size=(rows, 6)) + np.eye(3, 6)[ids] * 1.5
    return (values * [1, 10, 100, 1, 1e-3, 5]).astype(np.float32), [int(i) for i in ids]


def by_hand(train: NDArray[np.float64], ids: Any, strength: float) -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000)).fit(train, ids)


def folds_accuracy(train: NDArray[np.float64], ids: Any, strength: float) -> float:
    """Mean accuracy on five held-out parts."""
    labels = np.asarray(ids)
    parts = StratifiedKFold(5).split(train, labels)
    return float(np.mean([by_hand(train[a], labels[a], strength).score(train[b], labels[b]) for a, b in parts]))


@pytest.mark.parametrize("rows", [60, 400])
def test_the_probe_is_scikit_learns(rows: int) -> None:
    (train, ids), (test, _) = clouds(rows, 0), clouds(300, 1)
    accuracies = {strength: folds_accuracy(train.astype(np.float64), ids, strength) for strength in STRENGTHS}
    best = min(strength for strength, value in accuracies.items() if value > max(accuracies.values()) - 1e-12)
    expected = by_hand(train.astype(np.float64), ids, best)
    probe = Probe(train, ids, "train")
    assert probe.info.c == best
    assert probe.predict(test).tolist() == expected.predict(test.astype(np.float64)).tolist()
    odds = np.exp(probe.logits(test))
    np.testing.assert_allclose(
        odds / odds.sum(1, keepdims=True), expected.predict_proba(test.astype(np.float64)), rtol=1e-9
    )
    assert probe.info.accuracy == pytest.approx(100 * expected.score(train.astype(np.float64), ids), abs=1e-9)
    assert (probe.info.rows, probe.info.features, probe.info.converged, probe.info.source) == (rows, 6, True, "train")


def test_too_few_rows_to_choose() -> None:
    train, _ = clouds(20, 0)
    ids = [0] * 16 + [2] * 4
    probe = Probe(train, ids, "train")
    assert probe.info.c == 0.01
    expected = by_hand(train.astype(np.float64), ids, 0.01).predict(train.astype(np.float64))
    assert probe.predict(train).tolist() == expected.tolist()


def test_thread_counts_do_not_matter() -> None:
    (train, ids), (test, _) = clouds(400, 0), clouds(300, 1)
    found = []
    for count in (1, 2):
        with threadpool_limits(count):
            probe = Probe(train, ids, "train")
        found.append((probe.info, probe.predict(test).tolist()))
    assert found[0] == found[1]


def test_rows_with_nan_get_no_prediction() -> None:
    train, ids = clouds(100, 0)
    test = train[:4].copy()
    test[1, 2], test[3, 0] = np.nan, np.inf
    probe = Probe(train, ids, "train")
    assert [probe.predict(test)[k] for k in (1, 3)] == [-1, -1]
    assert probe.predict(test)[[0, 2]].tolist() == probe.predict(train[[0, 2]]).tolist()
    assert probe.predict(np.full((2, 6), np.nan, dtype=np.float32)).tolist() == [-1, -1]


def test_what_no_probe_can_be_fitted_on() -> None:
    train, ids = clouds(50, 0)
    with pytest.raises(InputError, match="one class only"):
        Probe(train, [1] * 50, "train")
    train[7, 0] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        Probe(train, ids, "train")


def test_a_fit_that_runs_out_of_iterations_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ITERATIONS", 1)
    assert Probe(*clouds(100, 0), "train").info.converged is False


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 3))
def test_pooling_is_the_mean_of_unmasked_tokens(lengths: list[int], seed: int) -> None:
    hidden = torch.randn(len(lengths), 6, 3, generator=torch.Generator().manual_seed(seed))
    mask = torch.tensor([[1] * length + [0] * (6 - length) for length in lengths])
    hidden[mask == 0] = float("nan")  # whatever stands at padding must not matter
    expected = [hidden[row, :length].double().mean(0).tolist() for row, length in enumerate(lengths)]
    found: Any = pooled(hidden, mask)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)
