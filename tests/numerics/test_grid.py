"""Grid against exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.numerics.grid import Grid

NUMBERS = st.floats(-1e6, 1e6, allow_subnormal=False)


@given(low=NUMBERS, high=NUMBERS, bits=st.integers(2, 31), centered=st.booleans())
def test_covering_is_the_finest_grid_that_reaches_both_ends(low: float, high: float, bits: int, centered: bool) -> None:
    low, high = sorted((low, high))
    grid = Grid.covering(low, high, bits, centered=centered)
    center = (Fraction(low) + Fraction(high)) / 2 if centered else Fraction(0)
    reach = max(abs(Fraction(low) - center), abs(Fraction(high) - center))
    assert grid.bits == bits and grid.limit == 2 ** (bits - 1) - 1 and not grid.unsigned
    assert float(grid.center) == pytest.approx(float(center), rel=1e-15, abs=1e-12)
    if reach > 1e-6:
        assert float(grid.unit) * grid.limit == pytest.approx(float(reach), rel=1e-9)
    assert float(grid.unit) > 0


@pytest.mark.parametrize("centered", [False, True])
def test_a_range_of_one_point_has_a_grid_that_holds_it(centered: bool) -> None:
    assert Grid.covering(0.0, 0.0, 8, centered=centered) == Grid(1.0, 8, 0.0)
    grid = Grid.covering(3.0, 3.0, 8, centered=centered)
    at = 0 if centered else grid.limit
    assert grid.real(torch.tensor([at])).item() == pytest.approx(3.0)


def test_a_range_on_one_side_of_zero_reaches_to_its_far_end() -> None:
    assert Grid.covering(2.0, 127.0, 8) == Grid(1.0, 8, 0.0)
    assert Grid.covering(-127.0, -2.0, 8) == Grid(1.0, 8, 0.0)
    assert Grid.covering(0.0, 254.0, 8, centered=True) == Grid(1.0, 8, 127.0)


def test_real_numbers_are_float64_a_channel_at_a_time() -> None:
    unit, center = torch.tensor([0.5, 2.0**-30], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = Grid(unit, 24, center).real(torch.tensor([[3, 2**23 - 1], [-4, 1]], dtype=torch.int32))
    assert found.dtype == torch.float64
    assert found.tolist() == [[1.5, 1 + (2**23 - 1) / 2**30], [-2.0, 1 + 2**-30]]


@pytest.mark.parametrize(("bits", "limit"), [(2, 1), (8, 127), (16, 32767), (24, 8388607), (31, 2**30 - 1)])
def test_limit_is_that_of_a_symmetric_range(bits: int, limit: int) -> None:
    assert Grid(1.0, bits).limit == limit
