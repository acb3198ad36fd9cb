"""The int8 product with float scales around it (ZeroQuant): each step one IEEE operation, in the reference's order.

These kernels are compiled without fused multiply-adds, and divide by `div_rn`: what `/` becomes on a GPU is inexact.
"""

import triton
import triton.language as tl

_TINY = tl.constexpr(1.1754943508222875e-38)
_QMAX = tl.constexpr(127.0)


@triton.jit
def tokens_kernel(
    x: tl.tensor, act_scale: tl.tensor, codes: tl.tensor, scales: tl.tensor, count: tl.tensor, width: tl.tensor,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """Codes int8 and a scale for each float32 row `[count, width]`: by its largest value, or by one `act_scale`.

    A row with an infinity or NaN gets NaN for its scale.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    here = (rows < count)[:, None] & (columns < width)[None, :]
    at = rows[:, None] * width + columns[None, :]
    values = tl.load(x + at, mask=here, other=0.0)
    damage = tl.sum(values * 0.0, 1, keep_dims=True)
    if act_scale is None:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), 1, keep_dims=True), _QMAX), _TINY) + damage
        found = tl.floor(tl.div_rn(values, tl.broadcast_to(scale, values.shape)) + 0.5)
    else:
        one = tl.load(act_scale)
        scale = damage + one
        found = tl.floor(tl.div_rn(values, tl.zeros_like(values) + one) + 0.5)
        found = tl.minimum(tl.maximum(found, -_QMAX), _QMAX)
    found = tl.where(scale == scale, found, 0.0)  # a cast of NaN is anything
    tl.store(codes + at, found.to(tl.int8), mask=here)
    tl.store(scales + rows[:, None], scale, mask=(rows < count)[:, None])


@triton.jit
def float_linear_kernel(
    codes: tl.tensor, act_scales: tl.tensor, weight: tl.tensor, scales: tl.tensor, offsets: tl.tensor, bias: tl.tensor,
    result: tl.tensor, count: tl.tensor, inputs: tl.tensor, outputs: tl.tensor, width: tl.tensor, blocks: tl.tensor,
    share: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
) -> None:  # fmt: skip
    """int8 `codes` `[count, inputs]` times int8 `weight` `[outputs, inputs]` → float32 `[count, outputs]`.

    `scales` and `offsets` are `[outputs / share, blocks]`, where `width` inputs of a row share one. Each block's sums
    are multiplied by the row's scale and the block's, its offset follows, and blocks are added from the first on. With
    EVEN blocks are whole multiples of BLOCK_K.
    """
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    present, known = rows < count, columns < outputs
    depth = tl.arange(0, BLOCK_K)
    act = tl.load(act_scales + rows, mask=present, other=0.0)[:, None]
    place = columns // share * blocks
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(blocks):
        first = block * width
        last = tl.minimum(first + width, inputs)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
        sums = tl.zeros((BLOCK_M, 1), dtype=tl.int32)
        for start in range(first, last, BLOCK_K):
            at = start + depth
            if EVEN:
                a = tl.load(codes + rows[:, None] * inputs + at[None, :], mask=present[:, None], other=0)
                b = tl.load(weight + columns[None, :] * inputs + at[:, None], mask=known[None, :], other=0)
            else:
                inside = at < last
                a = tl.load(
                    codes + rows[:, None] * inputs + at[None, :], mask=present[:, None] & inside[None, :], other=0
                )
                b = tl.load(
                    weight + columns[None, :] * inputs + at[:, None], mask=known[None, :] & inside[:, None], other=0
                )
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
            if offsets is not None:
                sums += tl.sum(a.to(tl.int32), 1, keep_dims=True)
        term = acc.to(tl.float32) * act * tl.load(scales + place + block, mask=known, other=0.0)[None, :]
        if offsets is not None:
            term += sums.to(tl.float32) * act * tl.load(offsets + place + block, mask=known, other=0.0)[None, :]
        total = tl.where(block == 0, term, total + term)
    if bias is not None:
        total += tl.load(bias + columns, mask=known, other=0.0)[None, :]
    tl.store(result + rows[:, None] * outputs + columns[None, :], total, mask=present[:, None] & known[None, :])
