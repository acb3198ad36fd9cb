"""Linear layers of int8 activations × int8 weights between float32 rows (ZeroQuant, Yao et al. 2022).

Every float operation is the reference's, rounded as IEEE 754 has it and in the same order. Launches must forbid fused
multiply-adds: `enable_fp_fusion=False`.
"""

import triton
import triton.language as tl

_QMAX = tl.constexpr(127.0)
_TINY = tl.constexpr(2.0**-126)


@triton.jit
def tokens_kernel(
    x: tl.tensor, codes: tl.tensor, scales: tl.tensor, given: tl.tensor, count: tl.tensor, width: tl.tensor,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """float32 rows `[count, width]` → int8 `codes` and float32 `scales` `[count]`.

    By each row's largest value, or by the one scale that `given` points to, and then codes saturate. A row with an
    infinity or NaN gets a scale that is not finite.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    present = rows < count
    here = present[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    values = tl.load(x + at, mask=here, other=0.0)
    sizes = tl.abs(values)
    unknown = tl.max((sizes != sizes).to(tl.int32), 1) > 0  # a largest value would pass over NaN
    if given is None:
        scale = tl.maximum(tl.div_rn(tl.max(tl.where(sizes == sizes, sizes, 0.0), 1), _QMAX), _TINY)
        scale = tl.where(unknown, float("nan"), scale)
    else:
        damaged = unknown | (tl.max((sizes == float("inf")).to(tl.int32), 1) > 0)
        scale = tl.where(damaged, float("nan"), tl.load(given))
    divisor = scale if given is None else tl.load(given)
    found = tl.floor(tl.div_rn(values, _across(divisor, values)) + 0.5)
    found = tl.where(found == found, tl.minimum(tl.maximum(found, -_QMAX), _QMAX), 0.0)
    tl.store(codes + at, found.to(tl.int8), mask=here)
    tl.store(scales + rows, scale, mask=present)


@triton.jit
def sums_kernel(
    codes: tl.tensor, sums: tl.tensor, count: tl.tensor, inputs: tl.tensor, width: tl.tensor, blocks: tl.tensor,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """int8 `codes` `[count, inputs]` → int32 `sums` `[count, blocks]` over each `width` columns."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    block = tl.program_id(1)
    present = rows < count
    stop = tl.minimum((block + 1) * width, inputs)
    total = tl.zeros((ROWS, SIZE), dtype=tl.int32)
    for start in range(block * width, stop, SIZE):
        columns = start + tl.arange(0, SIZE)
        here = present[:, None] & (columns < stop)[None, :]
        total += tl.load(codes + rows[:, None] * inputs + columns[None, :], mask=here, other=0).to(tl.int32)
    tl.store(sums + rows * blocks + block, tl.sum(total, 1), mask=present)


@triton.jit
def int8_kernel(
    codes: tl.tensor, act_scale: tl.tensor, sums: tl.tensor, weight: tl.tensor, scale: tl.tensor, share: tl.tensor,
    offset: tl.tensor, offset_share: tl.tensor, bias: tl.tensor, result: tl.tensor,
    count: tl.tensor, inputs: tl.tensor, outputs: tl.tensor, width: tl.tensor, blocks: tl.tensor,
    WHOLE: tl.constexpr, SINGLE: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """int8 `codes` `[count, inputs]` times int8 `weight` `[outputs, inputs]` → float32 `result` `[count, outputs]`.

    Of each `width` columns, a block, there is one term, `sum · act_scale · scale` and with an `offset` next to it
    `sums · act_scale · offset`; terms are added block by block, `bias` last. `scale` is `[outputs / share, blocks]`,
    `offset` likewise, int32 `sums` of codes `[count, blocks]`. WHOLE says that there is one block, SINGLE that BLOCK_K
    holds a block, EVEN that no step of BLOCK_K reaches beyond one.
    """
    blocks_m, blocks_n = tl.cdiv(count, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    # Blocks that share rows of codes, and of weights, run side by side, so that the cache serves them.
    first = tl.program_id(0) // (GROUP * blocks_n) * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    place = tl.program_id(0) % (GROUP * blocks_n)
    rows = ((first + place % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = place // height * BLOCK_N + tl.arange(0, BLOCK_N)
    present, known = rows < count, columns < outputs
    left = codes + rows[:, None] * inputs
    right = weight + columns.to(tl.int64)[None, :] * inputs
    token = tl.load(act_scale + rows, mask=present, other=0.0)[:, None]
    scale_row = scale + (columns // share).to(tl.int64) * blocks
    offset_row = scale_row if offset is None else offset + (columns // offset_share).to(tl.int64) * blocks
    if WHOLE:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        for start in range(0, inputs, BLOCK_K):
            acc = _step(left, right, present, known, start, inputs, acc, EVEN, BLOCK_K)
        total = _term(acc, token, sums, scale_row, offset, offset_row, rows, present, known, 0, blocks)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32) * -1.0  # -0: adding to it keeps the sign of a zero
        for block in range(0, blocks):
            stop = tl.minimum((block + 1) * width, inputs)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
            if SINGLE:
                acc = _step(left, right, present, known, block * width, stop, acc, EVEN, BLOCK_K)
            else:
                for start in range(block * width, stop, BLOCK_K):
                    acc = _step(left, right, present, known, start, stop, acc, EVEN, BLOCK_K)
            total += _term(acc, token, sums, scale_row, offset, offset_row, rows, present, known, block, blocks)
    if bias is not None:
        total += tl.load(bias + columns, mask=known, other=0.0)[None, :]
    at = rows[:, None] * outputs + columns[None, :]
    tl.store(result + at, total, mask=present[:, None] & known[None, :])


@triton.jit
def _across(divisor: tl.tensor, values: tl.tensor) -> tl.tensor:
    """A number, or one of each row, in the shape of rows: `tl.div_rn` does not broadcast."""
    if len(divisor.shape) == 1:
        divisor = divisor[:, None]
    return tl.broadcast_to(divisor, values.shape)


@triton.jit
def _step(
    left: tl.tensor, right: tl.tensor, present: tl.tensor, known: tl.tensor, start: tl.tensor, stop: tl.tensor,
    acc: tl.tensor, EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`acc` with the products of up to BLOCK_K columns from `start`, before `stop`, added."""
    depth = start + tl.arange(0, BLOCK_K)
    if EVEN:
        a = tl.load(left + depth[None, :], mask=present[:, None], other=0)
        b = tl.load(right + depth[:, None], mask=known[None, :], other=0)
    else:
        inside = depth < stop
        a = tl.load(left + depth[None, :], mask=present[:, None] & inside[None, :], other=0)
        b = tl.load(right + depth[:, None], mask=known[None, :] & inside[:, None], other=0)
    return tl.dot(a, b, acc, out_dtype=tl.int32)


@triton.jit
def _term(
    acc: tl.tensor, token: tl.tensor, sums: tl.tensor, scale_row: tl.tensor, offset: tl.tensor, offset_row: tl.tensor,
    rows: tl.tensor, present: tl.tensor, known: tl.tensor, block: tl.tensor, blocks: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """What a block adds, float32 `[BLOCK_M, BLOCK_N]`, from its int32 sums of products."""
    term = acc.to(tl.float32) * token * tl.load(scale_row + block, mask=known, other=0.0)[None, :]
    if offset is not None:
        found = tl.load(sums + rows * blocks + block, mask=present, other=0).to(tl.float32)[:, None] * token
        term += found * tl.load(offset_row + block, mask=known, other=0.0)[None, :]
    return term
