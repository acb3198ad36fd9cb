"""Attention with both products on int8 codes: the specification of the operation `int8_attention`.

Query and key rows are quantized token by token in each head, values by a static scale a head (the idea of
ZeroQuant-HERO, Yao et al. 2023, W8A8 through attention). The softmax between the two products is float, and what it
leaves are integers again: codes 0 … 254 of a row's probabilities, relative to its largest.

Rounding each probability by itself would lose the many small ones of a long row, whose sum counts: next to a key that
draws nine tenths, hundreds of others round to zero. So each key's rounding error is carried to the next (error
diffusion along the row), in integers: the codes of a row then add up to the rounded sum of its probabilities.

Everything is decided by single IEEE operations in a fixed order or by integers: a row's codes depend on nothing but its
own query and the keys that it may see, whatever else is in the batch, and are the same with a key-value cache.
"""

import math
from collections.abc import Iterator

import torch

from qtool.errors import InputError
from qtool.kernels.reference import QMAX, int8_gemm, operand, quantize_static, quantize_tokens

LEVELS = 2 * QMAX
"""The code of a row's largest probability; codes less 127 are what is multiplied."""
MAX_KEYS = (2**31 - 1) // (LEVELS * QMAX)
"""Keys that a row may have: |Σ code · value| ≤ 254 · 127 · keys must stay within int32."""
MAX_SIZE = 133_144
"""Channels that a head may have: |Σ query · key| ≤ 127² · size within int32."""
_FRACTION_BITS = 8  # places behind the point that a probability has while its rounding error is carried
LOG2_E = math.log2(math.e)
_LOWEST = -24.0  # 2^-24 of the largest weight is less than half a unit of those places
_EXP2 = (0.6931471880, 0.2402265092, 0.0555035710, 0.0096180567, 0.0013390867, 0.0001546145)  # (2^x - 1) / x
_PIECE = 1 << 16  # scores at a time: their copies stay in the cache


