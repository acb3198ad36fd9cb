"""Kernels on rows of integers: codes of a row, i-LayerNorm, rows of embedding tables, functions of single numbers.

A program has ROWS whole rows; how many rows there are, `count`, may stand in memory (COUNTED), so that a recorded
graph serves texts of any length.
"""

import triton
import triton.language as tl

from qtool.kernels.triton import arithmetic


@triton.jit
def number(count: tl.tensor, COUNTED: tl.constexpr) -> tl.tensor:
    """How many rows there are: `count`, or with COUNTED what stands where it points to."""
    if COUNTED:
        count = tl.load(count)
    return count


@triton.jit
def _prepared(
    x: tl.tensor, columns: tl.tensor, width: tl.tensor, multiplier: tl.tensor, shift: tl.tensor, offset: tl.tensor,
    limit: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """Rows moved and divided by channel before they get codes (math.md, 2.3); as they are without a `multiplier`."""
    if multiplier is not None:
        m = tl.load(multiplier + columns, mask=columns < width, other=0)[None, :]
        s = tl.load(shift + columns, mask=columns < width, other=1)[None, :]
        o = tl.load(offset + columns, mask=columns < width, other=0)[None, :]
        x = arithmetic.saturate(arithmetic.rescale(x, m, s) - o, limit)
    return x


@triton.jit
def _write_codes(
    x: tl.tensor, codes: tl.tensor, amax: tl.tensor, at: tl.tensor, rows: tl.tensor, here: tl.tensor,
    UNSIGNED: tl.constexpr,
) -> None:  # fmt: skip
    """Store int32 rows as int8 codes: with an `amax` by each row's largest value, else as they are."""
    if amax is None:
        tl.store(codes + at, x.to(tl.int8), mask=here)
    else:
        found, largest = arithmetic.quantize_rows(x, UNSIGNED)
        tl.store(codes + at, found, mask=here)
        present = tl.max(here.to(tl.int32), 1, keep_dims=True) > 0
        tl.store(amax + rows[:, None], largest.to(amax.dtype.element_ty), mask=present)


@triton.jit
def quantize_kernel(
    x: tl.tensor, codes: tl.tensor, amax: tl.tensor, multiplier: tl.tensor, shift: tl.tensor, offset: tl.tensor,
    limit: tl.tensor, count: tl.tensor, width: tl.tensor,
    UNSIGNED: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """int16 or int32 rows `[count, width]` → int8 codes and each row's largest magnitude (math.md, 3)."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    here = (rows < number(count, COUNTED))[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    values = tl.load(x + at, mask=here, other=0).to(tl.int32)
    values = tl.where(here, _prepared(values, columns, width, multiplier, shift, offset, limit), 0)
    _write_codes(values, codes, amax, at, rows, here, UNSIGNED)


@triton.jit
def norm_kernel(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, shift: tl.tensor, bias: tl.tensor, eps: tl.tensor,
    result: tl.tensor, limit: tl.tensor,
    codes: tl.tensor, amax: tl.tensor, in_multiplier: tl.tensor, in_shift: tl.tensor, in_offset: tl.tensor,
    in_limit: tl.tensor, count: tl.tensor, width: tl.tensor,
    UNSIGNED: tl.constexpr, COUNTED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """i-LayerNorm of int32 `x + residual` `[count, width]` (math.md, 7), and with `codes` the codes of its rows.

    `residual` may be None. `eps` lies in memory; `limit` saturates what leaves.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    here = (rows < number(count, COUNTED))[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    values = tl.load(x + at, mask=here, other=0)
    if residual is not None:
        values += tl.load(residual + at, mask=here, other=0)
    normal = arithmetic.normalize(values, here, tl.full((), width, tl.int64), tl.load(eps))
    m = tl.load(weight + columns, mask=columns < width, other=0)[None, :]
    s = tl.load(shift + columns, mask=columns < width, other=1)[None, :]
    b = tl.load(bias + columns, mask=columns < width, other=0)[None, :]
    found = arithmetic.saturate(arithmetic.rescale(normal, m, s) + b, limit)
    tl.store(result + at, found, mask=here)
    if codes is not None:
        found = tl.where(here, _prepared(found, columns, width, in_multiplier, in_shift, in_offset, in_limit), 0)
        _write_codes(found, codes, amax, at, rows, here, UNSIGNED)


@triton.jit
def embed_kernel(
    first_ids: tl.tensor, first: tl.tensor, first_multiplier: tl.tensor, first_shift: tl.tensor, first_rows: tl.tensor,
    second_ids: tl.tensor, second: tl.tensor, second_multiplier: tl.tensor, second_shift: tl.tensor,
    second_rows: tl.tensor,
    third_ids: tl.tensor, third: tl.tensor, third_multiplier: tl.tensor, third_shift: tl.tensor, third_rows: tl.tensor,
    result: tl.tensor, count: tl.tensor, width: tl.tensor,
    COUNTED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """The rescaled rows of up to three tables of codes added: ids `[count]` of each → int32 `[count, width]`.

    A table whose ids are None is not there. Ids that a table does not have add 0: whoever calls has checked them.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    present = rows < number(count, COUNTED)
    here = present[:, None] & (columns < width)[None, :]
    total = _looked_up(first_ids, first, first_multiplier, first_shift, first_rows, rows, columns, here, width)
    if second_ids is not None:
        total += _looked_up(
            second_ids, second, second_multiplier, second_shift, second_rows, rows, columns, here, width
        )
    if third_ids is not None:
        total += _looked_up(third_ids, third, third_multiplier, third_shift, third_rows, rows, columns, here, width)
    tl.store(result + rows[:, None] * width + columns[None, :], total.to(tl.int32), mask=here)


@triton.jit
def _looked_up(
    ids: tl.tensor, table: tl.tensor, multiplier: tl.tensor, shift: tl.tensor, size: tl.tensor, rows: tl.tensor,
    columns: tl.tensor, here: tl.tensor, width: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """int64 `[ROWS, WIDTH]`: the codes of a table's rows on the grid of the sum."""
    present = tl.max(here.to(tl.int32), 1) > 0
    row = tl.load(ids + rows, mask=present, other=0).to(tl.int64)
    known = present & (row >= 0) & (row < size)
    row = tl.where(known, row, 0)
    codes = tl.load(table + row[:, None] * width + columns[None, :], mask=known[:, None] & here, other=0)
    m = tl.load(multiplier + row, mask=known, other=0)[:, None]
    s = tl.load(shift + row, mask=known, other=1)[:, None]
    return arithmetic.rescale(codes, m, s)


@triton.jit
def gelu_kernel(
    x: tl.tensor, result: tl.tensor, root: tl.tensor, unit: tl.tensor, places: tl.tensor, count: tl.tensor,
    SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """i-GELU's product of `count` int32 values (math.md, 5.4): int64. The constants lie in memory."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    here = at < count
    values = tl.load(x + at, mask=here, other=0)
    found = arithmetic.gelu(values, tl.load(root), tl.load(unit), tl.load(places))
    tl.store(result + at, found, mask=here)


@triton.jit
def tanh_kernel(
    x: tl.tensor, result: tl.tensor, exp_b: tl.tensor, exp_c: tl.tensor, count: tl.tensor,
    GRID: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """i-tanh (math.md, 8) of `count` int32 values in units of ln2/2^GRID: int32 in units of 2^-15."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    here = at < count
    values = tl.load(x + at, mask=here, other=0).to(tl.int64)
    one = exp_b.to(tl.int64) * exp_b + exp_c
    power = arithmetic.exponential(2 * tl.abs(values), exp_b.to(tl.int64), exp_c.to(tl.int64), GRID)
    found = tl.minimum((((one - power) << 15) + ((one + power) >> 1)) // (one + power), (1 << 15) - 1)
    tl.store(result + at, tl.where(values < 0, -found, tl.where(values > 0, found, 0)).to(tl.int32), mask=here)
