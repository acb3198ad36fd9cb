"""Fitted codebooks against every choice of edges that there is, and against means taken one by one."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.calibrate.probabilities import BINS, Distribution, edges
from qtool.numerics.codebook import Codebook
from qtool.rounding.codebooks import fitted, with_means

ENDS = edges().tolist()


def distribution(seed: int, places: list[int]) -> Distribution:
    """Two heads with all of their pairs in few bins, whose means are their middles; they count by other weights."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(2, BINS, dtype=torch.int64)
    counts[:, places] = torch.randint(1, 100, (2, len(places)), generator=generator)
    weights = counts * torch.rand(2, BINS, generator=generator).double()
    middles = (edges()[1:] + edges()[:-1]) / 2
    return Distribution(counts, counts * middles, weights, weights * middles, 10)


def cost(seen: Distribution, head: int, borders: list[float]) -> float:
    """Σ weight · (p - level)² / √p over the bins, levels being the best ones for that, in Python floats."""
    total, filled = 0.0, seen.counts[head].nonzero().flatten().tolist()
    for low, high in itertools.pairwise([0.0, *borders, 2.0]):
        inside = [place for place in filled if low <= ENDS[place] < high]
        points = [(ENDS[place] + ENDS[place + 1]) / 2 for place in inside]
        masses = [float(seen.weights[head, place]) / math.sqrt(p) for place, p in zip(inside, points, strict=True)]
        level = sum(m * p for m, p in zip(masses, points, strict=True)) / (sum(masses) or 1) if low else 0.0
        total += sum(m * (p - level) ** 2 for m, p in zip(masses, points, strict=True))
    return total


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.lists(st.integers(1, BINS - 1), min_size=5, max_size=8, unique=True))
def test_no_other_edges_are_better(seed: int, places: list[int]) -> None:
    places = sorted(places)
    seen = distribution(seed, places)
    book = fitted(seen, 2)
    for head in range(2):
        borders = book.edges[head].tolist()
        assert set(borders) <= set(ENDS) and borders == sorted(set(borders))
        best = min(cost(seen, head, [ENDS[p] for p in chosen]) for chosen in itertools.combinations(places, 3))
        assert cost(seen, head, borders) <= best * (1 + 1e-9) + 1e-12


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.floats(1e-6, 0.4))
def test_what_is_below_a_threshold_is_pruned(seed: int, threshold: float) -> None:
    seen = distribution(seed, list(range(1, BINS, 3)))
    book = fitted(seen, 3, torch.tensor([threshold, threshold / 2], dtype=torch.float64))
    assert book.edges[0, 0] >= threshold and book.edges[1, 0] >= threshold / 2
    assert (seen.sparsity(book.edges[:, 0]) >= seen.sparsity(torch.tensor([threshold, threshold / 2]))).all()


def test_with_fewer_ends_than_codes_bins_are_equally_wide() -> None:
    seen = distribution(0, list(range(BINS)))
    book = fitted(seen, 8, torch.tensor([0.25, 1e-7], dtype=torch.float64))
    ratios = book.edges[0, 1:] / book.edges[0, :-1]
    assert book.edges[0, 0] == 0.25 and ratios.tolist() == pytest.approx([4 ** (1 / 255)] * 254)
    assert set(book.edges[1].tolist()) <= set(ENDS)


def test_levels_are_means_of_what_lies_between_the_edges() -> None:
    seen = distribution(1, [40, 41, 90, 200, 201, 202, 384])
    borders = [ENDS[40], ENDS[100], ENDS[200], ENDS[210]]
    book = Codebook(torch.tensor(borders).double(), torch.tensor([0, 0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    found = with_means(book, seen)
    for head in range(2):
        assert found.edges[head].tolist() == borders
        parts = ([40, 41, 90], [], [200, 201, 202], [384])
        for level, inside, own in zip(found.levels[head, 1:].tolist(), parts, [0.1, 0.2, 0.3, 0.4], strict=True):
            weights = [float(seen.weights[head, place]) for place in inside]
            sums = [float(seen.sums[head, place]) for place in inside]
            assert level == pytest.approx(sum(sums) / sum(weights) if inside else own, rel=1e-9)


def test_a_fitted_codebook_is_nearer_than_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(200, 2, 40, generator=generator) * torch.tensor([1.0, 3.0])[:, None]).softmax(-1)
    seen = Distribution.of(rows)

    def error(book: Codebook) -> float:
        p = rows.double().transpose(0, 1)
        return float((book.values(book.codes(p)) - p).square().sum())

    assert error(fitted(seen, 3)) < 0.6 * error(Codebook.log(3))