def int8_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    value_scale: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context float32 `[batch, queries, heads, size]` and probability codes uint8 `[batch, heads, queries, keys]`.

    `query` is float `[batch, heads, queries, size]`; `key` and `value` `[batch, groups, keys, size]`, where a group's
    keys serve `heads / groups` heads side by side; `value_scale` float32 `[groups]`. `mask` is true where a query may
    look, or what is added to the scores (what is less than half of its type's lowest number forbids), and broadcasts
    to `[batch, heads, queries, keys]`. A query that may look nowhere gets zeros. Scores are multiplied by `scaling`
    and, with `softcap`, become `softcap · tanh(score / softcap)`.
    Probabilities are `codes / codes.sum(-1)`. NaN or infinity in a row of the query, or in a key or value that it may
    look at, makes its context NaN. Raises InputError beyond `MAX_KEYS` and `MAX_SIZE`.
    """
    (q, k, v), unit, k_unit = quantized(query, key, value, value_scale, scaling)
    batch, heads, queries, size = query.shape
    groups, keys = key.shape[1:3]
    k_unit = k_unit.transpose(-1, -2)
    allowed = None if mask is None else mask.expand(batch, heads, queries, keys).view(batch, groups, -1, queries, keys)
    codes = torch.empty((batch, groups, heads // groups, queries, keys), dtype=torch.uint8)
    context = torch.empty((batch, groups, heads // groups, queries, size), dtype=torch.float32)
    for at in ((b, g) for b in range(batch) for g in range(groups)):
        products = int8_gemm(q[at], operand(k[at])).view(-1, queries, keys)
        units = unit[at].view(-1, queries, 1)
        alive = torch.empty_like(units)
        for rows in _pieces(len(products), queries, keys):
            part = slice(None), rows
            scores = products[part].float().mul_(units[part]).mul_(k_unit[at])
            scores = capped(scores, softcap) if softcap is not None else scores
            scores = scores if allowed is None else masked(scores, allowed[at][part])
            codes[at][part], alive[part] = _probabilities(scores)
        context[at] = (
            _weighted(codes[at].flatten(0, 1), v[at]).view_as(context[at]).mul_(value_scale[at[1]]).add_(alive)
        )
    return context.flatten(1, 2).transpose(1, 2), codes.flatten(1, 2)


def quantized(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, value_scale: torch.Tensor, scaling: float
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
    """int8 codes of all three, and what queries (in octaves of scores) and keys are worth.

    Both are float32 `[batch, groups, rows, 1]`; queries are `[batch, groups, heads / groups · queries, size]`, heads of
    a group side by side. What is not a number is worth NaN, and so is a key whose value is not. Raises InputError for
    more than an accumulator holds.
    """
    (batch, _, _, size), (groups, keys) = query.shape, key.shape[1:3]
    if keys > MAX_KEYS or size > MAX_SIZE:
        raise InputError(f"INT8 attention adds up {keys} keys of {size} channels; int32 has room for {MAX_KEYS} keys")
    query, key = query.float().reshape(batch, groups, -1, size), key.float()
    q, q_scale = quantize_tokens(query)
    k, k_scale = quantize_tokens(key)
    v, v_scale = quantize_static(value.float(), value_scale.view(groups, 1, 1))
    unit = q_scale.mul_(scaling * LOG2_E).add_(query.mul(0).sum(-1, keepdim=True))
    return (q, k, v), unit, k_scale + key.mul(0).sum(-1, keepdim=True) + v_scale.mul_(0)


def _pieces(heads: int, queries: int, keys: int) -> Iterator[slice]:
    step = max(1, _PIECE // max(1, heads * keys))
    return (slice(start, start + step) for start in range(0, queries, step))


def capped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """`softcap · tanh(score / softcap)` of scores in octaves."""
    return scores.div_(softcap * LOG2_E).tanh_().mul_(softcap * LOG2_E)


def masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores in octaves, -inf where a query may not look."""
    if mask.dtype == torch.bool:
        return scores.masked_fill_(~mask, -torch.inf)
    forbidden = mask <= torch.finfo(mask.dtype).min / 2
    return scores.add_(mask.float().mul(LOG2_E)).masked_fill_(forbidden, -torch.inf)


def _probabilities(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0 … 254 of rows of scores in octaves (consumed), and 0 a row, or NaN where one is not a number.

    With weights w = 2^(score - largest) in units of 1/256 code and S their running sum, the code of a key is the
    difference of round(S / 256) before and behind it.
    """
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)
    alive = top.mul(0)
    weights = exp2(scores.sub_(top).nan_to_num_(0).clamp_(_LOWEST, 0)).mul_(LEVELS << _FRACTION_BITS).add_(0.5)
    sums = weights.floor_().int().cumsum(-1).add_(1 << (_FRACTION_BITS - 1)).bitwise_right_shift_(_FRACTION_BITS)
    codes = sums.clone()
    codes[..., 1:] -= sums[..., :-1]
    return codes.to(torch.uint8), alive


def _weighted(codes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The mean of int8 `values` `[keys, size]` under uint8 `codes` `[rows, keys]`: float32 `[rows, size]`."""
    signed = (codes.to(torch.int16) - QMAX).to(torch.int8)
    acc = int8_gemm(signed, operand(values.t().contiguous()))
    acc += QMAX * values.sum(0, dtype=torch.int32)
    total = codes.sum(-1, keepdim=True, dtype=torch.int32).clamp_min_(1)
    return acc.float().div_(total)


def exp2(x: torch.Tensor) -> torch.Tensor:
    """2^x of float32 `-126 ≤ x ≤ 126`, off by at most 2e-7 of it.

    A polynomial on [-1/2, 1/2] whose steps are rounded one by one: torch's own depends in its last bit on the library,
    the instruction set and where in a vector a number stands.
    """
    whole = x.add(0.5).floor_()
    rest = x - whole
    result = torch.full_like(x, _EXP2[-1])
    for coefficient in reversed((1.0, *_EXP2[:-1])):
        result.mul_(rest).add_(coefficient)
    power = whole.int().add_(127).bitwise_left_shift_(23).view(torch.float32)
    return result.mul_(power)
