"""Distributions of attention probabilities against bins found one by one, in exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.calibrate.observers import AttentionHistogram
from qtool.calibrate.probabilities import BINS, Distribution, bins, edges
from qtool.errors import InputError

EDGES = [Fraction(0), *(Fraction(16 + part, 16) / 2**e for e in range(24, 0, -1) for part in range(16)), Fraction(1)]
FLOAT32 = st.floats(0, 1, width=32)


def rows_of(seed: int, queries: int = 40, heads: int = 3, keys: int = 9) -> torch.Tensor:
    """Random softmax rows of very different sharpness, the last keys of some forbidden."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, heads, keys, generator=generator) * torch.tensor([1.0, 4.0, 12.0])[:, None]
    length = torch.randint(1, keys + 1, (queries, 1, 1), generator=generator)
    forbidden = torch.arange(keys) >= length
    return scores.masked_fill(forbidden, -torch.inf).softmax(-1).masked_fill(forbidden, -1)


def test_edges_are_sixteenths_of_octaves() -> None:
    assert [Fraction(edge) for edge in edges().tolist()] == EDGES
    assert len(EDGES) == BINS + 1


@given(st.lists(FLOAT32 | st.sampled_from([float(edge) for edge in EDGES]), min_size=1, max_size=30))
def test_a_probability_is_in_the_bin_that_holds_it(values: list[float]) -> None:
    for value, place in zip(values, bins(torch.tensor(values)).tolist(), strict=True):
        inside = EDGES[place] <= Fraction(value) < EDGES[place + 1]
        assert inside or (value == 1 and place == BINS - 1)


def test_what_rounding_puts_beyond_one_is_in_the_last_bin() -> None:
    assert bins(torch.tensor([1.0000001, 1.0, 2**-24 - 2**-48, 0.0])).tolist() == [BINS - 1, BINS - 1, 0, 0]


def test_counts_and_mass_are_those_of_pairs_that_may_see_each_other() -> None:
    observer = AttentionHistogram()
    for seed in range(3):
        observer.update(rows_of(seed))
    observer.update(torch.empty(0, 3, 9))
    state = observer.state()
    rows = torch.cat([rows_of(seed) for seed in range(3)])
    for head in range(3):
        seen = [p for p in rows[:, head].flatten().tolist() if p >= 0]
        counts, _ = np.histogram(seen, [float(edge) for edge in EDGES])
        mass, _ = np.histogram(seen, [float(edge) for edge in EDGES], weights=seen)
        assert state["counts"][head].tolist() == counts.tolist()
        assert state["mass"][head].tolist() == pytest.approx(mass.tolist(), rel=1e-12)
    assert int(state["tokens"]) == len(rows)
    distribution = Distribution.from_state(state)
    assert distribution.weights.equal(distribution.counts.double()) and distribution.sums.equal(distribution.mass)
    assert distribution.mean_length == pytest.approx((rows[:, 0] >= 0).sum().item() / len(rows))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_no_number_is_refused(number: float) -> None:
    rows = rows_of(0)
    rows[3, 1, 0] = number
    with pytest.raises(InputError, match="NaN or infinity"):
        AttentionHistogram().update(rows)


def test_nothing_seen_is_an_error() -> None:
    with pytest.raises(InputError, match="saw no token"):
        AttentionHistogram().state()


def test_sparsity_and_lost_mass_at_an_edge_are_exact() -> None:
    rows = rows_of(4, queries=200)
    distribution = Distribution.of(rows)
    limit = 2**-6 * 1.25
    for head in range(3):
        seen = rows[:, head].flatten()
        seen = seen[seen >= 0].double()
        below = seen < limit
        assert distribution.sparsity(limit)[head].item() == pytest.approx(below.double().mean().item(), abs=1e-12)
        lost = (seen * below).sum() / seen.sum()
        assert distribution.lost_mass(limit)[head].item() == pytest.approx(lost.item(), abs=1e-12)


@given(st.integers(0, 50), st.floats(0.01, 0.99))
def test_thresholds_give_the_share_that_was_asked_for(seed: int, share: float) -> None:
    rows = rows_of(seed)
    distribution = Distribution.of(rows)
    pruning, losing = distribution.threshold(share), distribution.threshold(share, of="mass")
    assert pruning.shape == losing.shape == (3,)
    assert distribution.sparsity(pruning).tolist() == pytest.approx([share] * 3, abs=1e-9)
    assert distribution.lost_mass(losing).tolist() == pytest.approx([share] * 3, abs=1e-9)
    for head in range(3):  # among the numbers themselves it is off by what one bin holds
        seen = rows[:, head].flatten()
        seen = seen[seen >= 0]
        tolerance = distribution.counts[head].max().item() / len(seen)
        assert (seen < pruning[head]).double().mean().item() == pytest.approx(share, abs=tolerance)


def test_shares_count_by_the_square_of_the_largest() -> None:
    rows = rows_of(7)
    found = Distribution.of(rows, relative=True)
    for head in range(3):
        counts, weights, sums, mass = (np.zeros(BINS) for _ in range(4))
        for row in rows[:, head].tolist():
            top = max(row)
            for p in (p for p in row if p >= 0):
                place = min(
                    np.searchsorted([float(edge) for edge in EDGES], np.float32(p / top), "right") - 1, BINS - 1
                )
                counts[place] += 1
                mass[place] += p
                weights[place] += top**2
                sums[place] += top * p
        assert found.counts[head].tolist() == counts.tolist()
        for table, expected in ((found.weights, weights), (found.sums, sums), (found.mass, mass)):
            assert table[head].tolist() == pytest.approx(expected.tolist(), rel=1e-12, abs=1e-15)
    assert found.mass.sum().item() == pytest.approx(3 * len(rows), rel=1e-6)
