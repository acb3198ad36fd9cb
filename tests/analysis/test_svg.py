"""Scales, ticks and numbers as people read them."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.analysis.svg import Scale, number, padded, percent, power, short, size, threshold


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.001, "0.001"), (3e-4, "0.0003"), (1e-4, "0.0001"), (1e-5, "10⁻⁵"), (2.5e-6, "2.5×10⁻⁶"), (0.25, "0.25")],
)
def test_thresholds(value: float, shown: str) -> None:
    assert threshold(value) == shown


def test_numbers() -> None:
    assert number(-1234.567) == "−1,234.57"
    assert number(-0.001, signed=True) == "0.00"
    assert number(0.125, 1, signed=True) == "+0.1"
    assert (number(None), number(math.nan), number(math.inf), number(-math.inf)) == ("–", "–", "∞", "−∞")
    assert percent(0.4816) == "48.2\N{NO-BREAK SPACE}%"
    assert (power(1e-7), power(10.0), power(1.0)) == ("10⁻⁷", "10¹", "10⁰")
    assert (short(-2.5), short(0.0), short(12000.0), short(3e6)) == ("−2.5", "0", "12,000", "3×10⁶")
    assert (size(3.0), size(2.50), size(-0.125)) == ("3", "2.5", "-0.12")


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_inside_even_and_few(low: float, width: float, wanted: int) -> None:
    ticks = Scale(low, low + width, 0, 1).ticks(wanted)
    room = 1e-6 * (abs(low) + width)
    assert all(low - room <= tick <= low + width + room for tick in ticks)
    assert 1 <= len(ticks) <= wanted + 1
    steps = [after - before for before, after in pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3) if steps else True


def test_logarithmic_scales() -> None:
    scale = Scale(1e-6, 1.0, 0.0, 60.0, logarithmic=True)
    assert [scale(10.0**-k) for k in range(7)] == pytest.approx([60, 50, 40, 30, 20, 10, 0])
    assert scale.ticks(6) == pytest.approx([10.0**k for k in range(-6, 1)])
    assert Scale(18, 60, 0, 1, logarithmic=True).ticks() == [20, 50]
    assert scale.clipped(5.0) == 60.0


def test_room_around_values() -> None:
    assert padded([88.0, 89.0], least=4.0) == (86.5, 90.5)
    low, high = padded([3.0, 3.0])
    assert low < 3.0 < high
