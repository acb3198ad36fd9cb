"""Statistics of attention probabilities, against plain loops over every row."""

import math
import statistics
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.analysis.attention import HeadTally, edges, largest_float32, summarise
from qtool.calibrate.probabilities import bins
from qtool.errors import InputError

LIMITS = (1e-3, 0.05, 0.25)


def attention(causal: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Three texts of 5, 3 and 1 tokens in two heads; what does not exist is 0."""
    draw = torch.Generator().manual_seed(seed)
    present = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    seen = present[:, None, None, :].expand(3, 1, 5, 5)
    if causal:
        seen = seen & torch.ones(5, 5).tril().bool()
    scores = 3 * torch.randn((3, 2, 5, 5), generator=draw)
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return probabilities, seen & present[:, None, :, None]


def rows_of(probabilities: torch.Tensor, exists: torch.Tensor, heads: range) -> list[list[float]]:
    """The rows that exist, each without the pairs that do not."""
    return [
        [float(p) for p, there in zip(probabilities[text, head, query], exists[text, 0, query], strict=True) if there]
        for head in heads
        for text in range(len(probabilities))
        for query in range(probabilities.shape[2])
        if exists[text, 0, query].any()
    ]


def by_hand(rows: list[list[float]]) -> dict[str, Any]:
    """Every statistic, a row at a time."""
    flat = [value for row in rows for value in row]
    halves, entropies, even = [], [], []
    for row in rows:
        total, taken = math.fsum(row), 0.0
        for count, value in enumerate(sorted(row, reverse=True), start=1):
            taken += value
            if taken >= total / 2:
                halves.append(count)
                break
        entropies.append(-math.fsum(p * math.log(p) for p in row if p))
        if len(row) > 1:
            even.append(entropies[-1] / math.log(len(row)))
    ends = edges().tolist()
    counts = [sum(low <= value and (value < high or high == 1) for value in flat) for low, high in pairwise(ends)]
    return {
        "rows": len(rows),
        "pairs": len(flat),
        "counts": counts,
        "beneath": sum(value < ends[0] for value in flat),
        "sparsity": [sum(value <= limit for value in flat) / len(flat) for limit in LIMITS],
        "lost": [math.fsum(v for v in flat if v <= limit) / math.fsum(flat) for limit in LIMITS],
        "half_mean": statistics.fmean(halves),
        "half_median": statistics.median(halves),
        "entropy": statistics.fmean(entropies),
        "dispersion": statistics.fmean(even),
    }


@pytest.mark.parametrize("causal", [False, True])
def test_statistics_of_rows_that_exist(causal: bool) -> None:
    tally, seen = HeadTally(2, LIMITS), []
    for seed in range(3):
        probabilities, exists = attention(causal, seed)
        tally.update(probabilities, exists)
        seen.append((probabilities, exists))
    for heads in (range(2), range(1), range(1, 2)):
        rows = [row for batch in seen for row in rows_of(*batch, heads)]
        found = tally.summary(slice(heads.start, heads.stop)).to_json()
        expected = by_hand(rows)
        assert {name: found[name] for name in ("rows", "pairs", "counts", "beneath", "half_median")} == {
            name: expected[name] for name in ("rows", "pairs", "counts", "beneath", "half_median")
        }
        for name in ("sparsity", "lost", "half_mean", "entropy", "dispersion"):
            assert found[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


def test_padding_changes_nothing() -> None:
    probabilities, exists = attention(causal=False)
    wide = torch.nn.functional.pad(probabilities, (0, 3, 0, 3))
    padded, plain = HeadTally(2, LIMITS), HeadTally(2, LIMITS)
    padded.update(wide, torch.nn.functional.pad(exists, (0, 3, 0, 3)))
    plain.update(probabilities, exists)
    assert padded.summary() == plain.summary()


def test_modules_together_are_their_rows_together() -> None:
    one, two, both = HeadTally(2, LIMITS), HeadTally(2, LIMITS), HeadTally(2, LIMITS)
    for seed, tally in ((0, one), (1, two)):
        for target in (tally, both):
            target.update(*attention(False, seed))
    found, expected = summarise([(one, slice(None)), (two, slice(None))]).to_json(), both.summary().to_json()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name


def test_a_row_of_one_token_has_no_dispersion() -> None:
    tally = HeadTally(1, LIMITS)
    tally.update(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1).bool())
    found = tally.summary()
    assert (found.dispersion, found.half_mean, found.entropy, found.counts[-1]) == (None, 1.0, 0.0, 1)


def test_nothing_and_nan_are_said() -> None:
    with pytest.raises(InputError, match="saw no token"):
        HeadTally(1, LIMITS).summary()
    with pytest.raises(InputError, match="NaN"):
        HeadTally(1, LIMITS).update(torch.full((1, 1, 1, 1), torch.nan), torch.ones(1, 1, 1, 1).bool())


@given(st.lists(st.floats(0, 1.0000001192092896, width=32), min_size=1))
def test_octaves(values: list[float]) -> None:
    single = np.asarray(values, dtype=np.float32)
    found = bins(torch.from_numpy(single), 1).tolist()
    ends = [2.0**power for power in range(-24, 1)]
    assert edges().tolist() == ends
    assert found == [min(sum(value >= end for end in ends), len(ends) - 1) for value in values]
    # The octaves are those of calibration, whose bins are 16 to one.
    assert found == ((bins(torch.from_numpy(single)) + 15) // 16).tolist()


@given(st.floats(1e-30, 1.0))
def test_thresholds_in_float32(limit: float) -> None:
    found = largest_float32(limit)
    assert float(found) <= limit < float(np.nextafter(found, np.float32(2)))
