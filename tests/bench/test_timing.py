"""Times: percentiles against numpy, turns by hand, rates and ratios by arithmetic."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.bench.clock import HostClock
from qtool.bench.timing import Timing, percentile, rotated, timed_calls


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=40), st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9)


def test_everybody_goes_first_once() -> None:
    orders = [rotated("abc", turn) for turn in range(6)]
    assert ["".join(order) for order in orders] == ["abc", "bca", "cab", "abc", "bca", "cab"]
    assert rotated([], 3) == []


class Engine:
    """Each call of the engine takes `cost` seconds; the clock itself takes none."""

    def __init__(self, cost: dict[str, float]) -> None:
        self.now, self.cost, self.ran = 0.0, cost, ""

    def run(self, feed: str) -> None:
        self.now += self.cost[feed]
        self.ran += feed

    def __call__(self) -> float:
        return self.now


def test_a_turn_lasts_as_long_as_asked_and_its_first_call_is_not_counted() -> None:
    engine = Engine({"a": 0.25})
    assert timed_calls(engine.run, ["a"], 1.0, HostClock(engine)) == [250.0] * 4
    assert engine.ran == "aaaaa"


def test_a_slow_engine_is_called_twice() -> None:
    engine = Engine({"a": 8.0})
    assert timed_calls(engine.run, ["a"], 0.5, HostClock(engine)) == [8000.0, 8000.0]


def test_passes_over_several_batches_are_whole() -> None:
    engine = Engine({"a": 0.25, "b": 0.5})
    assert timed_calls(engine.run, ["a", "b"], 0.8, HostClock(engine)) == [250.0, 500.0, 250.0, 500.0]
    assert engine.ran == "aabab"


def test_rates_ratios_and_spread() -> None:
    slow, fast = Timing([[8.0, 12.0, 10.0], [20.0]]), Timing([[5.0], [4.0, 4.0]])
    assert slow.pass_ms == [10.0, 20.0]
    assert fast.ratios(slow) == [2.0, 5.0]
    assert slow.spread_percent == pytest.approx(100 * 10 / 15)
    assert slow.per_second(3) == pytest.approx(3 * 4 / 0.05)


def test_a_pass_of_several_batches_is_their_sum() -> None:
    timing = Timing([[1.0, 3.0, 1.0, 5.0]], batches=2)
    assert timing.pass_ms == [5.0]
    assert timing.per_second(64) == pytest.approx(2 * 64 / 0.010)
