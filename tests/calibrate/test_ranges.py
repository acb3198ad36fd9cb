"""Ranges from histograms against the raw values that went into them."""

from typing import Any

import numpy as np
import pytest
import torch

from qtool.calibrate import ranges
from qtool.calibrate.observers import Channels, Histogram, State

DRAWS = {
    "normal": lambda draw: draw.normal(size=(3989, 4)) * [1.0, 0.01, 30.0, 1e4],
    "heavy tails": lambda draw: draw.standard_t(2, size=(3989, 4)) * [1.0, 0.3, 5.0, 1e-3],
    "one sided": lambda draw: draw.gamma(0.5, size=(3989, 4)) * [1.0, 7.0, -2.0, 100.0],
    "few": lambda draw: draw.uniform(-1, 1, size=(3, 4)),
}


@pytest.fixture(params=DRAWS)
def raw(request: pytest.FixtureRequest) -> Any:
    """float64 copies of float32 values `[tokens, channels]`."""
    return DRAWS[request.param](np.random.default_rng(1)).astype(np.float32).astype(np.float64)


def histogram(raw: Any) -> State:
    observer = Histogram()
    for part in torch.from_numpy(raw).float().split(700):
        observer.update(part)
    return observer.state()


def channels(raw: Any) -> State:
    observer = Channels()
    observer.update(torch.from_numpy(raw).float())
    return observer.state()


def test_the_peak_is_the_largest_magnitude(raw: Any) -> None:
    largest = np.abs(raw).max(0)
    exact, state = ranges.peak(channels(raw)), histogram(raw)
    assert exact.dtype == torch.float64
    np.testing.assert_array_equal(exact.numpy(), largest)
    above = ranges.peak(state).numpy() - largest
    assert (above > 0).all() and (above <= state["width"].numpy()).all(), "a bin's upper edge"


def test_the_peak_of_zeros_is_zero_and_of_one_side_its_magnitude() -> None:
    raw = np.array([[0.0, -3.0, 2.0], [0.0, -1.0, 0.5]])
    assert ranges.peak(channels(raw)).tolist() == [0.0, 3.0, 2.0]
    assert ranges.peak(histogram(np.zeros((3, 1)))).item() < 1e-35


@pytest.mark.parametrize("share", [50.1, 90.0, 99.0, 99.9, 99.99, 100.0])
def test_a_percentile_is_the_magnitude_that_enough_values_stay_below(raw: Any, share: float) -> None:
    """numpy's `inverted_cdf`: the least value that at least so many are not above. Here: the end of its bin."""
    state = histogram(raw)
    exact = np.percentile(np.abs(raw), share, axis=0, method="inverted_cdf")
    above = ranges.percentile(state, share).numpy() - exact
    assert (above > 0).all() and (above <= state["width"].numpy()).all()


def test_all_of_the_values_end_at_the_peak(raw: Any) -> None:
    state = histogram(raw)
    assert torch.equal(ranges.percentile(state, 100.0), ranges.peak(state))


def rounding_error(raw: Any, clip: Any, qmax: int) -> Any:
    """Mean squared error of each channel, rounded to ±qmax steps of clip / qmax."""
    step = clip / qmax
    rounded = np.clip(np.floor(np.abs(raw) / step + 0.5), 0, qmax) * step
    return np.square(np.abs(raw) - rounded).mean(0)


@pytest.mark.parametrize("qmax", [7, 15])
def test_least_squares_is_the_best_of_all_clip_points(raw: Any, qmax: int) -> None:
    """Where steps are much wider than bins: the error is within 3 % of what any clip point reaches on the raw values,
    and, where clipping pays, far below the peak's."""
    found = ranges.least_squares(histogram(raw), qmax).numpy()
    top = np.abs(raw).max(0)
    tried = [rounding_error(raw, share * top, qmax) for share in np.linspace(0.2, 1.0, 801)]
    if len(raw) > 3:  # with three values a clip point exists that rounds them by luck
        assert (rounding_error(raw, found, qmax) <= 1.03 * np.min(tried, axis=0)).all()
    assert (found >= 0.2 * top).all()
    assert (found <= top + histogram(raw)["width"].numpy()).all()


def test_least_squares_clips_outliers_and_keeps_what_is_even() -> None:
    draw = np.random.default_rng(0)
    raw = np.stack([draw.normal(size=20000), draw.uniform(-1, 1, size=20000)], 1)
    raw[0, 0] = 12.0
    found = ranges.least_squares(histogram(raw), 7).numpy()
    assert found[0] < 4.5
    # The last step rounds values up to half a step beyond it: 7.5 / 7 of the clip point is the largest value.
    assert found[1] == pytest.approx(7 / 7.5, abs=0.011)


def test_merged_is_the_histogram_of_all_divided_values(raw: Any) -> None:
    division = torch.tensor([1.0, 0.37, 2.5, 11.0], dtype=torch.float64)
    state = histogram(raw)
    merged = ranges.merged(state, division)
    counts, (width,) = merged["counts"], merged["width"].tolist()
    assert counts.shape == (1, Histogram.BINS) and int(counts.sum()) == raw.size
    assert merged["tokens"] == len(raw)
    values = np.sort((np.abs(raw) / division.numpy()).flatten())
    # A value moves by no more than half its old bin and one new one.
    slack = width + float((state["width"].double() / division).max())
    assert ranges.peak(merged).item() == pytest.approx(values[-1], abs=slack)
    below = counts[0].cumsum(0).numpy()
    ends = width * np.arange(1, Histogram.BINS + 1)
    assert (below >= np.searchsorted(values, ends - slack)).all()
    assert (below <= np.searchsorted(values, ends + slack)).all()
    for share in (90.0, 99.9):
        exact = np.percentile(values, share, method="inverted_cdf")
        assert ranges.percentile(merged, share).item() == pytest.approx(exact, abs=slack)


def test_merging_zeros() -> None:
    merged = ranges.merged(histogram(np.zeros((5, 2))), torch.ones(2))
    assert int(merged["counts"].sum()) == 10
    assert ranges.percentile(merged, 99.0).item() < 1e-30
