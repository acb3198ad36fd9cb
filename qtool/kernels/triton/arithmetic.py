"""Functions on integers that kernels are made of; each means what the one of its name in `kernels.reference` does.

Tensors are int64 unless it says otherwise; row values are `[rows, 1]`.
"""

import triton
import triton.language as tl

RECIPROCAL_BITS = tl.constexpr(46)
NORM_BITS = tl.constexpr(30)
_EXTRA_BITS = tl.constexpr(22)
_ROOT_BITS = tl.constexpr(60)
_QUOTIENT_BITS = tl.constexpr(29)
EXP_OCTAVES = tl.constexpr(30)
INT32_MAX = tl.constexpr((1 << 31) - 1)


@triton.jit
def shift_round(x: tl.tensor, places: tl.tensor) -> tl.tensor:
    """`x / 2^places` rounded half up; `places` may be 0."""
    one = tl.full([1], 1, tl.int64)
    return (x + ((one << places) >> 1)) >> places


@triton.jit
def rescale(x: tl.tensor, multiplier: tl.tensor, shift: tl.tensor) -> tl.tensor:
    """`x · multiplier / 2^shift` rounded half up, int64 from int32 values in any type; `shift` is at least 1."""
    one = tl.full([1], 1, tl.int64)
    shift = shift.to(tl.int64)
    return (x.to(tl.int64) * multiplier.to(tl.int64) + (one << (shift - 1))) >> shift


@triton.jit
def saturate(x: tl.tensor, limit: tl.tensor) -> tl.tensor:
    """int32 of values within ±`limit`."""
    return tl.minimum(tl.maximum(x, -limit), limit).to(tl.int32)


@triton.jit
def bit_length(n: tl.tensor) -> tl.tensor:
    """Binary digits of n ≥ 0, by halving the places that are looked at."""
    length = tl.zeros_like(n)
    for step in tl.static_range(6):
        half = 32 >> step
        high = n >> half
        length += tl.where(high > 0, half, 0)
        n = tl.where(high > 0, high, n)
    return length + n  # what is left is 0 or 1


@triton.jit
def isqrt(n: tl.tensor) -> tl.tensor:
    """floor(√n) of 0 ≤ n < 2^62, a binary digit at a time: cheaper on a GPU than divisions of 64 bits."""
    root = tl.zeros_like(n)
    rest = n
    one = tl.full([1], 1, tl.int64)
    for step in tl.static_range(31):
        bit = one << (60 - 2 * step)
        reached = rest >= root + bit
        rest = tl.where(reached, rest - root - bit, rest)
        root = (root >> 1) + tl.where(reached, bit, 0)
    return root


@triton.jit
def floor_divide(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """floor(a / b) of b > 0, where division truncates."""
    quotient = a // b
    return tl.where(quotient * b > a, quotient - 1, quotient)


@triton.jit
def quantize_rows(x: tl.tensor, UNSIGNED: tl.constexpr) -> tl.tensor:
    """int8 codes of int32 rows `[rows, width]`, and the row's largest magnitude `[rows, 1]`, at least 1.

    Padding of a row must be 0 and gets no meaningful code.
    """
    amax = tl.maximum(tl.max(tl.abs(x), 1, keep_dims=True), 1).to(tl.int64)
    places = bit_length(amax) + _EXTRA_BITS
    one = tl.full([1], 1, tl.int64)
    levels: tl.constexpr = 254 if UNSIGNED else 127
    factor = ((one * levels) << places) // amax
    codes = (x.to(tl.int64) * factor + (one << (places - 1))) >> places
    if UNSIGNED:
        codes -= 127
    return codes.to(tl.int8), amax


@triton.jit
def normalize(x: tl.tensor, present: tl.tensor, size: tl.tensor, eps: tl.tensor) -> tl.tensor:
    """i-LayerNorm before γ and β (math.md, 7): int32 rows `[rows, width]` → units of 2^-30, within ±(2^31 - 1).

    `present` is false where a row is padded, `size` how many values it has.
    """
    one = tl.full([1], 1, tl.int64)
    wide = tl.where(present, x, 0).to(tl.int64)
    total = tl.sum(wide, 1, keep_dims=True)
    y = tl.where(present, wide - floor_divide(2 * total + size, 2 * size), 0)
    variance = tl.sum(y * y, 1, keep_dims=True) + eps
    extra = tl.minimum(tl.maximum((-bit_length(variance) + _ROOT_BITS) >> 1, 0), 15)
    root = tl.maximum(isqrt(variance << (2 * extra)), 1)
    inverse = (one << (extra + RECIPROCAL_BITS)) // root
    return tl.minimum(tl.maximum(shift_round(y * inverse, RECIPROCAL_BITS - NORM_BITS), -INT32_MAX), INT32_MAX)


@triton.jit
def exponential(distance: tl.tensor, exp_b: tl.tensor, exp_c: tl.tensor, GRID: tl.constexpr) -> tl.tensor:
    """i-exp of `-distance · ln2/2^GRID`: int32 ≥ 0 → int32."""
    octave = distance >> GRID
    root = exp_b - (distance & ((1 << GRID) - 1))
    return tl.where(octave >= EXP_OCTAVES, 0, (root * root + exp_c) >> tl.minimum(octave, EXP_OCTAVES))


@triton.jit
def shares(weights: tl.tensor, total: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """int32 weights as shares of `total` in units of 2^-BITS, at most 2^BITS - 1: int32."""
    one = tl.full([1], 1, tl.int64)
    reciprocal = (one << RECIPROCAL_BITS) // tl.maximum(total, 1)
    found = shift_round(weights.to(tl.int64) * reciprocal, RECIPROCAL_BITS - BITS)
    return tl.minimum(found, (1 << BITS) - 1).to(tl.int32)


@triton.jit
def quotients(sums: tl.tensor, total: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """int32 `sums` over `total`, in units of 2^-BITS, saturated to int32."""
    one = tl.full([1], 1, tl.int64)
    total = tl.maximum(total, 1)
    places = tl.minimum(bit_length(total) + _QUOTIENT_BITS, 62)
    reciprocal = (one << places) // total
    return saturate(shift_round(sums.to(tl.int64) * reciprocal, places - BITS), INT32_MAX)


@triton.jit
def gelu(x: tl.tensor, root: tl.tensor, unit: tl.tensor, places: tl.tensor) -> tl.tensor:
    """i-GELU: int32 → int64, the product `x · (erf + 1)` before it is rescaled."""
    x = x.to(tl.int64)
    missing = root - tl.minimum(tl.abs(x), root)
    erf = unit - missing * missing
    erf = tl.where(x > 0, erf, tl.where(x < 0, -erf, 0))
    return x * shift_round(erf + unit, places)
