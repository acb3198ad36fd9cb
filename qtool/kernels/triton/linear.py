"""The int8 product with the epilogues of integer layers (math.md, 2, 3 and 5)."""

import triton
import triton.language as tl

from qtool.kernels.triton import arithmetic
from qtool.kernels.triton.rows import number

NONE, RELU, TABLE, POLYNOMIAL = range(4)
"""What follows the layer: nothing, max(x, 0), a table of its outputs, or i-GELU."""
_RELU = tl.constexpr(RELU)
_TABLE = tl.constexpr(TABLE)
_POLYNOMIAL = tl.constexpr(POLYNOMIAL)


@triton.jit
def linear_kernel(
    codes: tl.tensor, amax: tl.tensor, weight: tl.tensor, correction: tl.tensor, align: tl.tensor, bias: tl.tensor,
    multiplier: tl.tensor, shift: tl.tensor, limits: tl.tensor, limit: tl.tensor,
    table: tl.tensor, constants: tl.tensor, act_multiplier: tl.tensor, act_shift: tl.tensor,
    result: tl.tensor, count: tl.tensor, inputs: tl.tensor, outputs: tl.tensor,
    ACT: tl.constexpr, HALF: tl.constexpr, ALIGNS: tl.constexpr, EVEN: tl.constexpr,
    COUNTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """int8 `codes` `[count, inputs]` times int8 `weight` `[outputs, inputs]` → `result` `[count, outputs]`.

    The sums, with `correction` of each output added, are multiplied by the row's `amax` and shifted by `align` (one
    number, or with ALIGNS one an output), unless activations are static (`amax` None). `bias` is added, the rescale
    follows, and saturation to ±`limits` of each output, or where they are None to ±`limit`. Then comes ACT: an entry of
    the int16 `table` at the sum plus HALF, or i-GELU with int64 `constants` (root, one, places, offset), which with
    HALF starts at zero.
    """
    there = number(count, COUNTED)
    blocks_m, blocks_n = tl.cdiv(there, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    # Blocks that share rows of codes, and of weights, run side by side, so that the cache serves them.
    first = tl.program_id(0) // (GROUP * blocks_n) * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    place = tl.program_id(0) % (GROUP * blocks_n)
    if place >= height * blocks_n:  # there are programs for as many rows as there would be with all padding
        return
    rows = ((first + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    present = rows < there
    known = columns < outputs
    acc = _product(codes, weight, rows, columns, present, known, inputs, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    if correction is not None:
        acc += tl.load(correction + columns, mask=known, other=0)[None, :]
    total = acc.to(tl.int64)
    if amax is not None:
        places = tl.load(align + columns, mask=known, other=0)[None, :] if ALIGNS else tl.load(align)
        scale = tl.load(amax + rows, mask=present, other=1).to(tl.int64)[:, None]
        total = arithmetic.shift_round(total * scale, places.to(tl.int64))
    total += tl.load(bias + columns, mask=known, other=0)[None, :]
    m = tl.load(multiplier + columns, mask=known, other=0)[None, :]
    s = tl.load(shift + columns, mask=known, other=1)[None, :]
    bound = limit if limits is None else tl.load(limits + columns, mask=known, other=0)[None, :]
    found = arithmetic.saturate(arithmetic.rescale(total, m, s), bound)
    here = present[:, None] & known[None, :]
    if ACT == _RELU:
        found = tl.maximum(found, 0)
    if ACT == _TABLE:
        found = tl.load(table + found + HALF, mask=here, other=0).to(tl.int32)
    if ACT == _POLYNOMIAL:
        product = arithmetic.gelu(found, tl.load(constants), tl.load(constants + 1), tl.load(constants + 2))
        value = arithmetic.rescale(product, tl.load(act_multiplier), tl.load(act_shift)) + tl.load(constants + 3)
        found = arithmetic.saturate(tl.maximum(value, 0) if HALF else value, (1 << 15) - 1)
    at = rows[:, None] * outputs + columns[None, :]
    tl.store(result + at, found.to(result.dtype.element_ty), mask=here)


@triton.jit
def _product(
    codes: tl.tensor, weight: tl.tensor, rows: tl.tensor, columns: tl.tensor, present: tl.tensor, known: tl.tensor,
    inputs: tl.tensor, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """int32 `[BLOCK_M, BLOCK_N]`; with EVEN the inputs are a multiple of BLOCK_K."""
    depth = tl.arange(0, BLOCK_K)
    left = codes + rows[:, None] * inputs + depth[None, :]
    right = weight + columns.to(tl.int64)[None, :] * inputs + depth[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, inputs, BLOCK_K):
        if EVEN:
            a = tl.load(left, mask=present[:, None], other=0)
            b = tl.load(right, mask=known[None, :], other=0)
        else:
            inside = start + depth < inputs
            a = tl.load(left, mask=present[:, None] & inside[None, :], other=0)
            b = tl.load(right, mask=known[None, :] & inside[:, None], other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
        left += BLOCK_K
        right += BLOCK_K
    return acc
