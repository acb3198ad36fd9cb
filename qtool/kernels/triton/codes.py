"""Float rows by integer weights (W4A16, W8A16): stored tiles are read as they lie, no matrix is ever unpacked whole.

A tile has 16 outputs × 4 inputs, int8 or two codes a byte, and the tiles of 16 outputs lie one after the other: what a
program of `vector_kernel` reads is one stretch of memory.
"""

import triton
import triton.language as tl

_TILE_ROWS = tl.constexpr(16)
_TILE_COLUMNS = tl.constexpr(4)


@triton.jit
def _signed(nibble: tl.tensor) -> tl.tensor:
    """Two's complement of four bits, as float32."""
    return ((nibble.to(tl.int32) ^ 8) - 8).to(tl.float32)


@triton.jit
def vector_kernel(
    x: tl.tensor, tiles: tl.tensor, scales: tl.tensor, offsets: tl.tensor, parts: tl.tensor,
    inputs: tl.tensor, outputs: tl.tensor, tile_count: tl.tensor, width_tiles: tl.tensor, blocks: tl.tensor,
    share: tl.tensor, rows: tl.tensor, stretch: tl.tensor,
    NIBBLES: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """Up to ROWS rows of float32 `x` `[rows, inputs]` by 16 outputs, over `stretch` tiles: a part of each sum.

    Program ids: outputs, stretch; `parts` is float32 `[stretches, rows, outputs]`. A scale covers `width_tiles` tiles.
    """
    panel, piece = tl.program_id(0), tl.program_id(1)
    bytes_: tl.constexpr = 2 if NIBBLES else 4
    row = tl.arange(0, ROWS)[:, None, None, None]
    output = panel * _TILE_ROWS + tl.arange(0, _TILE_ROWS)
    place = output // share * blocks
    known = output < outputs
    acc = tl.zeros((ROWS, _TILE_ROWS), dtype=tl.float32)
    first = piece * stretch
    last = tl.minimum(first + stretch, tile_count)
    for start in range(first, last, TILES):
        tile = start + tl.arange(0, TILES)
        inside = tile < last
        byte = start * _TILE_ROWS * bytes_ + tl.arange(0, TILES * 16 * bytes_)
        base = tiles + panel.to(tl.int64) * tile_count * _TILE_ROWS * bytes_
        found = tl.load(base + byte, mask=byte < last * _TILE_ROWS * bytes_, other=0)
        found = tl.reshape(found, (1, TILES, 16, bytes_))
        each = tl.arange(0, bytes_)[None, None, None, :]
        at = tile[None, :, None, None] * _TILE_COLUMNS
        there = (row < rows) & inside[None, :, None, None]
        if NIBBLES:
            even, odd = at + 2 * each, at + 2 * each + 1
            low = tl.load(x + row * inputs + even, mask=there & (even < inputs), other=0.0)
            high = tl.load(x + row * inputs + odd, mask=there & (odd < inputs), other=0.0)
            sums = tl.sum(_signed(found & 15) * low + _signed(found >> 4) * high, 3)
            given = tl.sum(low + high, 3)
        else:
            low = tl.load(x + row * inputs + at + each, mask=there & (at + each < inputs), other=0.0)
            sums = tl.sum(found.to(tl.float32) * low, 3)
            given = tl.sum(low, 3)
        block = tile // width_tiles
        where = place[None, :] + block[:, None]
        present = known[None, :] & inside[:, None]
        acc += tl.sum(sums * tl.load(scales + where, mask=present, other=0.0)[None, :, :], 1)
        if offsets is not None:
            acc += tl.sum(given * tl.load(offsets + where, mask=present, other=0.0)[None, :, :], 1)
    line = tl.arange(0, ROWS)[:, None]
    target = parts + (piece * rows + line) * outputs + output[None, :]
    tl.store(target, acc, mask=(line < rows) & known[None, :])


@triton.jit
def matrix_kernel(
    x: tl.tensor, tiles: tl.tensor, scales: tl.tensor, offsets: tl.tensor, bias: tl.tensor, result: tl.tensor,
    count: tl.tensor, inputs: tl.tensor, outputs: tl.tensor, tile_count: tl.tensor, width: tl.tensor,
    blocks: tl.tensor, share: tl.tensor,
    NIBBLES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    """float32 `x` `[count, inputs]` by the codes of all outputs → float32 `[count, outputs]`.

    Codes are exact in TF32; rows are split in three such numbers, so that products have the precision of float32.
    """
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    present, known = rows < count, columns < outputs
    bytes_: tl.constexpr = 2 if NIBBLES else 4
    place = columns // share * blocks
    panel = (columns // _TILE_ROWS).to(tl.int64) * tile_count * _TILE_ROWS * bytes_ + columns % _TILE_ROWS * bytes_
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(blocks):
        first = block * width
        last = tl.minimum(first + width, inputs)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        sums = tl.zeros((BLOCK_M, 1), dtype=tl.float32)
        for start in range(first, last, BLOCK_K):
            at = start + tl.arange(0, BLOCK_K)
            inside = at < last
            a = tl.load(x + rows[:, None] * inputs + at[None, :], mask=present[:, None] & inside[None, :], other=0.0)
            inner = at // _TILE_COLUMNS * _TILE_ROWS * bytes_
            if NIBBLES:
                byte = panel[None, :] + (inner + at % _TILE_COLUMNS // 2)[:, None]
                found = tl.load(tiles + byte, mask=known[None, :] & inside[:, None], other=0)
                w = _signed(tl.where((at % 2 == 1)[:, None], found >> 4, found & 15))
            else:
                byte = panel[None, :] + (inner + at % _TILE_COLUMNS)[:, None]
                w = tl.load(tiles + byte, mask=known[None, :] & inside[:, None], other=0).to(tl.float32)
            acc = tl.dot(a, w, acc, input_precision="tf32x3")
            if offsets is not None:
                sums += tl.sum(a, 1, keep_dims=True)
        total += acc * tl.load(scales + place + block, mask=known, other=0.0)[None, :]
        if offsets is not None:
            total += sums * tl.load(offsets + place + block, mask=known, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + columns, mask=known, other=0.0)[None, :]
    tl.store(result + rows[:, None] * outputs + columns[None, :], total, mask=present[:, None] & known[None, :])
