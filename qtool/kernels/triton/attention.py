"""Attention in integers (math.md, 9 and 9.1): some query rows of a head × all keys of their text.

Rescaling a softmax as keys come by is not exact in integers, so keys are read in sweeps: for the largest score, for the
sum of weights, and for the products with values. Scores are computed again in each: the int8 product is the cheap part.
Where all keys fit one block there is one sweep.
"""

import triton
import triton.language as tl

from qtool.kernels.triton import arithmetic

_DIGIT = tl.constexpr(7)  # bits of what is multiplied by values at a time: int8 has 7 beside its sign
_SCORE_LIMIT = tl.constexpr((1 << 23) - 1)
_EDGE_BITS = tl.constexpr(24)
_LOWEST = tl.constexpr(-(1 << 31))

PLAIN, PRUNED, LEVELS = range(3)
"""What stands in the place of probabilities: themselves, those that reach an edge, or the levels of codes."""
_PLAIN = tl.constexpr(PLAIN)
_PRUNED = tl.constexpr(PRUNED)
_LEVELS = tl.constexpr(LEVELS)


@triton.jit
def attention_kernel(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, query_step: tl.tensor, key_step: tl.tensor,
    starts: tl.tensor, key_starts: tl.tensor, align: tl.tensor, score_multiplier: tl.tensor, score_shift: tl.tensor,
    multiplier: tl.tensor, shift: tl.tensor, limit: tl.tensor, exp_b: tl.tensor, exp_c: tl.tensor,
    edges: tl.tensor, levels: tl.tensor, edge_count: tl.tensor, result: tl.tensor,
    size: tl.tensor, heads: tl.tensor, blocks: tl.tensor,
    GRID: tl.constexpr, BITS: tl.constexpr, SHARE_BITS: tl.constexpr, KIND: tl.constexpr, RELATIVE: tl.constexpr,
    RENORMALIZE: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """One head of one text: `query`, `key` and `value` are integers with `step`s between tokens, heads side by side.

    Text t has the queries `starts[t]` … `starts[t + 1]` and the keys of `key_starts`; `result` is
    `[rows, heads · size]`. Program ids: one of the `blocks` of query rows of a text, head. `score_*` are one number a
    head, `multiplier` and `shift` one a channel; the codebook's `edges` `[heads, edge_count]` and `levels`
    `[heads, edge_count + 1]`.
    """
    head, text, block = tl.program_id(1), tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start, end = tl.load(starts + text).to(tl.int64), tl.load(starts + text + 1).to(tl.int64)
    if start + block * BLOCK_M >= end:
        return
    rows = start + block * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, last = tl.load(key_starts + text).to(tl.int64), tl.load(key_starts + text + 1).to(tl.int64)
    channels = tl.arange(0, SIZE)
    here = (rows < end)[:, None] & (channels < size)[None, :]
    place = head * size + channels
    x = tl.load(query + rows[:, None] * query_step + place[None, :], mask=here, other=0).to(tl.int32)
    q, amax = arithmetic.quantize_rows(x, False)
    q = tl.where(here, q, 0).to(tl.int8)
    places = tl.load(align).to(tl.int64)
    m, s = tl.load(score_multiplier + head), tl.load(score_shift + head)

    top = tl.full((BLOCK_M, 1), _LOWEST, tl.int32)
    total = tl.zeros((BLOCK_M, 1), tl.int64)
    largest = (exp_b * exp_b + exp_c).to(tl.int64)
    kept = tl.zeros((BLOCK_M, 1), tl.int64)
    sums = tl.zeros((BLOCK_M, SIZE), tl.int32)
    book, worth = edges, levels
    if KIND != _PLAIN:
        book += head * edge_count
    if KIND == _LEVELS:
        worth += head * (edge_count + 1)
    if SINGLE:
        scores, seen = _scores(q, amax, key, key_step, last, begin, place, size, places, m, s, BLOCK_N, SIZE)
        top = tl.max(scores, 1, keep_dims=True)
        weights = tl.where(seen, arithmetic.exponential(top - scores, exp_b, exp_c, GRID), 0)
        total = tl.sum(weights.to(tl.int64), 1, keep_dims=True)
        standing = _standing(weights, total, largest, book, worth, edge_count, KIND, RELATIVE)
        kept = tl.sum(standing.to(tl.int64), 1, keep_dims=True)
        share = _shared(standing, kept if RENORMALIZE else total, KIND, BITS)
        sums = _mixed(sums, share, value, key_step, last, begin, place, size, KIND, BITS, BLOCK_N, SIZE)
    else:
        for first in range(begin, last, BLOCK_N):
            scores, seen = _scores(q, amax, key, key_step, last, first, place, size, places, m, s, BLOCK_N, SIZE)
            top = tl.maximum(top, tl.max(scores, 1, keep_dims=True))
        for first in range(begin, last, BLOCK_N):
            scores, seen = _scores(q, amax, key, key_step, last, first, place, size, places, m, s, BLOCK_N, SIZE)
            weights = tl.where(seen, arithmetic.exponential(top - scores, exp_b, exp_c, GRID), 0)
            total += tl.sum(weights.to(tl.int64), 1, keep_dims=True)
        if RENORMALIZE:
            for first in range(begin, last, BLOCK_N):
                scores, seen = _scores(q, amax, key, key_step, last, first, place, size, places, m, s, BLOCK_N, SIZE)
                weights = tl.where(seen, arithmetic.exponential(top - scores, exp_b, exp_c, GRID), 0)
                standing = _standing(weights, total, largest, book, worth, edge_count, KIND, RELATIVE)
                kept += tl.sum(standing.to(tl.int64), 1, keep_dims=True)
        for first in range(begin, last, BLOCK_N):
            scores, seen = _scores(q, amax, key, key_step, last, first, place, size, places, m, s, BLOCK_N, SIZE)
            weights = tl.where(seen, arithmetic.exponential(top - scores, exp_b, exp_c, GRID), 0)
            standing = _standing(weights, total, largest, book, worth, edge_count, KIND, RELATIVE)
            share = _shared(standing, kept if RENORMALIZE else total, KIND, BITS)
            sums = _mixed(sums, share, value, key_step, last, first, place, size, KIND, BITS, BLOCK_N, SIZE)
    if KIND == _LEVELS:
        if RENORMALIZE:
            sums = arithmetic.quotients(sums, kept, BITS)
        elif RELATIVE:
            sums = arithmetic.quotients(sums, tl.maximum(total, largest), SHARE_BITS)
    channel_m = tl.load(multiplier + place, mask=channels < size, other=0)[None, :]
    channel_s = tl.load(shift + place, mask=channels < size, other=1)[None, :]
    found = arithmetic.saturate(arithmetic.rescale(sums, channel_m, channel_s), limit)
    at = rows[:, None] * (heads * size) + place[None, :]
    tl.store(result + at, found.to(result.dtype.element_ty), mask=here)


@triton.jit
def _scores(
    q: tl.tensor, amax: tl.tensor, key: tl.tensor, step: tl.tensor, end: tl.tensor, first: tl.tensor,
    place: tl.tensor, size: tl.tensor, places: tl.tensor, m: tl.tensor, s: tl.tensor,
    BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """int32 scores `[BLOCK_M, BLOCK_N]` in units of ln2/2^grid, and which keys there are `[1, BLOCK_N]`."""
    keys = first + tl.arange(0, BLOCK_N)
    seen = keys < end
    there = seen[None, :] & (tl.arange(0, SIZE) < size)[:, None]
    k = tl.load(key + keys[None, :] * step + place[:, None], mask=there, other=0).to(tl.int8)
    products = tl.dot(q, k, out_dtype=tl.int32).to(tl.int64)
    aligned = arithmetic.shift_round(products * amax, places)
    scores = arithmetic.saturate(arithmetic.rescale(aligned, m, s), _SCORE_LIMIT)
    return tl.where(seen[None, :], scores, -_SCORE_LIMIT - 1), seen[None, :]


@triton.jit
def _standing(
    weights: tl.tensor, total: tl.tensor, largest: tl.tensor, edges: tl.tensor, levels: tl.tensor, count: tl.tensor,
    KIND: tl.constexpr, RELATIVE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What is multiplied by values in the place of int32 weights: themselves, those that are kept, or levels."""
    found = weights
    if KIND != _PLAIN:
        one = tl.full([1], 1, tl.int64)
        whole = largest if RELATIVE else total
        found = tl.zeros_like(weights)
        if KIND == _LEVELS:
            found += tl.load(levels)
        for code in range(count):
            reached = (tl.load(edges + code).to(tl.int64) * whole + ((one << _EDGE_BITS) - 1)) >> _EDGE_BITS
            # No weight reaches 2^31 - 1, and one of 0 has code 0.
            reached = tl.minimum(tl.maximum(reached, 1), arithmetic.INT32_MAX).to(tl.int32)
            if KIND == _LEVELS:
                found += tl.where(weights >= reached, tl.load(levels + code + 1) - tl.load(levels + code), 0)
            else:
                found = tl.where(weights >= reached, weights, found)
    return found


@triton.jit
def _shared(standing: tl.tensor, total: tl.tensor, KIND: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Weights as probabilities in units of 2^-BITS; levels as they are."""
    if KIND != _LEVELS:
        standing = arithmetic.shares(standing, total, BITS)
    return standing


@triton.jit
def _mixed(
    sums: tl.tensor, share: tl.tensor, value: tl.tensor, step: tl.tensor, end: tl.tensor, first: tl.tensor,
    place: tl.tensor, size: tl.tensor, KIND: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`sums + share · value`, a digit of 7 bits at a time: int32 is exact for the longest text, which was audited."""
    keys = first + tl.arange(0, BLOCK_N)
    there = (keys < end)[:, None] & (tl.arange(0, SIZE) < size)[None, :]
    v = tl.load(value + keys[:, None] * step + place[None, :], mask=there, other=0).to(tl.int8)
    bits: tl.constexpr = 14 if KIND == _LEVELS else BITS
    for digit in tl.static_range((bits + 6) // 7):
        part = ((share >> (digit * _DIGIT)) & 127).to(tl.int8)
        sums += tl.dot(part, v, out_dtype=tl.int32) << (digit * _DIGIT)
    return sums
