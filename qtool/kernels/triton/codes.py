"""Float rows by integer codes, which are read where they are stored: tiles of 16 rows × 4 columns.

The four codes of a row of a tile are a word, int32 or with two codes a byte int16: `[panels, words, 16]` holds a matrix
of `[16 · panels, 4 · words]`. A matrix is gone through in steps, parts of a column block that share a scale. Where a
block starts or ends inside a word the activations outside of it count as zeros. What splits of the steps add up to is
added in the order of the splits, so that results do not depend on which program ends first.
"""

import triton
import triton.language as tl

_PANEL = tl.constexpr(16)
_EXPONENT = tl.constexpr(0x4B000000)
_FLOAT = tl.constexpr(2.0**23)
_HALF = tl.constexpr(0x1000)
_TF32 = tl.constexpr(-0x2000)


@triton.jit
def few_rows_kernel(
    x: tl.tensor, words: tl.tensor, scale: tl.tensor, share: tl.tensor, offset: tl.tensor, offset_share: tl.tensor,
    bias: tl.tensor, result: tl.tensor, count: tl.tensor, inputs: tl.tensor, outputs: tl.tensor, width: tl.tensor,
    blocks: tl.tensor, chunks: tl.tensor, steps: tl.tensor, per: tl.tensor,
    BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """float32 `x` `[count, inputs]`, of `count` = ROWS rows → float32 `result` `[splits, count, outputs]`.

    Column blocks are `width` columns, each in `chunks` steps of WORDS words, `steps` in all; a split takes `per` of
    them. `scale` is `[outputs / share, blocks]`, `offset` likewise or None; `bias`, or None, belongs to the one split.
    """
    few_rows(
        x, words, scale, share, offset, offset_share, bias, result, count, inputs, outputs, width, blocks, chunks,
        steps, per, tl.program_id(0), outputs, BITS, ROWS, BLOCK_N, WORDS,
    )  # fmt: skip


@triton.jit
def few_rows(
    x: tl.tensor, words: tl.tensor, scale: tl.tensor, share: tl.tensor, offset: tl.tensor, offset_share: tl.tensor,
    bias: tl.tensor, result: tl.tensor, count: tl.tensor, inputs: tl.tensor, outputs: tl.tensor, width: tl.tensor,
    blocks: tl.tensor, chunks: tl.tensor, steps: tl.tensor, per: tl.tensor, number: tl.tensor, stride: tl.tensor,
    BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """Block `number` of the outputs, for the split that is the second program id; results have `stride` a row."""
    columns = number * BLOCK_N + tl.arange(0, BLOCK_N)
    known = columns < outputs
    stored = words + _column_of_words(columns, inputs)[None, :]
    scale_row = scale + (columns // share).to(tl.int64) * blocks
    offset_row = scale_row if offset is None else offset + (columns // offset_share).to(tl.int64) * blocks
    totals = ()  # a row each: tensors of three axes would be laid out anew for every product
    for _ in tl.static_range(ROWS):
        totals += (tl.zeros((WORDS, BLOCK_N), dtype=tl.float32),)  # type: ignore[assignment]
    split = tl.program_id(1)
    for step in range(split * per, tl.minimum((split + 1) * per, steps)):
        block = step // chunks
        start, stop = block * width, tl.minimum((block + 1) * width, inputs)
        place = start // 4 + step % chunks * WORDS + tl.arange(0, WORDS)
        word = tl.load(stored + place[:, None] * _PANEL, mask=(4 * place < stop)[:, None] & known[None, :], other=0)
        word = _biased(word, BITS)
        by = tl.load(scale_row + block, mask=known, other=0.0)[None, :]
        added = by if offset is None else tl.load(offset_row + block, mask=known, other=0.0)[None, :]
        sums = ()
        for row in tl.static_range(ROWS):
            part = tl.zeros((WORDS, BLOCK_N), dtype=tl.float32)
            plain = tl.zeros((WORDS,), dtype=tl.float32)
            for j in tl.static_range(4):
                depth = 4 * place + j
                inside = (depth >= start) & (depth < stop)
                value = tl.load(x + row * inputs + depth, mask=inside, other=0.0)
                part += value[:, None] * _code(word, j, BITS)
                plain += value
            total = totals[row] + part * by
            if offset is not None:
                total += plain[:, None] * added
            sums += (total,)  # type: ignore[assignment]
        totals = sums
    for row in tl.static_range(ROWS):
        found = tl.sum(totals[row], 0)
        if bias is not None:
            found += tl.load(bias + columns, mask=known, other=0.0)
        at = (split * count + row).to(tl.int64) * stride + columns
        tl.store(result + at, found, mask=known)


@triton.jit
def many_rows_kernel(
    x: tl.tensor, words: tl.tensor, scale: tl.tensor, share: tl.tensor, offset: tl.tensor, offset_share: tl.tensor,
    bias: tl.tensor, result: tl.tensor, count: tl.tensor, inputs: tl.tensor, outputs: tl.tensor, width: tl.tensor,
    blocks: tl.tensor, chunks: tl.tensor, steps: tl.tensor, per: tl.tensor,
    BITS: tl.constexpr, WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:  # fmt: skip
    """What `few_rows_kernel` computes, for any number of rows, on tensor cores. WHOLE says that there is one block.

    Codes are exact in TF32. Activations are cut in two numbers of TF32, which hold 22 of their 24 binary digits.
    """
    blocks_m, blocks_n = tl.cdiv(count, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    # Blocks that share rows of activations, and of weights, run side by side, so that the cache serves them.
    first = tl.program_id(0) // (GROUP * blocks_n) * GROUP
    height = tl.minimum(blocks_m - first, GROUP)
    at = tl.program_id(0) % (GROUP * blocks_n)
    rows = (first + at % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = at // height * BLOCK_N + tl.arange(0, BLOCK_N)
    present, known = rows < count, columns < outputs
    stored = words + _column_of_words(columns, inputs)[None, :]
    scale_row = scale + (columns // share).to(tl.int64) * blocks
    offset_row = scale_row if offset is None else offset + (columns // offset_share).to(tl.int64) * blocks
    x_row = x + rows.to(tl.int64)[:, None] * inputs
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    plain = tl.zeros((BLOCK_M,), dtype=tl.float32)
    split = tl.program_id(1)
    for step in range(split * per, tl.minimum((split + 1) * per, steps)):
        block = step // chunks
        start, stop = block * width, tl.minimum((block + 1) * width, inputs)
        place = start // 4 + step % chunks * WORDS
        where = place + tl.arange(0, WORDS)
        word = tl.load(stored + where[:, None] * _PANEL, mask=(4 * where < stop)[:, None] & known[None, :], other=0)
        codes = _codes(word, BITS, WORDS, BLOCK_N)
        depth = 4 * place + tl.arange(0, 4 * WORDS)
        inside = (depth >= start) & (depth < stop)
        value = tl.load(x_row + depth[None, :], mask=present[:, None] & inside[None, :], other=0.0)
        high = _rounded(value)
        low = _rounded(value - high)
        if WHOLE:
            total = tl.dot(low, codes, total, input_precision="tf32")
            total = tl.dot(high, codes, total, input_precision="tf32")
            if offset is not None:
                plain += tl.sum(value, 1)
        else:
            part = tl.dot(low, codes, input_precision="tf32")
            part = tl.dot(high, codes, part, input_precision="tf32")
            total += part * tl.load(scale_row + block, mask=known, other=0.0)[None, :]
            if offset is not None:
                total += tl.sum(value, 1)[:, None] * tl.load(offset_row + block, mask=known, other=0.0)[None, :]
    if WHOLE:
        total *= tl.load(scale_row, mask=known, other=0.0)[None, :]
        if offset is not None:
            total += plain[:, None] * tl.load(offset_row, mask=known, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + columns, mask=known, other=0.0)[None, :]
    to = (split * count + rows).to(tl.int64)[:, None] * outputs + columns[None, :]
    tl.store(result + to, total, mask=present[:, None] & known[None, :])


@triton.jit
def splits_kernel(
    parts: tl.tensor, bias: tl.tensor, beside: tl.tensor, result: tl.tensor, size: tl.tensor, outputs: tl.tensor,
    splits: tl.tensor, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """float32 `parts` `[splits, size]` added up, with the `bias` of rows of `outputs` and what is `beside`: `[size]`.

    Either may be None.
    """
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    here = at < size
    total = added(parts, bias, at, at % outputs, here, size, splits)
    if beside is not None:
        total += tl.load(beside + at, mask=here, other=0.0)
    tl.store(result + at, total, mask=here)


@triton.jit
def added(
    parts: tl.tensor, bias: tl.tensor, at: tl.tensor, column: tl.tensor, here: tl.tensor, size: tl.tensor,
    splits: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """What is `here` of `parts` `[splits, size]`, added in the order of the splits, and the bias of a column."""
    total = tl.zeros(at.shape, dtype=tl.float32)
    for _ in range(0, splits):
        total += tl.load(parts + at, mask=here, other=0.0)
        parts += size
    if bias is not None:
        total += tl.load(bias + column, mask=here, other=0.0)
    return total


@triton.jit
def _column_of_words(columns: tl.tensor, inputs: tl.tensor) -> tl.tensor:
    """Where the first word of a row of the matrix is."""
    return (columns // _PANEL).to(tl.int64) * (tl.cdiv(inputs, 4) * _PANEL) + columns % _PANEL


@triton.jit
def _biased(word: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Words as int32 whose codes are larger by half of their range, which makes them non-negative."""
    return word.to(tl.int32) ^ (-0x7F7F7F80 if BITS == 8 else 0x8888)


@triton.jit
def _code(word: tl.tensor, j: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """float32 of the code number j of `_biased` words.

    As the last digits of 2^23, a number that is then taken away: conversions are slow, on a GPU.
    """
    number = ((word >> (BITS * j)) & ((1 << BITS) - 1)) | _EXPONENT
    return number.to(tl.float32, bitcast=True) - (_FLOAT + (1 << (BITS - 1)))


@triton.jit
def _codes(word: tl.tensor, BITS: tl.constexpr, WORDS: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """float32 `[4 · WORDS, BLOCK_N]` of words `[WORDS, BLOCK_N]`."""
    word = _biased(word, BITS)
    even = tl.join(_code(word, 0, BITS), _code(word, 2, BITS))
    odd = tl.join(_code(word, 1, BITS), _code(word, 3, BITS))
    return tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), (4 * WORDS, BLOCK_N))


@triton.jit
def _rounded(x: tl.tensor) -> tl.tensor:
    """Rounded to TF32, half away from zero; NaN stays NaN, whose digits might overflow."""
    found = ((x.to(tl.int32, bitcast=True) + _HALF) & _TF32).to(tl.float32, bitcast=True)
    return tl.where(x == x, found, x)
