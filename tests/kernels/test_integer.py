"""The integer operations against exact Python integers, float64 mathematics and golden values.

The functions `exact_*` are the formulas of docs/math.md in Python's own integers, which do not overflow; comparisons
with them are by `==`. Bounds on the distance to real arithmetic are those that docs/math.md states, by equation number.
"""

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_FLOOR, Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils._python_dispatch import TorchDispatchMode

from qtool.kernels import reference
from qtool.kernels.reference import (
    Rescale,
    SaturationMeter,
    bit_length,
    counting_saturation,
    exp_constants,
    integer_attention,
    integer_exp,
    integer_gelu,
    integer_linear,
    integer_norm,
    integer_softmax,
    integer_tanh,
    isqrt,
    operand,
    quantize_rows,
    saturate,
    shift_round,
)
from qtool.numerics import Dyadic

GRIDS = range(6, 13)
"""What the recipe's `scores_grid` may be."""
CODES = st.one_of(st.integers(-127, 127), st.sampled_from([-127, 127, 0]))
Dyadics = list[tuple[int, int]]


# The formulas in Python integers


def half_up(value: int, places: int) -> int:
    """floor(value / 2^places + 1/2)."""
    return (2 * value + (1 << places)) // (2 << places)


def clipped(value: int, bits: int) -> int:
    limit = (1 << (bits - 1)) - 1
    return max(-limit, min(limit, value))


def sign(value: int) -> int:
    return (value > 0) - (value < 0)


def exact_gelu(q: int, root: int, one: int, pre_shift: int) -> int:
    missing = root - min(abs(q), root)
    return q * half_up(sign(q) * (one - missing**2) + one, pre_shift)


def exact_exp(distance: int, grid: int) -> int:
    """Exact for any width; octaves from 30 on are zero."""
    b, c = exp_constants(grid)
    octave, rest = divmod(distance, 2**grid)
    return ((b - rest) ** 2 + c) // 2**octave if octave < 30 else 0


def exact_softmax(scores: Sequence[int], allowed: Sequence[bool], grid: int, bits: int) -> list[int]:
    kept = [score for score, may in zip(scores, allowed, strict=True) if may]
    if not kept:
        return [0] * len(scores)
    powers = [exact_exp(max(kept) - score, grid) if may else 0 for score, may in zip(scores, allowed, strict=True)]
    reciprocal = 2**46 // sum(powers)
    return [min(half_up(power * reciprocal, 46 - bits), 2**bits - 1) for power in powers]


