"""Attention with both products on int8 codes (`kernels.attention`): query rows of a group of heads × all their keys.

Every float operation is the specification's, rounded by itself: kernels are compiled without fusing a product with a
sum, and divide as IEEE says. Sums are integers, so that how keys are cut does not matter. Keys are read in sweeps: for
the largest score, with a codebook whose edges are shares of the sum for that, and for the products with values. Scores
are computed again in each: the int8 product is the cheap part. The heads that share keys are rows of one product, which
is what fills a tile where a text is continued by a single token.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qtool.kernels import attention, reference
from qtool.kernels.codebook import EDGE_BITS, WholeCodebook
from qtool.kernels.reference import QMAX
from qtool.kernels.triton import float_launch, tuning
from qtool.kernels.triton.attention import LEVELS, PLAIN, PRUNED

MAX_SIZE = 256
"""Channels of a head that a program holds."""
_PLAIN = tl.constexpr(PLAIN)
_PRUNED = tl.constexpr(PRUNED)
_LEVELS = tl.constexpr(LEVELS)
_QMAX = tl.constexpr(QMAX)
_TOP_CODE = tl.constexpr(attention.LEVELS)
_LARGEST = tl.constexpr(attention.LARGEST)
_DIGIT_BITS = tl.constexpr(attention.DIGIT_BITS)
_DIGIT_MASK = tl.constexpr((1 << attention.DIGIT_BITS) - 1)
_EDGE_BITS = tl.constexpr(EDGE_BITS)
_EDGE_MASK = tl.constexpr((1 << EDGE_BITS) - 1)
_LOWEST = tl.constexpr(attention.LOWEST)
_EXP2 = tl.constexpr(attention.EXP2)
_DEGREE = tl.constexpr(len(attention.EXP2))
_INFINITY = tl.constexpr(math.inf)
_NAN = tl.constexpr(math.nan)


# Lengths grow from call to call: a form of the kernel for those that 16 divides would be compiled amid a generation.
@triton.jit(do_not_specialize=["mask_text", "mask_head", "mask_query", "queries", "keys"])
def float_attention_kernel(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, unit: tl.tensor, key_unit: tl.tensor,
    value_sums: tl.tensor, value_scale: tl.tensor, mask: tl.tensor,
    mask_text: tl.tensor, mask_head: tl.tensor, mask_query: tl.tensor, mask_key: tl.tensor,
    edges: tl.tensor, levels: tl.tensor, factor: tl.tensor, edge_count: tl.tensor,
    context: tl.tensor, codes: tl.tensor,
    queries: tl.tensor, keys: tl.tensor, size: tl.tensor, shared: tl.tensor, value_step: tl.tensor,
    KIND: tl.constexpr, BITS: tl.constexpr, RELATIVE: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Program ids: block of rows, group, text; a group has `shared` heads of `queries` rows side by side.

    int8 `query` `[texts, groups, rows, size]`, `key` `[texts, groups, keys, size]`, `value` `[texts, groups, size,
    value_step]` with the keys in a row; float32 `unit` and `key_unit` are what their rows are worth, in octaves, NaN
    where they are not numbers. `value_sums` int32 `[texts, groups, size]` are read where codes, less 127, are mixed.
    `mask` uint8, if any, has the strides `mask_*`. The codebook's `edges` `[heads, edge_count]`, `levels`
    `[heads, edge_count + 1]`, and `factor` float32 `[heads]` or None. `context` float32 `[texts, groups, rows, size]`,
    `codes` uint8 `[texts, groups, rows, keys]`.
    """
    group, text = tl.program_id(1), tl.program_id(2)
    place = text.to(tl.int64) * tl.num_programs(1) + group
    within = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = (within < shared * queries)[:, None]
    rows = (place * (shared * queries) + within)[:, None]
    head = (group * shared + within // queries)[:, None]
    channels = tl.arange(0, SIZE)[None, :]
    known = channels < size
    q = tl.load(query + rows * size + channels, mask=here & known, other=0)
    worth = tl.load(unit + rows, mask=here, other=0)
    key += place * keys * size
    key_unit += place * keys
    value += place * size * value_step
    if mask is not None:
        mask += text.to(tl.int64) * mask_text + head.to(tl.int64) * mask_head
        mask += (within % queries).to(tl.int64)[:, None] * mask_query
    codes += rows * keys

    top = tl.full((BLOCK_M, 1), -_INFINITY, tl.float32)
    broken = tl.zeros((BLOCK_M, 1), tl.int32)
    for first in range(0, keys, BLOCK_N):
        scores, there = _scores(q, worth, here, key, key_unit, mask, mask_key, first, keys, size, BLOCK_N, SIZE)
        number = scores == scores
        top = tl.maximum(top, tl.max(tl.where(number, scores, -_INFINITY), 1, keep_dims=True))
        broken |= tl.max(tl.where(number, 0, 1), 1, keep_dims=True)
    top = tl.where(top == -_INFINITY, 0.0, top)  # a row that sees nothing
    top = tl.where(broken > 0, _NAN, top)

    total = tl.zeros((BLOCK_M, 1), tl.int64)
    if KIND != _PLAIN and not RELATIVE:
        for first in range(0, keys, BLOCK_N):
            scores, there = _scores(q, worth, here, key, key_unit, mask, mask_key, first, keys, size, BLOCK_N, SIZE)
            total += tl.sum(_weights(scores, there, top, BITS), 1, keep_dims=True).to(tl.int64)

    whole = total
    if RELATIVE:
        whole = tl.full((BLOCK_M, 1), _LARGEST, tl.int64)
    carry = tl.zeros((BLOCK_M, 1), tl.int32)
    kept = tl.zeros((BLOCK_M, 1), tl.int64)
    sums = tl.zeros((BLOCK_M, SIZE), tl.int32)
    count = tl.zeros((BLOCK_M, 1), tl.int32)
    for first in range(0, keys, BLOCK_N):
        scores, there = _scores(q, worth, here, key, key_unit, mask, mask_key, first, keys, size, BLOCK_N, SIZE)
        weights = _weights(scores, there, top, BITS)
        if RELATIVE:
            total += tl.sum(weights, 1, keep_dims=True).to(tl.int64)
        at = first + tl.arange(0, BLOCK_N)
        v = tl.load(
            value + tl.arange(0, SIZE)[None, :] * value_step + at[:, None],
            mask=(at < keys)[:, None] & known, other=0,
        )  # fmt: skip
        if KIND == _LEVELS:
            found = _codes(weights, whole, edges + head * edge_count, edge_count, here)
            standing = tl.load(levels + head * (edge_count + 1) + found, mask=here & there, other=0)
            kept += tl.sum(standing, 1, keep_dims=True).to(tl.int64)
            low, high = standing & _DIGIT_MASK, standing >> _DIGIT_BITS
            sums = tl.dot(low.to(tl.int8), v, sums, out_dtype=tl.int32)
            sums += tl.dot(high.to(tl.int8), v, out_dtype=tl.int32) << _DIGIT_BITS
        else:
            if KIND == _PRUNED:
                weights = tl.where(weights >= _reached(edges + head * edge_count, whole, here), weights, 0)
                kept += tl.sum(weights, 1, keep_dims=True).to(tl.int64)
            # Error diffusion. Of the sum so far only what is behind the point makes a difference.
            behind = tl.cumsum(weights, 1) + (carry + (1 << (BITS - 1)))
            found = (behind >> BITS) - ((behind - weights) >> BITS)
            carry = (carry + tl.sum(weights, 1, keep_dims=True)) & ((1 << BITS) - 1)
            count += tl.sum(found, 1, keep_dims=True)
            sums = tl.dot((found - _QMAX).to(tl.int8), v, sums, out_dtype=tl.int32)
        tl.store(codes + at[None, :], found.to(tl.uint8), mask=here & there)

    if KIND == _LEVELS:
        mixed = sums.to(tl.float32)
        if RENORMALIZE:
            mixed = tl.div_rn(mixed, tl.maximum(kept, 1).to(tl.float32))
        elif RELATIVE:
            mixed = tl.div_rn(mixed, tl.maximum(total, 1).to(tl.float32))
        if factor is not None:
            mixed = mixed * tl.load(factor + head, mask=here, other=0)
    else:
        sums += tl.load(value_sums + place * size + channels, mask=known, other=0) * _QMAX
        mixed = tl.div_rn(sums.to(tl.float32), tl.maximum(count, 1).to(tl.float32))
        if KIND == _PRUNED and not RENORMALIZE:
            mixed = mixed * tl.div_rn(kept.to(tl.float32), tl.maximum(total, 1).to(tl.float32))
    mixed = mixed * tl.load(value_scale + group) + top * 0.0
    tl.store(context + rows * size + channels, mixed, mask=here & known)


@triton.jit
def _scores(
    q: tl.tensor, worth: tl.tensor, here: tl.tensor, key: tl.tensor, key_unit: tl.tensor, mask: tl.tensor,
    mask_key: tl.tensor, first: tl.tensor, keys: tl.tensor, size: tl.tensor,
    BLOCK_N: tl.constexpr, SIZE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """float32 scores `[BLOCK_M, BLOCK_N]` in octaves, -inf of what may not be seen, and which keys there are."""
    at = first + tl.arange(0, BLOCK_N)
    there = (at < keys)[None, :]
    channels = tl.arange(0, SIZE)[:, None]
    k = tl.load(key + at.to(tl.int64)[None, :] * size + channels, mask=there & (channels < size), other=0)
    products = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
    scores = products * worth * tl.load(key_unit + at[None, :], mask=there, other=0)
    seen = there
    if mask is not None:
        seen = tl.load(mask + at.to(tl.int64)[None, :] * mask_key, mask=here & there, other=0) != 0
    return tl.where(seen, scores, -_INFINITY), there


@triton.jit
def _weights(scores: tl.tensor, there: tl.tensor, top: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """int32 2^(score - top) in units of 2^-BITS of a code; where the difference is not a number that of `top`."""
    distance = scores - top
    distance = tl.maximum(tl.where(distance == distance, distance, 0.0), _LOWEST)
    weights = tl.floor(_exp2(distance) * (_TOP_CODE << BITS) + 0.5).to(tl.int32)
    return tl.where(there, weights, 0)


@triton.jit
def _exp2(x: tl.tensor) -> tl.tensor:
    """See `attention.exp2`: the same steps.

    Floor flushes denormal numbers to zero, where it would give -1: x + 1/2 is none, as x has 24 bits.
    """
    whole = tl.floor(x + 0.5)
    rest = x - whole
    result = rest * _EXP2[_DEGREE - 1]
    for step in tl.static_range(_DEGREE - 1):
        result = (result + _EXP2[_DEGREE - 2 - step]) * rest
    power = (whole.to(tl.int32) + 127) << 23
    return (result + 1.0) * power.to(tl.float32, bitcast=True)


@triton.jit
def _reached(edge: tl.tensor, whole: tl.tensor, here: tl.tensor) -> tl.tensor:
    """int32: the least weight that reaches an edge of each row. One of 0 has code 0, and none is 2^31 - 1."""
    limit = (tl.load(edge, mask=here, other=0).to(tl.int64) * whole + _EDGE_MASK) >> _EDGE_BITS
    return tl.minimum(tl.maximum(limit, 1), 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _codes(weights: tl.tensor, whole: tl.tensor, edges: tl.tensor, count: tl.tensor, here: tl.tensor) -> tl.tensor:
    """int32: how many of a row's edges each weight reaches."""
    found = tl.zeros_like(weights)
    for code in range(count):
        found += tl.where(weights >= _reached(edges + code, whole, here), 1, 0)
    return found


class Coded(NamedTuple):
    """What the kernel reads of int8 codes (`attention.quantized`), a head's values by channel."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    unit: torch.Tensor
    key_unit: torch.Tensor
    value_sums: torch.Tensor
    value_scale: torch.Tensor


def coded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, value_scale: torch.Tensor, scaling: float
) -> Coded:
    """From floats, as `attention.int8_attention` is given them: what `attention.quantized` makes, in fewer passes."""
    batch, groups, keys, size = key.shape
    attention.check_sums(keys, size)
    (q, q_scale), (k, k_scale) = _tokens(query.reshape(batch, groups, -1, size)), _tokens(key)
    v, v_scale = reference.quantize_static(value.float(), value_scale.view(groups, 1, 1))
    unit = q_scale.mul(scaling * attention.LOG2_E).add_(q_scale.mul(0))  # infinity becomes NaN
    key_unit = k_scale + k_scale.mul(0) + v_scale.mul_(0)
    # A tensor core reads integers along the keys; rows of whole vectors can be copied as such.
    columns = torch.nn.functional.pad(v.mT, (0, -v.shape[2] % 16))
    sums = v.sum(2, dtype=torch.int32)
    parts = (q, k, columns, unit, key_unit, sums, value_scale)
    return Coded(*(part.contiguous() for part in parts))


def _tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of rows `[…, size]` and scales `[…, 1]`, which are not finite where a row is not."""
    codes, scales = float_launch.tokens(x.float().reshape(-1, x.shape[-1]).contiguous(), None)
    return codes.view(x.shape), scales.view(*x.shape[:-1], 1)


def attend(
    given: Coded, mask: torch.Tensor | None, book: WholeCodebook | None, level_unit: torch.Tensor | None,
    context: torch.Tensor, codes: torch.Tensor,
) -> None:  # fmt: skip
    """`attention.int8_attention` into `context` float32 `[batch, heads, queries, size]` and `codes`.

    `mask` is boolean of the shape of `codes`, with any strides.
    """
    batch, heads, queries, keys = codes.shape
    groups, size = given.key.shape[1], given.key.shape[3]
    shared = heads // groups
    kind = PLAIN if book is None else PRUNED if book.levels is None else LEVELS
    edges, levels, factor, count = None, None, None, 0
    if book is not None:
        edges, levels, count = book.edges.contiguous(), book.levels, book.edges.shape[1]
        if levels is not None:
            levels = levels.contiguous()
            if not book.renormalize:
                assert level_unit is not None  # see attention.check_codebook
                factor = level_unit * float(attention.LARGEST if book.relative else 1)
    seen = None if mask is None else mask.view(torch.uint8)
    steps = (0, 0, 0, 0) if seen is None else seen.stride()
    cut = tuning.sweep(shared * queries, size)
    float_attention_kernel[(-(-shared * queries // cut.m), groups, batch)](
        *given, seen, *steps, edges, levels, factor, count, context, codes,
        queries, keys, size, shared, given.value.shape[3],
        KIND=kind, BITS=attention.FRACTION_BITS if book is None else attention.CODED_BITS,
        RELATIVE=book is not None and book.relative, RENORMALIZE=book is not None and book.renormalize,
        BLOCK_M=cut.m, BLOCK_N=cut.n, SIZE=max(32, tuning.power_of_two(size)),
        num_warps=cut.warps, enable_fp_fusion=False,
    )  # fmt: skip
