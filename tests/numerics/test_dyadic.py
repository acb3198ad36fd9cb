"""Dyadic: the golden vectors of the integer arithmetic, and exact Python integers and rationals."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.errors import InputError
from qtool.numerics import Dyadic

LIMIT = 2**31 - 1
ACCUMULATORS = st.sampled_from([-LIMIT, -LIMIT + 1, -1, 0, 1, LIMIT - 1, LIMIT]) | st.integers(-LIMIT, LIMIT)
MULTIPLIERS = st.tuples(st.sampled_from([2**30, LIMIT]) | st.integers(2**30, LIMIT), st.sampled_from([-1, 0, 1])).map(
    math.prod
)
SHIFTS = st.sampled_from([1, 2, 61, 62]) | st.integers(1, 62)

GOLDEN = [
    (0.5, 1073741824, 31, (500002, -500001, 0, 3)),
    (0.1, 1717986918, 34, (100000, -100000, 0, 0)),
    (1 / 3, 1431655765, 32, (333334, -333334, 0, 2)),
    (3.7, 1986422374, 29, (3700011, -3700011, -4, 18)),
    (-0.02, -1374389535, 36, (-20000, 20000, 0, 0)),
    (1 - 1e-12, 1073741824, 30, (1000003, -1000003, -1, 5)),
]
GOLDEN_ACCUMULATORS = (1000003, -1000003, -1, 5)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def half_up(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))


@pytest.mark.parametrize(("ratio", "multiplier", "shift", "results"), GOLDEN)
def test_golden_vectors(ratio: float, multiplier: int, shift: int, results: tuple[int, ...]) -> None:
    dyadic = Dyadic.from_float(ratio)
    assert (dyadic.multiplier.item(), dyadic.shift.item()) == (multiplier, shift)
    assert dyadic.requantize(int32(*GOLDEN_ACCUMULATORS)).tolist() == list(results)


def test_golden_vectors_at_once() -> None:
    dyadic = Dyadic.from_float(torch.tensor([row[0] for row in GOLDEN], dtype=torch.float64))
    assert dyadic.multiplier.tolist() == [row[1] for row in GOLDEN]
    found = dyadic.requantize(int32(*GOLDEN_ACCUMULATORS)[:, None])
    assert found.dtype == torch.int64
    assert found.t().tolist() == [list(row[3]) for row in GOLDEN]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(ACCUMULATORS, MULTIPLIERS, SHIFTS), min_size=1, max_size=20))
def test_requantize_is_exact(cases: list[tuple[int, int, int]]) -> None:
    accumulators, multipliers, shifts = (list(column) for column in zip(*cases, strict=True))
    dyadic = Dyadic(int32(*multipliers), int32(*shifts))
    exact = [Fraction(acc * multiplier, 2**shift) for acc, multiplier, shift in cases]
    for dtype in (torch.int32, torch.int64):
        found = dyadic.requantize(torch.tensor(accumulators, dtype=dtype)).tolist()
        assert found == [half_up(value) for value in exact]
    clipped = dyadic.requantize(torch.tensor(accumulators), qmin=-127, qmax=127)
    assert clipped.dtype == torch.int32
    assert clipped.tolist() == [max(-127, min(127, half_up(value))) for value in exact]


@settings(deadline=None, max_examples=300)
@given(st.floats(-(2**30) * 0.999, 2**30 * 0.999) | st.floats(-1e-3, 1e-3))
def test_from_float_is_the_nearest_of_31_bits(ratio: float) -> None:
    dyadic = Dyadic.from_float(ratio)
    value = Fraction(int(dyadic.multiplier), 2 ** int(dyadic.shift))
    assert Fraction(dyadic.to_float().item()) == value
    if value:
        assert abs(value - Fraction(ratio)) <= abs(Fraction(ratio)) / 2**31
    else:
        assert half_up(LIMIT * Fraction(ratio)) == half_up(-LIMIT * Fraction(ratio)) == 0
        assert dyadic.shift.item() == 1


@pytest.mark.parametrize("ratio", [0.0, -0.0, 5e-324, 2.0**-33, -(2.0**-33)])
def test_ratios_that_rescale_everything_to_zero(ratio: float) -> None:
    dyadic = Dyadic.from_float(ratio)
    assert (dyadic.multiplier.item(), dyadic.shift.item()) == (0, 1)
    assert dyadic.requantize(int32(LIMIT, -LIMIT)).tolist() == [0, 0]


@pytest.mark.parametrize("ratio", [2.0**-32, 2.0**30 - 1])
def test_the_ends_of_the_range_are_kept(ratio: float) -> None:
    assert Dyadic.from_float(ratio).to_float().item() == pytest.approx(ratio, rel=2**-31)


@pytest.mark.parametrize("ratio", [2.0**30, -(2.0**30), 1e300, math.inf, -math.inf, math.nan, 2.0**30 * (1 - 2**-50)])
def test_ratios_that_mean_a_wrong_scale_are_refused(ratio: float) -> None:
    with pytest.raises(InputError, match="a scale is wrong"):
        Dyadic.from_float(torch.tensor([0.5, ratio], dtype=torch.float64))


def test_multipliers_broadcast_over_rows() -> None:
    acc = torch.arange(-6, 6, dtype=torch.int32).view(4, 3)
    ratios = torch.tensor([0.5, 0.25, 3.0])
    found = Dyadic.from_float(ratios).requantize(acc, qmin=-4, qmax=4)
    expected = [
        [max(-4, min(4, half_up(a * Fraction(r)))) for a, r in zip(row, ratios.tolist(), strict=True)]
        for row in acc.tolist()
    ]
    assert found.tolist() == expected


def test_one_sided_clipping_stays_int64() -> None:
    found = Dyadic.from_float(4.0).requantize(int32(LIMIT, -5), qmin=0)
    assert found.dtype == torch.int64
    assert found.tolist() == [4 * LIMIT, 0]


@pytest.mark.parametrize(
    ("multiplier", "shift"),
    [(2**30 - 1, 5), (-(2**31), 5), (1, 5), (2**30, 0), (2**30, 63), (0, 0)],
)
def test_numbers_out_of_range_are_refused(multiplier: int, shift: int) -> None:
    with pytest.raises(InputError, match="multiplier of 0 or"):
        Dyadic(int32(multiplier), int32(shift))


def test_other_types_and_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="int32 tensors of one shape"):
        Dyadic(int32(2**30), torch.tensor([1]))
    with pytest.raises(InputError, match="int32 tensors of one shape"):
        Dyadic(int32(2**30, 2**30), int32(1))


def test_accumulators_out_of_contract_are_bugs() -> None:
    dyadic = Dyadic.from_float(0.5)
    for acc in (2**31, -(2**31)):
        with pytest.raises(OverflowError, match=r"\|acc\| < 2\^31"):
            dyadic.requantize(torch.tensor([0, acc]))
    with pytest.raises(TypeError, match="integer accumulator"):
        dyadic.requantize(torch.tensor([1.0]))
    assert dyadic.requantize(torch.empty(0, dtype=torch.int64)).tolist() == []


def test_empty_modules_can_be_built_without_data() -> None:
    empty = torch.empty(3, dtype=torch.int32, device="meta")
    assert Dyadic(empty, empty).requantize(torch.empty(2, 3, dtype=torch.int32, device="meta")).shape == (2, 3)
