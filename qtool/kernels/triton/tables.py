"""Float rows by an embedding table's codes (`Reference.row_table_linear`): int8 rows, read as they are stored.

A vocabulary's table is long, and no part of it is ever made float in memory. A single row is multiplied value by value:
that waits for the codes alone. More rows go to tensor cores. There a code is exact in bfloat16, and a float32 number is
the sum of three, so that products are exact and only their sums are rounded.
"""

import math

import torch
import triton
import triton.language as tl

from qtool.kernels.triton import interpreted, tuning

PLANES = 3
"""bfloat16 numbers whose sum is a float32 number: 24 bits of 8 each."""
_PLANES = tl.constexpr(PLANES)
_HIGH_HALF = tl.constexpr(-1 << 16)
_INFINITY = tl.constexpr(math.inf)
_ELEMENTS = 1024  # of a row that are split at a time


@triton.jit
def split_floats_kernel(
    x: tl.tensor, planes: tl.tensor, width: tl.tensor, step: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """float32 `[rows, width]` → `planes` `[PLANES, rows, step]` of its sum, by cutting; zeros behind the width.

    What is not finite is so in the first plane, and zero in the others.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x + row * width + columns, mask=columns < width, other=0)
    finite = tl.abs(rest) < _INFINITY
    for plane in tl.static_range(_PLANES):
        high = (rest.to(tl.int32, bitcast=True) & _HIGH_HALF).to(tl.float32, bitcast=True)
        part = tl.where(finite, high, rest)
        at = (row + tl.num_programs(0).to(tl.int64) * plane) * step + columns
        tl.store(planes + at, part.to(planes.dtype.element_ty), mask=columns < step)
        rest = tl.where(finite, rest - high, 0.0)


@triton.jit
def table_vector_kernel(
    x: tl.tensor, codes: tl.tensor, scale: tl.tensor, bias: tl.tensor, result: tl.tensor,
    inputs: tl.tensor, outputs: tl.tensor, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """float32 `x` `[inputs]`, one row, by int8 `codes` `[outputs, inputs]` with float32 `scale` `[outputs]`."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = columns < outputs
    codes += columns.to(tl.int64)[:, None] * inputs
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        depth = start + tl.arange(0, BLOCK_K)
        inside = depth < inputs
        found = tl.load(codes + depth[None, :], mask=known[:, None] & inside[None, :], other=0).to(tl.float32)
        total += found * tl.load(x + depth, mask=inside, other=0)[None, :]
    mixed = tl.sum(total, 1) * tl.load(scale + columns, mask=known, other=0)
    if bias is not None:
        mixed += tl.load(bias + columns, mask=known, other=0)
    tl.store(result + columns, mixed, mask=known)


@triton.jit
def table_product_kernel(
    planes: tl.tensor, codes: tl.tensor, scale: tl.tensor, bias: tl.tensor, result: tl.tensor,
    tokens: tl.tensor, step: tl.tensor, inputs: tl.tensor, outputs: tl.tensor,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """`planes` `[PLANES, tokens, step]` of float32 rows; the rest as `table_vector_kernel`, a `result` of all tokens.

    Program ids: block of tokens, of outputs; tokens side by side share the codes in the cache. With EVEN the inputs are
    whole steps of BLOCK_K.
    """
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    present, known = rows < tokens, columns < outputs
    depth = tl.arange(0, BLOCK_K)
    left = planes + rows[:, None] * step + depth[None, :]
    right = codes + columns.to(tl.int64)[None, :] * inputs + depth[:, None]
    plane = (rows * 0 + tokens)[:, None] * step
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inputs, BLOCK_K):
        if EVEN:
            found = tl.load(right + start, mask=known[None, :], other=0)
            ready = present[:, None]
        else:
            found = tl.load(right + start, mask=known[None, :] & (start + depth < inputs)[:, None], other=0)
            ready = present[:, None] & (start + depth < inputs)[None, :]
        weights = found.to(planes.dtype.element_ty)
        for number in tl.static_range(_PLANES):
            acc = tl.dot(tl.load(left + number * plane + start, mask=ready, other=0), weights, acc)
    acc *= tl.load(scale + columns, mask=known, other=0)[None, :]
    if bias is not None:
        acc += tl.load(bias + columns, mask=known, other=0)[None, :]
    tl.store(result + rows[:, None] * outputs + columns[None, :], acc, mask=present[:, None] & known[None, :])


def split_floats(x: torch.Tensor) -> torch.Tensor:
    """float32 `x` `[tokens, in]` as `[PLANES, tokens, in and padding]` whose sum it is; bfloat16 holds them exactly.

    The interpreter multiplies no bfloat16: there the same numbers are float32.
    """
    tokens, width = x.shape
    step = width + -width % 16  # rows of whole vectors can be copied as such
    planes = x.new_empty((PLANES, tokens, step), dtype=torch.float32 if interpreted() else torch.bfloat16)
    split_floats_kernel[(tokens, -(-step // _ELEMENTS))](x, planes, width, step, BLOCK=_ELEMENTS)
    return planes


def multiply(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """float32 `x` `[tokens, in]`, int8 `codes` `[out, in]`, `scale` `[out, 1]` → float32 `[tokens, out]`."""
    tokens, (outputs, inputs) = len(x), codes.shape
    result = x.new_empty((tokens, outputs))
    cut = tuning.table_tile(tokens)
    blocks = -(-outputs // cut.n)
    if tokens == 1:
        table_vector_kernel[(blocks,)](
            x, codes, scale, bias, result, inputs, outputs, BLOCK_N=cut.n, BLOCK_K=cut.k, num_warps=cut.warps
        )
        return result
    planes = split_floats(x)
    table_product_kernel[(-(-tokens // cut.m), blocks)](
        planes, codes, scale, bias, result, tokens, planes.shape[2], inputs, outputs, EVEN=inputs % cut.k == 0,
        BLOCK_M=cut.m, BLOCK_N=cut.n, BLOCK_K=cut.k, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return result