def exact_tanh(q: int, grid: int) -> int:
    one, power = exact_exp(0, grid), exact_exp(2 * abs(q), grid)
    return sign(q) * min((2 * (one - power) * 2**15 + one + power) // (2 * (one + power)), 2**15 - 1)


def exact_row(row: Sequence[int], unsigned: bool) -> tuple[list[int], int]:
    """Codes by the reciprocal of the largest magnitude, and that magnitude."""
    amax = max(1, *(abs(value) for value in row))
    places = amax.bit_length() + 22
    factor = (254 if unsigned else 127) * 2**places // amax
    return [half_up(value * factor, places) - 127 * unsigned for value in row], amax


def exact_linear(
    codes: Sequence[Sequence[int]],
    amax: Sequence[int] | None,
    weight: Sequence[Sequence[int]],
    unsigned: bool,
    align: int,
    bias: Sequence[int],
    to_output: Dyadics,
    bits: int,
) -> list[list[int]]:
    result: list[list[int]] = []
    for token, row in enumerate(codes):
        result.append([])
        for weights, offset, (m, s) in zip(weight, bias, to_output, strict=True):
            total = sum((code + 127 * unsigned) * w for code, w in zip(row, weights, strict=True))
            if amax is not None:
                total = half_up(total * amax[token], align)
            result[-1].append(clipped(half_up((total + offset) * m, s), bits))
    return result


def exact_normal(row: Sequence[int], eps: int) -> list[int]:
    """(q - mean) / (deviation · √n) in units of 2^-30."""
    n = len(row)
    mean = math.floor(Fraction(sum(row), n) + Fraction(1, 2))
    variance = sum((value - mean) ** 2 for value in row) + eps
    extra = max(0, min(15, (60 - variance.bit_length()) // 2))
    inverse = 2 ** (46 + extra) // max(1, math.isqrt(variance * 4**extra))
    return [half_up((value - mean) * inverse, 16) for value in row]


def exact_norm(row: Sequence[int], eps: int, to_output: Dyadics, bias: Sequence[int], bits: int) -> list[int]:
    normal = exact_normal(row, eps)
    return [
        clipped(half_up(y * m, s) + offset, bits) for y, (m, s), offset in zip(normal, to_output, bias, strict=True)
    ]


def exact_attention(
    query: Any,
    key: Any,
    value: Any,
    real: Any,
    align: int,
    to_scores: Dyadics,
    to_context: list[Dyadics],
    grid: int,
    bits: int,
    context_bits: int,
) -> Any:
    """Arrays of Python integers `[batch, tokens, heads, size]`."""
    batch, tokens, heads, size = query.shape
    result = np.zeros(query.shape, dtype=object)
    for b, t, h in np.ndindex(batch, tokens, heads):
        codes, amax = exact_row(query[b, t, h].tolist(), False)
        scores = []
        for other in range(tokens):
            product = sum(code * int(k) for code, k in zip(codes, key[b, other, h], strict=True))
            scores.append(clipped(half_up(half_up(product * amax, align) * to_scores[h][0], to_scores[h][1]), 24))
        weights = exact_softmax(scores, real[b].tolist(), grid, bits)
        for channel in range(size):
            total = sum(weight * int(value[b, other, h, channel]) for other, weight in enumerate(weights))
            m, s = to_context[h][channel]
            result[b, t, h, channel] = clipped(half_up(total * m, s), context_bits)
    return result.reshape(batch, tokens, heads * size)


# What tests are made of


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def long(value: int) -> torch.Tensor:
    return torch.tensor(value)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_ints(limit: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.randint(-limit, limit + 1, shape, generator=generator(seed), dtype=dtype)


def dyadic(ratio: float | torch.Tensor, *shape: int) -> Rescale:
    """The operations' way to give a ratio, one a channel of `shape`."""
    number = Dyadic.from_float(torch.as_tensor(ratio, dtype=torch.float64).expand(shape))
    return number.multiplier, number.shift


def pairs(numbers: Rescale) -> Dyadics:
    return list(zip(numbers[0].flatten().tolist(), numbers[1].flatten().tolist(), strict=True))


def unity(n: int) -> Rescale:
    """1, so that nothing is rounded."""
    return torch.full((n,), 1 << 30, dtype=torch.int32), torch.full((n,), 30, dtype=torch.int32)


def none(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32)


@st.composite
def dyadics(draw: st.DrawFn, count: int) -> Rescale:
    """Any dyadic numbers: zero, both signs, the ends of both ranges."""
    magnitude = st.one_of(st.integers(2**30, 2**31 - 1), st.sampled_from([0, 2**30, 2**31 - 1]))
    shift = st.one_of(st.integers(1, 62), st.integers(28, 40))
    numbers = [(draw(magnitude) * draw(st.sampled_from([1, -1])), draw(shift)) for _ in range(count)]
    return ints(*(m for m, _ in numbers)), ints(*(s for _, s in numbers))


@st.composite
def integer_rows(draw: st.DrawFn, limit: int, low: int | None = None) -> Any:
    """int32 `[rows, n]`: random, constant, one-hot, all at the extremes, extremes of both signs."""
    rows, n = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    low = -limit if low is None else low
    anything = st.one_of(st.integers(low, limit), st.sampled_from([low, limit]), st.integers(max(low, -3), 3))
    found = draw(arrays(np.int32, (rows, n), elements=anything))
    match draw(st.sampled_from(["any", "any", "constant", "one-hot"])):
        case "constant":
            found[:] = found[:, :1]
        case "one-hot":
            found[:, 1:] = 0
    return found


# Widths


@given(st.lists(st.integers(-(2**62), 2**62), max_size=5), st.integers(2, 32))
def test_saturation_is_symmetric(values: list[int], bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    values += [limit, limit + 1, -limit, -limit - 1, 0]
    found = saturate(torch.tensor(values), bits)
    assert found.dtype == torch.int32
    assert found.tolist() == [clipped(value, bits) for value in values]


def test_saturation_is_counted_by_site() -> None:
    """Two tokens, one of them padding: its row never counts, nor that of any head."""
    meter, real = SaturationMeter(), torch.tensor([[True, False]])
    saturate(ints(500), 8)
    with counting_saturation(meter):
        meter.site = "one"
        saturate(torch.tensor([[127, -127, 128, -128, 0], [500, 500, 500, 500, 500]]), 8)
        saturate(torch.tensor([[1 << 22, -5], [0, 0]]), 22)
        meter.end_batch(real)
        meter.site = "two"
        for head in ([[1, 2], [3, 3]], [[-1, 0], [3, 0]]):  # in pieces, as attention works
            saturate(torch.tensor([head]), 2)
        with counting_saturation(SaturationMeter()):
            saturate(ints(9, 9), 2)
        meter.end_batch(real)
        meter.site = "one"
        saturate(torch.tensor([[200]]), 8)  # one row a text
        meter.end_batch(real)
    saturate(ints(500), 8)
    assert meter.counts == {"one": (4, 8), "two": (1, 4)}


def test_counting_ends_with_an_error() -> None:
    meter = SaturationMeter()
    with pytest.raises(KeyError), counting_saturation(meter):
        raise KeyError
    saturate(ints(500), 8)
    assert meter.counts == {}


@given(st.lists(st.integers(0, 2**63 - 1), max_size=8))
def test_bit_length_is_pythons(values: list[int]) -> None:
    values += [edge + step for power in range(63) for edge in (2**power,) for step in (-1, 0)] + [2**63 - 1]
    assert bit_length(torch.tensor(values)).tolist() == [value.bit_length() for value in values]


def test_bit_length_keeps_the_shape() -> None:
    assert bit_length(torch.tensor([[[5]], [[0]]])).tolist() == [[[3]], [[0]]]


@given(
    st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=5),
    st.one_of(st.integers(0, 40), st.sampled_from([0, 1])),
)
def test_shifts_round_half_up(values: list[int], places: int) -> None:
    values += [sign * (half + step) for sign in (1, -1) for half in ((1 << places) // 2,) for step in (-1, 0, 1)]
    wanted = [math.floor(Fraction(value, 2**places) + Fraction(1, 2)) for value in values]
    x = torch.tensor(values)
    for by in (places, torch.tensor(places), ints(places), torch.full((len(values),), places)):
        found = shift_round(x, by)
        assert found.dtype == torch.int64 and found.tolist() == wanted
    assert x.tolist() == values


# The square root (math.md, 7)


def test_published_square_roots() -> None:
    given = [1, 2, 3, 4, 15, 16, 2**31 - 1, 2**32, 2**52 - 1, 2**62 - 1]
    assert isqrt(torch.tensor(given)).tolist() == [1, 1, 1, 2, 3, 4, 46340, 65536, 67108863, 2**31 - 1]


def test_the_root_of_zero() -> None:
    assert isqrt(torch.tensor([0])).tolist() == [0]
    assert isqrt(torch.tensor([[0], [9]])).tolist() == [[0], [3]]


def test_small_square_roots() -> None:
    values = list(range(1, 20_000))
    assert isqrt(torch.tensor(values)).tolist() == [math.isqrt(value) for value in values]


def test_square_roots_where_newtons_method_may_stop_early_or_swing() -> None:
    roots = torch.randint(1, 2**31, (3000,), generator=generator()).tolist()
    roots += [2**power + step for power in range(1, 31) for step in (-1, 0, 1)] + [2**31 - 1]
    values = [root * root + step for root in roots for step in (-1, 0, 1, root, 2 * root)]
    values += [2**power + step for power in range(1, 62) for step in (-1, 0, 1)]
    values = [value for value in values if 0 < value < 2**62]
    assert isqrt(torch.tensor(values)).tolist() == [math.isqrt(value) for value in values]


@given(st.lists(st.integers(1, 2**62 - 1), min_size=1, max_size=40))
def test_square_roots(values: list[int]) -> None:
    assert isqrt(torch.tensor(values)).tolist() == [math.isqrt(value) for value in values]


# Token-wise INT8 (math.md, 3)


@given(integer_rows(2**31 - 1), st.booleans())
def test_codes_of_a_row_are_the_nearest(rows: Any, unsigned: bool) -> None:
    rows = np.abs(rows) if unsigned else rows
    codes, amax = quantize_rows(torch.from_numpy(rows), unsigned=unsigned)
    assert codes.dtype == torch.int8 and amax.dtype == torch.int64 and amax.shape == (len(rows), 1)
    near = Fraction(1, 2**22)
    for row, found, (top,) in zip(rows.tolist(), codes.tolist(), amax.tolist(), strict=True):
        assert (found, top) == exact_row(row, unsigned)
        for value, code in zip(row, found, strict=True):
            wanted = Fraction(value * (254 if unsigned else 127), top) - (127 if unsigned else 0)
            assert abs(code) <= 127 and abs(code - wanted) <= Fraction(1, 2) + near  # (3.3)
            rounded = math.floor(wanted + Fraction(1, 2))
            if abs(wanted + Fraction(1, 2) - round(wanted + Fraction(1, 2))) > near:
                assert code == rounded == (2 * value * (254 if unsigned else 127) + top) // (2 * top) - 127 * unsigned


@pytest.mark.parametrize("bits", [2, 8, 16, 22, 24, 32])
def test_the_largest_of_a_row_gets_the_largest_code(bits: int) -> None:
    limit = 2 ** (bits - 1) - 1
    tops = torch.randint(1, limit + 1, (200,), generator=generator(), dtype=torch.int32)
    tops[0] = limit
    codes, amax = quantize_rows(torch.stack([tops, -tops, torch.zeros_like(tops)], -1))
    assert codes.tolist() == [[127, -127, 0]] * 200 and torch.equal(amax[:, 0], tops.long())
    codes, _ = quantize_rows(torch.stack([tops, torch.zeros_like(tops)], -1), unsigned=True)
    assert codes.tolist() == [[127, -127]] * 200


@pytest.mark.parametrize("levels", [127, 254])
def test_codes_beside_ties_are_the_nearest(levels: int) -> None:
    """In rows of 22 bits no value is nearer to a tie than the reciprocal is exact; an odd amax has no ties."""
    half = levels - 127
    for amax in (2**21 - 1, 2**20 + 1, 1_234_567, 4097, 129):
        ties = [(2 * code + 1) * amax // (2 * levels) for code in range(half - 127, 127 + half)]
        row = [amax, *ties, *(tie + 1 for tie in ties)]
        codes, _ = quantize_rows(ints(*row), unsigned=levels == 254)
        assert codes.tolist() == [(2 * levels * value + amax) // (2 * amax) - half for value in row]


def test_rows_of_zeros_get_codes_of_zero() -> None:
    codes, amax = quantize_rows(torch.zeros(2, 3, dtype=torch.int32))
    assert codes.tolist() == [[0, 0, 0]] * 2 and amax.tolist() == [[1], [1]]
    codes, amax = quantize_rows(torch.zeros(1, 3, dtype=torch.int32), unsigned=True)
    assert codes.tolist() == [[-127] * 3] and amax.tolist() == [[1]]


def test_rows_do_not_depend_on_each_other() -> None:
    x = random_ints(2**21, 2, 5, 3, 7)
    codes, amax = quantize_rows(x)
    assert codes.shape == x.shape and amax.shape == (2, 5, 3, 1)
    for at in np.ndindex(2, 5, 3):
        assert (codes[at].tolist(), amax[at].item()) == exact_row(x[at].tolist(), False)


# i-GELU (math.md, 5)


def gelu_constants(unit: float) -> tuple[int, int]:
    return math.floor(1.769 / (unit / math.sqrt(2))), round(1 / (0.2888 * unit * unit / 2))


def test_golden_gelu() -> None:
    assert gelu_constants(2.0**-8) == (640, 453850)
    found = integer_gelu(ints(-2047, -768, -256, -1, 0, 1, 256, 600, 2047), long(640), long(453850), 0)
    assert found.dtype == torch.int64
    assert found.tolist() == [0, 0, -37748736, -408321, 0, 499379, 194622464, 543660000, 1858061900]


@given(st.lists(st.integers(-(2**15), 2**15), min_size=1), st.integers(4, 16), st.floats(1, 64), st.integers(0, 20))
def test_gelu_is_exact(values: list[int], bits: int, reach: float, pre_shift: int) -> None:
    limit = 2 ** (bits - 1) - 1
    root, one = gelu_constants(reach / limit)
    values = [clipped(value, bits) for value in values] + [limit, -limit, 0, 1, -1]
    for places in (pre_shift, long(pre_shift)):
        found = integer_gelu(torch.tensor(values, dtype=torch.int32), long(root), long(one), places)
        assert found.tolist() == [exact_gelu(value, root, one, pre_shift) for value in values]


@pytest.mark.parametrize(
    ("bits", "bounds"),
    [
        (8, {4: 0.0189, 8: 0.0207, 16: 0.0255, 32: 0.0453}),
        (10, {4: 0.0185, 8: 0.0189, 16: 0.0201, 32: 0.0220}),
        (12, {4: 0.0183, 8: 0.0183, 16: 0.0186, 32: 0.0187}),
        (14, {4: 0.0183, 8: 0.0183, 16: 0.0187, 32: 0.0187}),
    ],
)
def test_gelu_is_near_gelu(bits: int, bounds: dict[int, float]) -> None:
    limit = 2 ** (bits - 1) - 1
    q = torch.arange(-limit, limit + 1, dtype=torch.int32)
    for reach, bound in bounds.items():
        unit = reach / limit
        root, one = gelu_constants(unit)
        pre_shift = max(0, (2 * one * limit).bit_length() - 30)
        product = integer_gelu(q, long(root), long(one), pre_shift)
        assert (product.abs() < 2**31).all()
        x = q.double() * unit
        wanted = x / 2 * (1 + torch.erf(x / math.sqrt(2)))
        scale = unit * 0.2888 * unit * unit / 2 * 2**pre_shift / 2
        error = (product.double() * scale - wanted).abs().max().item()
        assert 0.017 < error <= bound  # (5.5); a polynomial that is nearer is not the paper's
        assert (product[x < -3] == 0).all()


# i-exp (math.md, 4)


@pytest.mark.parametrize("grid", range(4, 15))
def test_constants_of_exp_are_rounded_half_up(grid: int) -> None:
    with localcontext() as context:
        context.prec = 50
        unit = Decimal(2).ln() / 2**grid
        a, b, c = Decimal("0.35815147"), Decimal("1.3536624322664372"), Decimal("0.3437225370424528")
        wanted = [int((x + Decimal("0.5")).to_integral_value(ROUND_FLOOR)) for x in (b / unit, c / (a * unit**2))]
    assert list(exp_constants(grid)) == wanted


def test_golden_exp() -> None:
    assert exp_constants(10) == (2000, 2094548) and exp_constants(8) == (500, 130909)
    found = integer_exp(ints(0, 1, 512, 1023, 1024, 3089, 20480), 10)
    assert found.tolist() == [6094548, 6090549, 4308692, 3049077, 3047274, 753354, 5]
    assert integer_exp(ints(0, 128, 256, 785), 8).tolist() == [380909, 269293, 190454, 45524]


@pytest.mark.parametrize("grid", [6, 10, 14])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_exp_is_exact_over_all_octaves(grid: int, dtype: torch.dtype) -> None:
    distances = list(range(0, 33 << grid, max(1, 1 << (grid - 6))))
    distances += [(octave << grid) + step for octave in range(1, 33) for step in (-1, 0, 1)] + [2**31 - 1]
    found = integer_exp(torch.tensor(distances, dtype=dtype), grid)
    assert found.dtype == dtype
    assert found.tolist() == [exact_exp(distance, grid) for distance in distances]


@given(st.lists(st.integers(0, 2**40), min_size=1), st.integers(4, 14))
def test_exp_is_exact(distances: list[int], grid: int) -> None:
    assert integer_exp(torch.tensor(distances), grid).tolist() == [exact_exp(d, grid) for d in distances]


@pytest.mark.parametrize("grid", GRIDS)
def test_exp_is_near_exp_and_never_rises(grid: int) -> None:
    unit = math.log(2) / 2**grid
    distance = torch.arange(0, 32 << grid, dtype=torch.int32)
    found = integer_exp(distance, grid)
    wanted = torch.exp(-distance.double() * unit)
    assert ((found.double() * 0.35815147 * unit * unit - wanted).abs() <= 2.05e-3).all()  # (4.4)
    ratio = found.double() / found[0] / wanted - 1
    assert (ratio[: 1 << grid] >= -3.31e-3).all() and (ratio[: 1 << grid] <= 2.23e-3).all()  # (4.5)
    assert (found.diff() <= 0).all() and found[-1] == 0


# i-softmax (math.md, 6)

SCORES = [3000, 1976, 952, -72, 0, 0]
ALLOWED = [True] * 5 + [False]


def test_golden_softmax() -> None:
    found = integer_softmax(ints(*SCORES), torch.tensor(ALLOWED), 10, 16)
    powers = [exact_exp(3000 - score, 10) if may else 0 for score, may in zip(SCORES, ALLOWED, strict=True)]
    assert powers == [6094548, 3047274, 1523637, 761818, 798213, 0] and sum(powers) == 12225490
    golden = [32670, 16335, 8168, 4084, 4279, 0]  # by division; the operation multiplies by a reciprocal
    assert found.dtype == torch.int32
    assert all(abs(p - wanted) <= 1 for p, wanted in zip(found.tolist(), golden, strict=True))
    assert found[5] == 0


@settings(max_examples=200)
@given(st.data(), st.integers(6, 12), st.integers(8, 16))
def test_softmax_is_exact(data: st.DataObject, grid: int, bits: int) -> None:
    spread = data.draw(st.sampled_from([2**23 - 1, 32 << grid, 3 << grid, 1]))
    scores = data.draw(integer_rows(spread))
    allowed = data.draw(arrays(np.bool_, scores.shape))
    given = torch.from_numpy(scores)
    found = integer_softmax(given, torch.from_numpy(allowed), grid, bits).tolist()
    assert given.tolist() == scores.tolist()
    for row, mask, probabilities in zip(scores.tolist(), allowed.tolist(), found, strict=True):
        assert probabilities == exact_softmax(row, mask, grid, bits)
        powers = [exact_exp(max(row) - score, grid) for score in row] if all(mask) else []
        for power, p in zip(powers, probabilities, strict=False):
            assert abs(p - (2 * power * 2**bits + sum(powers)) // (2 * sum(powers))) <= 1
        # (6.4)
        assert sum(probabilities) <= 2**bits + len(row) / 2
        floor = 2**bits - 1 - len(row) / 2 - len(row) * exact_exp(0, grid) / 2 ** (46 - bits)
        assert not any(mask) or sum(probabilities) >= floor


@pytest.mark.parametrize("bits", [8, 14, 16])
@pytest.mark.parametrize("tokens", [1, 2, 3, 300, 512])
def test_rows_of_probabilities_sum_to_one(tokens: int, bits: int) -> None:
    noise = torch.randn(64, tokens, generator=generator())
    scores = (noise * torch.linspace(0, 6000, 64)[:, None]).int()
    scores[1] = 7
    sums = integer_softmax(scores, torch.ones(tokens, dtype=torch.bool), 10, bits).sum(-1)
    assert (sums <= 2**bits + tokens / 2).all()  # (6.4)
    assert (sums >= 2**bits - 1 - tokens / 2 - tokens * exact_exp(0, 10) / 2 ** (46 - bits)).all()
    assert tokens != 512 or bits == 8 or sums[1] == 2**bits


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("bits", [8, 14, 16])
def test_softmax_is_near_softmax(grid: int, bits: int) -> None:
    unit = math.log(2) / 2**grid
    for tokens in (2, 5, 128, 512):
        noise = torch.randn(200, tokens, generator=generator(tokens), dtype=torch.float64)
        scores = (noise * torch.linspace(0, 8, 200, dtype=torch.float64)[:, None] / unit).round().int()
        scores[:, 1:] -= (torch.arange(200)[:, None] * 0.02 / unit).int()  # one key above the others
        found = integer_softmax(scores, torch.ones(tokens, dtype=torch.bool), grid, bits)
        error = (found.double() / 2**bits - torch.softmax(scores.double() * unit, -1)).abs().max().item()
        peak = exact_exp(0, grid)
        assert error <= 1.4e-3 + tokens / peak + tokens * peak / 2**46 + 2.0**-bits  # (6.5)
        assert error <= 9e-4 + 2.0**-bits or grid < 8  # as measured


def test_a_row_without_an_allowed_key_gets_zeros() -> None:
    scores = ints(5, -5, 2**23 - 1, -(2**23) + 1)
    assert integer_softmax(scores, torch.zeros(4, dtype=torch.bool), 10, 14).tolist() == [0] * 4
    some = torch.tensor([[False] * 4, [True, False, False, False]])
    assert integer_softmax(scores.expand(2, 4), some, 10, 14).tolist() == [[0] * 4, [2**14 - 1, 0, 0, 0]]


def test_what_a_forbidden_key_scores_does_not_matter() -> None:
    allowed = torch.rand(50, 7, generator=generator()) < 0.6
    scores = random_ints(5000, 50, 7)
    wanted = integer_softmax(scores, allowed, 10, 14)
    for value in (2**31 - 1, -(2**31), 0):
        assert torch.equal(integer_softmax(scores.masked_fill(~allowed, value), allowed, 10, 14), wanted)
    padded = torch.cat([scores, random_ints(2**23, 50, 3)], 1)
    mask = torch.cat([allowed, torch.zeros(50, 3, dtype=torch.bool)], 1)
    assert torch.equal(integer_softmax(padded, mask, 10, 14), torch.nn.functional.pad(wanted, (0, 3)))


def test_softmax_depends_on_differences_only() -> None:
    scores, allowed = random_ints(5000, 20, 7), torch.ones(7, dtype=torch.bool)
    wanted = integer_softmax(scores, allowed, 10, 14)
    for moved in (2**23 - 5000, -(2**23) + 5000):
        assert torch.equal(integer_softmax(scores + moved, allowed, 10, 14), wanted)


# i-tanh (math.md, 8)


def test_golden_tanh() -> None:
    found = integer_tanh(ints(1, 400, 1477, 5000, -400, 0), 10)
    assert found.dtype == torch.int32 and found.tolist() == [22, 8712, 24972, 32693, -8712, 0]


@given(st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=1), st.integers(6, 14))
def test_tanh_is_exact_and_odd(values: list[int], grid: int) -> None:
    values += [value % (16 << grid) for value in values] + [2**31 - 1, -(2**31) + 1, 0]
    x = torch.tensor(values, dtype=torch.int32)
    found = integer_tanh(x, grid)
    assert found.tolist() == [exact_tanh(value, grid) for value in values]
    assert torch.equal(integer_tanh(-x, grid), -found)
    assert found.abs().max() == 2**15 - 1


@pytest.mark.parametrize("grid", GRIDS)
def test_tanh_is_near_tanh_and_never_falls(grid: int) -> None:
    x = torch.arange(-(16 << grid), (16 << grid) + 1, dtype=torch.int32)
    found = integer_tanh(x, grid)
    wanted = torch.tanh(x.double() * math.log(2) / 2**grid)
    assert ((found.double() / 2**15 - wanted).abs() <= 1.56e-3).all()  # (8.2)
    assert (found.diff() >= 0).all()


# The linear layer (math.md, 2 and 3)


@settings(max_examples=200)
@given(st.data(), st.booleans(), st.booleans())
def test_linear_is_exact(data: st.DataObject, dynamic: bool, unsigned: bool) -> None:
    tokens, inputs, outputs = (data.draw(st.integers(1, high)) for high in (3, 7, 4))
    codes = data.draw(arrays(np.int8, (tokens, inputs), elements=CODES))
    weight = data.draw(arrays(np.int8, (outputs, inputs), elements=CODES))
    bits = data.draw(st.integers(8, 31))
    widest = 254 * 127 * inputs
    amax = data.draw(st.lists(st.integers(1, 2**23 - 1), min_size=tokens, max_size=tokens)) if dynamic else None
    align = max(0, (widest * max(amax)).bit_length() - 30) if amax else 0
    bias = data.draw(arrays(np.int32, (outputs,), elements=st.integers(-(2**29), 2**29)))
    to_output = data.draw(dyadics(outputs))
    found = integer_linear(
        torch.from_numpy(codes),
        None if amax is None else torch.tensor(amax)[:, None],
        operand(torch.from_numpy(weight)),
        torch.from_numpy(weight.sum(1, dtype=np.int32)) if unsigned else None,
        ints(align),
        torch.from_numpy(bias),
        to_output,
        bits,
    )
    assert found.dtype == torch.int32
    exact = (codes.tolist(), amax, weight.tolist(), unsigned, align, bias.tolist(), pairs(to_output), bits)
    assert found.tolist() == exact_linear(*exact)


@pytest.mark.parametrize("left", [127, -127])
@pytest.mark.parametrize("right", [127, -127])
@pytest.mark.parametrize("inputs", [384, 1024, 4096])
def test_linear_at_its_widest(left: int, right: int, inputs: int) -> None:
    """All codes at the extremes, the longest row product and the largest bias of the same sign."""
    amax, way = 2**21 - 1, 1 if left * right > 0 else -1
    align = (127 * 127 * inputs * amax).bit_length() - 30
    codes = torch.full((2, inputs), left, dtype=torch.int8)
    weight = torch.full((3, inputs), right, dtype=torch.int8)
    bias = torch.full((3,), way * 2**29, dtype=torch.int32)
    found = integer_linear(
        codes, torch.full((2, 1), amax), operand(weight), None, ints(align), bias, dyadic(0.25, 3), 31
    )
    total = half_up(left * right * inputs * amax, align) + way * 2**29
    assert abs(total) < 2**31
    assert found.tolist() == [[half_up(total, 2)] * 3] * 2


def test_static_linear_at_its_widest() -> None:
    codes, weight = torch.full((1, 4096), 127, dtype=torch.int8), torch.full((1, 4096), -127, dtype=torch.int8)
    sums = weight.sum(1, dtype=torch.int32)
    for row_sums, factor in ((None, 127), (sums, 254)):
        found = integer_linear(codes, None, operand(weight), row_sums, ints(0), none(1), unity(1), 32)
        assert found.item() == -4096 * 127 * factor


def test_linear_saturates() -> None:
    codes, weight = ints(127, dtype=torch.int8)[None], ints(127, 1, -127, dtype=torch.int8)[:, None]
    found = integer_linear(codes, None, operand(weight), None, ints(0), none(3), unity(3), 8)
    assert found.tolist() == [[127, 127, -127]]


@pytest.mark.parametrize("unsigned", [False, True])
def test_token_wise_linear_is_near_real_arithmetic(unsigned: bool) -> None:
    """Quantized rows, aligned, with a bias: against float64 on what the codes stand for, and on the rows themselves."""
    inputs, outputs, unit, target = 96, 40, 2.0**-14, 2.0**-12
    x = random_ints(2**21 - 1, 30, inputs) >> (torch.arange(30)[:, None] % 12)
    x = x.abs() if unsigned else x
    weight = random_ints(127, outputs, inputs, seed=1, dtype=torch.int8)
    scale = torch.logspace(-4, -2, outputs, dtype=torch.float64)
    matrix, bias = weight.double() * scale[:, None], torch.randn(outputs, generator=generator(), dtype=torch.float64)
    codes, amax = quantize_rows(x, unsigned=unsigned)
    levels = 254 if unsigned else 127
    align = (levels * 127 * inputs * (2**21 - 1)).bit_length() - 30
    inner = unit / levels * 2.0**align * scale
    sums = weight.sum(1, dtype=torch.int32) if unsigned else None
    offset = torch.floor(bias / inner + 0.5).int()
    ready, to_output = operand(weight), dyadic(inner / target, outputs)
    found = integer_linear(codes, amax, ready, sums, ints(align), offset, to_output, 32).double() * target
    wanted = (codes.double() + 127 * unsigned) * amax / levels * unit @ matrix.t() + bias
    bound = target / 2 + inner + (wanted.abs() + inner) * 2.0**-31 + 1e-12
    assert ((found - wanted).abs() <= bound).all()  # (3.7)
    step = (0.5 + 2.0**-22) * amax / levels * unit * matrix.abs().sum(1)  # (3.3)
    assert ((found - (x.double() * unit @ matrix.t() + bias)).abs() <= bound + step).all()


def test_static_linear_is_near_real_arithmetic() -> None:
    inputs, outputs, step, target = 96, 40, 0.03, 2.0**-12
    codes, weight = (random_ints(127, n, inputs, seed=n, dtype=torch.int8) for n in (30, outputs))
    scale = torch.logspace(-4, -2, outputs, dtype=torch.float64)
    bias = torch.randn(outputs, generator=generator(), dtype=torch.float64)
    inner = step * scale
    offset, to_output = torch.floor(bias / inner + 0.5).int(), dyadic(inner / target, outputs)
    found = integer_linear(codes, None, operand(weight), None, ints(0), offset, to_output, 32).double() * target
    wanted = codes.double() * step @ (weight.double() * scale[:, None]).t() + bias
    bound = target / 2 + inner / 2 + (wanted.abs() + inner) * 2.0**-31 + 1e-12
    assert ((found - wanted).abs() <= bound).all()  # (2.5)


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_linear_keeps_the_leading_axes(shape: tuple[int, ...]) -> None:
    x, weight = random_ints(2**15, *shape, 6), random_ints(127, 4, 6, dtype=torch.int8)
    codes, amax = quantize_rows(x)
    found = integer_linear(codes, amax, operand(weight), None, ints(3), none(4), dyadic(0.01, 4), 22)
    assert found.shape == (*shape, 4)
    flat = integer_linear(
        codes.view(-1, 6), amax.view(-1, 1), operand(weight), None, ints(3), none(4), dyadic(0.01, 4), 22
    )
    assert torch.equal(found.view(-1, 4), flat)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_linear_of_no_tokens(shape: tuple[int, ...]) -> None:
    codes, amax = quantize_rows(torch.empty(*shape, 6, dtype=torch.int32))
    weight = operand(random_ints(127, 4, 6, dtype=torch.int8))
    for top in (amax, None):
        found = integer_linear(codes, top, weight, None, ints(3), none(4), dyadic(0.01, 4), 22)
        assert found.shape == (*shape, 4) and found.dtype == torch.int32


# i-LayerNorm (math.md, 7)


def normal(q: torch.Tensor, eps: int) -> torch.Tensor:
    """What is normalised, in units of 2^-30 / √n, before gamma and beta."""
    n = q.shape[-1]
    return integer_norm(q, ints(eps, dtype=torch.int64), unity(n), none(n), 32)


def test_golden_norm() -> None:
    """The published procedure takes the root of 15221400 as 3901; with more places it is 3901.46."""
    q = ints(1000, -2000, 3000, 500, -750, 1250, 0, 40)
    found = normal(q, 0).double() * math.sqrt(8) / 2**30
    published = [0.449532, -1.725623, 1.899636, 0.087006, -0.819309, 0.630795, -0.27552, -0.246518]
    exact = [0.449479, -1.725419, 1.899411, 0.086996, -0.819212, 0.63072, -0.275487, -0.246488]
    assert found.tolist() == pytest.approx(published, rel=2e-4)
    assert found.tolist() == pytest.approx(exact, abs=6e-7)
    assert normal(q, 0).tolist() == exact_normal(q.tolist(), 0)


@settings(max_examples=200)
@given(st.data(), st.sampled_from([4, 8, 16, 22, 24]), st.integers(8, 32))
def test_norm_is_exact(data: st.DataObject, in_bits: int, bits: int) -> None:
    rows = data.draw(integer_rows(2 ** (in_bits - 1) - 1))
    n = rows.shape[1]
    varied = bool((rows != rows[:, :1]).any(1).all())
    eps = data.draw(st.one_of(st.integers(0 if varied else 1, 100), st.integers(1, 2**50)))
    to_output = data.draw(dyadics(n))
    bias = data.draw(arrays(np.int32, (n,), elements=st.integers(-(2**30), 2**30)))
    x = torch.from_numpy(rows)
    found = integer_norm(x, ints(eps, dtype=torch.int64), to_output, torch.from_numpy(bias), bits)
    assert found.dtype == torch.int32 and x.tolist() == rows.tolist()
    wanted = [exact_norm(row, eps, pairs(to_output), bias.tolist(), bits) for row in rows.tolist()]
    assert found.tolist() == wanted


def norm_bound(z: torch.Tensor, variance: torch.Tensor, n: int) -> torch.Tensor:
    """(7.6): how far the normalised numbers `z` may be off; `variance` is n·(σ² + ε) in squared units."""
    root = variance.sqrt()
    relative = n / (8 * variance) + 2.0**-15 / root + 2.0**-29 + root * 2.0**-46
    return math.sqrt(n) * (0.5 / root + 2.0**-31) + z.abs() * relative


@pytest.mark.parametrize("n", [8, 384, 768, 1024])
@pytest.mark.parametrize("in_bits", [8, 12, 16, 22, 24])
@pytest.mark.parametrize("outliers", [False, True])
def test_norm_is_near_real_arithmetic(n: int, in_bits: int, outliers: bool) -> None:
    x = torch.randn(20, n, generator=generator(), dtype=torch.float64)
    if outliers:
        x[:, 0], x[:, 1] = -40, 15
    x += torch.linspace(-3, 3, 20)[:, None]
    limit = 2 ** (in_bits - 1) - 1
    q = (x / x.abs().amax() * limit).round().int()
    for eps in (1, limit * limit // 1000 * n + 1):
        y = q.double() - q.double().mean(-1, keepdim=True)
        variance = y.square().sum(-1, keepdim=True) + eps
        z = y * math.sqrt(n) / variance.sqrt()
        error = (normal(q, eps).double() * math.sqrt(n) / 2**30 - z).abs()
        assert (error <= norm_bound(z, variance, n) * (1 + 1e-9)).all()
        if in_bits >= 22:
            assert error.max() <= 7e-6  # as measured


@pytest.mark.parametrize("eps", [1, 50_000])
def test_rows_without_variance_give_beta(eps: int) -> None:
    bias = random_ints(2**20, 16)
    q = random_ints(2**22, 5, 1).expand(5, 16)
    found = integer_norm(q, ints(eps, dtype=torch.int64), dyadic(2.0**-12, 16), bias, 22)
    assert found.tolist() == [bias.tolist()] * 5


def test_rows_without_variance_and_eps_give_beta() -> None:
    bias = random_ints(2**20, 16)
    q = ints(0, 7, -(2**22))[:, None].expand(3, 16)
    found = integer_norm(q, ints(0, dtype=torch.int64), dyadic(2.0**-12, 16), bias, 22)
    assert found.tolist() == [bias.tolist()] * 3


def test_eps_makes_small_variances_count_less() -> None:
    n = 16
    q = ints(*([1, -1] * (n // 2)))
    for eps in (1, 3 * n, 99 * n, 2**50):
        wanted = 1 / math.sqrt(1 + eps / n)
        found = normal(q, eps).double() * math.sqrt(n) / 2**30
        z, variance = torch.tensor(wanted, dtype=torch.float64), torch.tensor(float(n + eps), dtype=torch.float64)
        bound = norm_bound(z, variance, n).item() - math.sqrt(n) / 2 / math.sqrt(n + eps)  # the mean is an integer
        assert found.tolist() == pytest.approx([wanted, -wanted] * (n // 2), abs=bound)


@pytest.mark.parametrize("gamma", [1.0, -1.0, 1e-7, -1e-7, 1e-30, 0.0, 40.0])
def test_gamma_of_any_size_and_sign(gamma: float) -> None:
    n, unit = 64, 2.0**-15
    q, beta = random_ints(2**20, 3, n), random_ints(2**18, n, seed=1)
    to_output = dyadic(gamma * math.sqrt(n) / 2**30 / unit, n)
    found = integer_norm(q, ints(1, dtype=torch.int64), to_output, beta, 22)
    z = torch.nn.functional.layer_norm(q.double(), (n,))
    wanted = (z * gamma / unit + beta.double()).clamp(-(2**21) + 1, 2**21 - 1)
    assert ((found.double() - wanted).abs() <= 0.5 + abs(gamma) / unit * 1e-5).all()
    if abs(gamma) <= 1e-7:
        assert torch.equal(found, beta.expand(3, n))


def test_an_outlier_takes_all_of_the_variance() -> None:
    for n in (8, 768, 1024):
        q = none(n)
        q[3] = 2**23 - 1
        found = normal(q, 1).double() * math.sqrt(n) / 2**30
        wanted = torch.full((n,), -1 / math.sqrt(n - 1), dtype=torch.float64)
        wanted[3] = math.sqrt(n - 1)
        assert ((found - wanted).abs() <= 5e-6).all()


@pytest.mark.parametrize("value", [1, -3, 7])
def test_a_sole_deviation_is_one(value: int) -> None:
    """Exactly: it is as long as the whole row, and its root is exact."""
    q = none(16)
    q[5] = value
    assert normal(q, 0).tolist() == [sign(value) * 2**30 if channel == 5 else 0 for channel in range(16)]


def test_norm_does_not_look_at_the_mean() -> None:
    q = random_ints(2**10, 4, 32)
    wanted = normal(q, 5)
    for moved in (2**23 - 2**10 - 1, -(2**23) + 2**10 + 1, 1):
        assert torch.equal(normal(q + moved, 5), wanted)


# Attention (math.md, 9)


@settings(max_examples=200)
@given(st.data(), st.integers(6, 12), st.integers(8, 16), st.integers(8, 24))
def test_attention_is_exact(data: st.DataObject, grid: int, bits: int, context_bits: int) -> None:
    shape = tuple(data.draw(st.integers(1, high)) for high in (2, 4, 2, 3))
    batch, tokens, heads, size = shape
    limit = data.draw(st.sampled_from([127, 2**15 - 1]))
    wide = st.one_of(st.integers(-limit, limit), st.sampled_from([-limit, limit, 0]))
    query = data.draw(arrays(np.int32, shape, elements=wide))
    key, value = (data.draw(arrays(np.int8, shape, elements=CODES)) for _ in range(2))
    real = data.draw(arrays(np.bool_, (batch, tokens)))
    reach = (size * 127 * 127 * limit).bit_length()
    align = data.draw(st.integers(max(0, reach - 30), reach))
    spans = [data.draw(st.sampled_from([2, 5, 8, 11, 14, 26])) for _ in range(heads)]  # binary digits of the scores
    to_scores = ints(*([2**31 - 1] * heads)), ints(*(max(1, 31 + reach - align - span) for span in spans))
    to_context = data.draw(st.one_of(st.just(unity(heads * size)), dyadics(heads * size)))
    found = integer_attention(
        torch.from_numpy(query),
        torch.from_numpy(key),
        torch.from_numpy(value),
        torch.from_numpy(real),
        ints(align),
        (to_scores[0].view(-1, 1, 1), to_scores[1].view(-1, 1, 1)),
        (to_context[0].view(heads, 1, size), to_context[1].view(heads, 1, size)),
        grid=grid,
        bits=bits,
        context_bits=context_bits,
    )
    flat = pairs(to_context)
    by_head = [flat[head * size : (head + 1) * size] for head in range(heads)]
    wanted = exact_attention(query, key, value, real, align, pairs(to_scores), by_head, grid, bits, context_bits)
    assert found.dtype == torch.int32 and found.tolist() == wanted.tolist()


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    real: torch.Tensor,
    *,
    score: float = 2.0**-10,
    places: int = 14,
    step: float = 2.0**-8,
) -> torch.Tensor:
    """Scores are `score` units of the exponential's grid for 1 in `amax · q · k`; the context has steps of `step`."""
    heads, size = query.shape[2:]
    align = max(0, (size * 127 * 127 * (2**15 - 1)).bit_length() - 30)
    return integer_attention(
        query, key, value, real, ints(align), dyadic(score * 2.0**align, heads, 1, 1),
        dyadic(2.0**-places / step, heads, 1, size), grid=10, bits=places, context_bits=24,
    )  # fmt: skip


def attention_case(batch: int, tokens: int, heads: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (batch, tokens, heads, size)
    query = random_ints(2**15 - 1, *shape)
    key, value = (random_ints(127, *shape, seed=seed, dtype=torch.int8) for seed in (1, 2))
    return query, key, value


def test_a_sole_token_attends_to_itself() -> None:
    query, key, value = attention_case(3, 1, 2, 8)
    found = attend(query, key, value, torch.ones(3, 1, dtype=torch.bool))
    kept = [half_up(v * (2**14 - 1), 14 - 8) for v in value.flatten().tolist()]
    assert found.flatten().tolist() == kept


def test_a_text_without_tokens_gets_zeros() -> None:
    query, key, value = attention_case(2, 5, 2, 8)
    real = torch.ones(2, 5, dtype=torch.bool)
    real[1] = False
    found = attend(query, key, value, real)
    assert (found[1] == 0).all()
    assert torch.equal(found[:1], attend(query[:1], key[:1], value[:1], real[:1])) and found[0].any()


def test_padding_changes_no_real_token() -> None:
    query, key, value = attention_case(4, 12, 3, 8)
    lengths = [12, 7, 1, 3]
    real = torch.arange(12) < torch.tensor(lengths)[:, None]
    found = attend(query, key, value, real, score=2.0**-16)
    for text, length in enumerate(lengths):
        q, k, v, mask = (x[text : text + 1, :length] for x in (query, key, value, real))
        alone = attend(q, k, v, mask, score=2.0**-16)
        assert torch.equal(found[text, :length], alone[0])


@pytest.mark.parametrize("places", [14, 16])
@pytest.mark.parametrize(("tokens", "deviation"), [(1, 1.0), (16, 0.5), (16, 4.0), (128, 0.5), (128, 2.0)])
def test_attention_is_near_real_attention(places: int, tokens: int, deviation: float) -> None:
    """Against float64 on the same INT8 codes; `deviation` is that of the scores."""
    query, key, value = attention_case(2, tokens, 2, 64)
    codes, amax = quantize_rows(query)
    products = torch.einsum("bthd,bshd->bhts", codes.double() * amax, key.double())
    unit = math.log(2) / 2**10
    score = deviation / products.std().item() / unit if tokens > 1 else 2.0**-16
    real = torch.ones(2, tokens, dtype=torch.bool)
    real[0, tokens // 2 + 1 :] = False
    found = attend(query, key, value, real, score=score, places=places, step=2.0**-10).double() * 2.0**-10
    scores = (products * score).masked_fill(~real[:, None, None], -math.inf)
    wanted = torch.einsum("bhts,bshd->bthd", torch.softmax(scores * unit, -1), value.double()).flatten(2)
    aligned = score * 2.0 ** max(0, (64 * 127 * 127 * (2**15 - 1)).bit_length() - 30)
    rounding = 0.5 + aligned / 2 + (products * score).abs().max().item() * 2.0**-31
    peak = exact_exp(0, 10)
    mass = math.expm1(2 * rounding * unit)  # (9.4)
    mass += 2.8e-3 + 2 * tokens / peak + tokens * peak / 2**46 + (1 + tokens / 2) * 2.0**-places
    error = (found - wanted).abs().max().item()
    assert error <= 127 * mass + 2.0**-11
    assert tokens == 1 or error <= 0.2  # as measured, in steps of the values


def test_heads_and_channels_have_their_own_scales() -> None:
    query, key, value = attention_case(2, 6, 3, 4)
    real = torch.ones(2, 6, dtype=torch.bool)
    scores = dyadic(torch.tensor([2.0**-17, 2.0**-15, 2.0**-13], dtype=torch.float64)[:, None, None], 3, 1, 1)
    context = dyadic(torch.logspace(-3, 0, 12, dtype=torch.float64).view(3, 1, 4), 3, 1, 4)
    options: dict[str, Any] = {"grid": 10, "bits": 14, "context_bits": 24}
    found = integer_attention(query, key, value, real, ints(4), scores, context, **options).view(2, 6, 3, 4)
    for head in range(3):
        at = slice(head, head + 1)
        one = integer_attention(
            query[:, :, at], key[:, :, at], value[:, :, at], real, ints(4),
            (scores[0][at], scores[1][at]), (context[0][at], context[1][at]), **options,
        )  # fmt: skip
        assert torch.equal(found[:, :, head], one)


# What holds of all


def operations() -> dict[str, Callable[[], Any]]:
    """Every operation on inputs of ordinary sizes, made when this is called."""
    x = random_ints(2**20, 2, 6, 16)
    codes, amax = quantize_rows(x)
    weight, sums = operand(random_ints(127, 5, 16, dtype=torch.int8)), random_ints(2000, 5)
    scale, channels = dyadic(0.01, 5), dyadic(2.0**-9, 16)
    query, key, value = attention_case(2, 6, 2, 8)
    to_scores, to_context = dyadic(2.0**-12, 2, 1, 1), dyadic(2.0**-6, 2, 1, 8)
    mask = torch.rand(2, 6, generator=generator()) < 0.7
    attention: dict[str, Any] = {"grid": 10, "bits": 14, "context_bits": 16}
    wide, eps, bias, align = x.long().abs() + 1, ints(3, dtype=torch.int64), random_ints(99, 16), ints(4)
    root, one = long(640), long(453850)
    return {
        "saturate": lambda: saturate(x, 8),
        "bit_length": lambda: bit_length(wide),
        "isqrt": lambda: isqrt(wide),
        "shift_round": lambda: shift_round(wide, align),
        "quantize_rows": lambda: quantize_rows(x),
        "quantize_rows, unsigned": lambda: quantize_rows(x.abs(), unsigned=True),
        "integer_gelu": lambda: integer_gelu(x, root, one, 6),
        "integer_exp": lambda: integer_exp(x.abs(), 10),
        "integer_softmax": lambda: integer_softmax(x, torch.ones_like(x, dtype=torch.bool), 10, 14),
        "integer_tanh": lambda: integer_tanh(x, 10),
        "integer_linear": lambda: integer_linear(codes, amax, weight, None, align, none(5), scale, 22),
        "integer_linear, static": lambda: integer_linear(codes, None, weight, sums, align, none(5), scale, 22),
        "integer_norm": lambda: integer_norm(x, eps, channels, bias, 22),
        "integer_attention": lambda: integer_attention(
            query, key, value, mask, align, to_scores, to_context, **attention
        ),
    }


class FloatTouchedError(Exception):
    """What `NoFloats` raises. Python takes a TypeError inside an operator for an operand that is not supported."""


class NoFloats(TorchDispatchMode):
    """Raises where a tensor of floats or complex numbers goes into an operation of torch or comes out."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                raise FloatTouchedError(f"{func} touches {leaf.dtype}")
        return result


@pytest.mark.parametrize("name", operations())
def test_no_float_is_touched(name: str) -> None:
    run = operations()[name]
    with NoFloats():
        run()


@pytest.mark.parametrize("touch", [lambda x: x / 2, lambda x: x.double().sum(), lambda x: x.float().int(), torch.sqrt])
def test_a_touched_float_is_noticed(touch: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = ints(4)
    with pytest.raises(FloatTouchedError, match=r"torch\.float"), NoFloats():
        touch(x)


@pytest.mark.parametrize("piece", [1, 7, 100])
def test_pieces_do_not_change_a_result(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    wanted = {name: run() for name, run in operations().items()}
    monkeypatch.setattr(reference, "_PIECE", piece)
    for name, run in operations().items():
        found = run()
        for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (wanted[name], found)), strict=True):
            assert torch.equal(one, other), name


def test_inputs_are_left_as_they_were() -> None:
    for name, run in operations().items():
        cells = [cell.cell_contents for cell in run.__closure__ or ()]
        tensors = [x for x in torch.utils._pytree.tree_leaves(cells) if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in tensors]
        run()
        assert tensors and all(map(torch.equal, tensors, before)), name
