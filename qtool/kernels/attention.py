"""Attention with both products on int8 codes: the specification of the operation `int8_attention`.

Query and key rows are quantized token by token in each head, values by a static scale a head (the idea of
ZeroQuant-HERO, Yao et al. 2023, W8A8 through attention). The softmax between the two products is float, and what it
leaves are integers again: codes 0 … 254 of a row's probabilities, relative to its largest.

Rounding each probability by itself would lose the many small ones of a long row, whose sum counts: next to a key that
draws nine tenths, hundreds of others round to zero. So each key's rounding error is carried to the next (error
diffusion along the row), in integers: the codes of a row then add up to the rounded sum of its probabilities.

With a codebook (`codebook.WholeCodebook`, a few bits a weight) the codes are its codes. A key's weight is then the
whole number floor(2^(score - largest) · 254 · 2^14 + 1/2), and the sum of a row is exact: a weight reaches an edge when
it is at least that share of the sum, or with `relative` of 254 · 2^14, what the row's largest weighs. What is
multiplied by the values is the level of each code, an integer, in one digit of 7 bits or two; the sum, exact in int32,
is then

- with `renormalize` divided by the sum of the row's levels,
- else with `relative` divided by the row's sum of weights, and multiplied by `level_unit` · 254 · 2^14,
- else multiplied by `level_unit`, what one of a head's levels is worth,

in float32. A codebook without levels only prunes: the weights that reach its edge become codes 0 … 254 as they do
without one, and their mean is multiplied by what they are of the row's sum, unless `renormalize`.

Everything is decided by single IEEE operations in a fixed order or by integers: a row's codes depend on nothing but its
own query and the keys that it may see, whatever else is in the batch, and are the same with a key-value cache.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from qtool.errors import InputError
from qtool.kernels.codebook import WholeCodebook
from qtool.kernels.reference import QMAX, Operand, int8_gemm, operand, quantize_static, quantize_tokens

LEVELS = 2 * QMAX
"""The code of a row's largest probability; codes less 127 are what is multiplied."""
MAX_KEYS = (2**31 - 1) // (LEVELS * QMAX)
"""Keys that a row may have: |Σ code · value| ≤ 254 · 127 · keys must stay within int32."""
MAX_SIZE = 133_144
"""Channels that a head may have: |Σ query · key| ≤ 127² · size within int32."""
MAX_CODED_KEYS = 1 << 16
"""Keys that a row may have with a codebook: its sum of weights must stay within 2^38."""
FRACTION_BITS = 8  # places behind the point that a probability has while its rounding error is carried
CODED_BITS = 14  # the same where a codebook looks at it; half a unit more is still exact in float32
LARGEST = LEVELS << CODED_BITS
DIGIT_BITS = 7
INT32 = (1 << 31) - 1
LOG2_E = math.log2(math.e)
LOWEST = -24.0  # 2^-24 of the largest weight is less than half a unit of either
EXP2 = (0.6931471880, 0.2402265092, 0.0555035710, 0.0096180567, 0.0013390867, 0.0001546145)  # (2^x - 1) / x
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
    book: WholeCodebook | None = None,
    level_unit: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context float32 `[batch, queries, heads, size]` and probability codes uint8 `[batch, heads, queries, keys]`.

    `query` is float `[batch, heads, queries, size]`; `key` and `value` `[batch, groups, keys, size]`, where a group's
    keys serve `heads / groups` heads side by side; `value_scale` float32 `[groups]`. `mask` is true where a query may
    look, or what is added to the scores (what is less than half of its type's lowest number forbids), and broadcasts
    to `[batch, heads, queries, keys]`. A query that may look nowhere gets zeros. Scores are multiplied by `scaling`
    and, with `softcap`, become `softcap · tanh(score / softcap)`.
    Probabilities are `codes / codes.sum(-1)`, or what the codes of a `book` of all heads stand for, where it has
    levels; `level_unit` float32 `[heads]` is read where they are not renormalised. NaN or infinity in a row of the
    query, or in a key or value that it may look at, makes its context NaN. Raises InputError beyond `MAX_KEYS` and
    `MAX_SIZE`, and with a book beyond `MAX_CODED_KEYS` or for levels that are too large for as many keys.
    """
    check_codebook(book, level_unit, key.shape[2])
    (q, k, v), unit, k_unit = quantized(query, key, value, value_scale, scaling)
    batch, heads, queries, size = query.shape
    groups, keys = key.shape[1:3]
    k_unit = k_unit.transpose(-1, -2)
    allowed = None if mask is None else mask.expand(batch, heads, queries, keys).view(batch, groups, -1, queries, keys)
    codes = torch.empty((batch, groups, heads // groups, queries, keys), dtype=torch.uint8, device=query.device)
    context = torch.empty((batch, groups, heads // groups, queries, size), dtype=torch.float32, device=query.device)
    for at in ((b, g) for b in range(batch) for g in range(groups)):
        products = int8_gemm(q[at], operand(k[at])).view(-1, queries, keys)
        units, values = unit[at].view(-1, queries, 1), _Values.of(v[at])
        coder = None if book is None else _Coder.of(book, level_unit, at[1], heads // groups)
        for rows in _pieces(len(products), queries, keys):
            part = slice(None), rows
            scores = products[part].float().mul_(units[part]).mul_(k_unit[at])
            scores = capped(scores, softcap) if softcap is not None else scores
            scores = scores if allowed is None else masked(scores, allowed[at][part])
            weights, alive = _weights(scores, FRACTION_BITS if coder is None else CODED_BITS)
            if coder is None:
                codes[at][part] = found = _diffused(weights, FRACTION_BITS)
                mixed = values.mean(found)
            else:
                codes[at][part], mixed = coder.encode(weights, values)
            context[at][part] = mixed.mul_(value_scale[at[1]]).add_(alive)
    return context.flatten(1, 2).transpose(1, 2), codes.flatten(1, 2)


def check_codebook(book: WholeCodebook | None, level_unit: torch.Tensor | None, keys: int) -> None:
    """Raises InputError for more keys than sums of weights, and of levels by values, have room for."""
    if book is None:
        return
    assert book.levels is None or book.renormalize or level_unit is not None
    if keys > MAX_CODED_KEYS:
        raise InputError(f"INT8 attention with a codebook adds up {keys} weights; sums are exact for {MAX_CODED_KEYS}")
    if book.levels is None:
        return
    largest = int(book.levels.max()) if book.largest is None else book.largest
    if QMAX * largest * keys > INT32:
        most = INT32 // (QMAX * largest)
        raise InputError(f"INT8 attention adds up {keys} levels of up to {largest}; int32 has room for {most} of them")


def check_sums(keys: int, size: int) -> None:
    """Raises InputError for more keys, or channels of a head, than an accumulator holds."""
    if keys > MAX_KEYS or size > MAX_SIZE:
        raise InputError(f"INT8 attention adds up {keys} keys of {size} channels; int32 has room for {MAX_KEYS} keys")


def quantized(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, value_scale: torch.Tensor, scaling: float
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
    """int8 codes of all three, and what queries (in octaves of scores) and keys are worth.

    Both are float32 `[batch, groups, rows, 1]`; queries are `[batch, groups, heads / groups · queries, size]`, heads of
    a group side by side. What is not a number is worth NaN, and so is a key whose value is not. Raises InputError for
    more than an accumulator holds.
    """
    (batch, _, _, size), (groups, keys) = query.shape, key.shape[1:3]
    check_sums(keys, size)
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


def _weights(scores: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights int32 of rows of scores in octaves (consumed), and 0 a row, or NaN where one is not a number.

    They are 2^(score - largest) in units of 2^-`bits` of a code.
    """
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)
    alive = top.mul(0)
    weights = exp2(scores.sub_(top).nan_to_num_(0).clamp_(LOWEST, 0)).mul_(LEVELS << bits).add_(0.5)
    return weights.floor_().int(), alive


def _diffused(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes 0 … 254 of rows of weights in units of 2^-`bits` of a code.

    With S their running sum, the code of a key is the difference of round(S / 2^`bits`) before and behind it.
    """
    sums = weights.cumsum(-1).add_(1 << (bits - 1)).bitwise_right_shift_(bits)
    codes = sums.clone()
    codes[..., 1:] -= sums[..., :-1]
    return codes.to(torch.uint8)


class _Values(NamedTuple):
    """int8 values `[keys, size]` as they are multiplied, and their sums `[size]`."""

    columns: Operand
    sums: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> "_Values":
        return cls(operand(values.t().contiguous()), values.sum(0, dtype=torch.int32))

    def products(self, codes: torch.Tensor) -> torch.Tensor:
        """int8 `codes` `[..., keys]` times values: int32 `[..., size]`."""
        return int8_gemm(codes.flatten(0, -2), self.columns).view(*codes.shape[:-1], -1)

    def mean(self, codes: torch.Tensor) -> torch.Tensor:
        """The mean under uint8 `codes` `[..., keys]`: float32 `[..., size]`."""
        acc = self.products((codes.to(torch.int16) - QMAX).to(torch.int8)).add_(self.sums, alpha=QMAX)
        return acc.float().div_(_sum(codes).clamp_min_(1).float())

    def under(self, levels: torch.Tensor, largest: int | None) -> torch.Tensor:
        """The sum of int32 `levels` `[..., keys]` of up to two digits by values: float32 `[..., size]`.

        A `largest` that is known spares a look.
        """
        low, high = levels & ((1 << DIGIT_BITS) - 1), levels >> DIGIT_BITS
        acc = self.products(low.to(torch.int8))
        if bool(high.any()) if largest is None else largest >> DIGIT_BITS:
            acc.add_(self.products(high.to(torch.int8)), alpha=1 << DIGIT_BITS)
        return acc.float()


class _Coder(NamedTuple):
    """The codebooks of the heads of a group, and what a sum of levels by values is multiplied by in each."""

    book: WholeCodebook
    factor: torch.Tensor | None

    @classmethod
    def of(cls, book: WholeCodebook, level_unit: torch.Tensor | None, group: int, heads: int) -> "_Coder":
        mine = slice(group * heads, (group + 1) * heads)
        if book.levels is None or book.renormalize:
            return cls(book[mine], None)
        assert level_unit is not None  # see check_codebook
        return cls(book[mine], level_unit[mine].view(-1, 1, 1) * float(LARGEST if book.relative else 1))

    def encode(self, weights: torch.Tensor, values: _Values) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 codes of int32 weights `[heads, rows, keys]`, and what they stand for times values."""
        book, total = self.book, _sum(weights)
        found = book.codes(weights, torch.full_like(total, LARGEST) if book.relative else total)
        standing = book.standing(found, weights)
        kept = _sum(standing)
        if book.levels is None:
            codes = _diffused(standing, CODED_BITS)
            mean = values.mean(codes)
            return codes, mean if book.renormalize else mean.mul_(kept.float() / total.clamp_min(1).float())
        mixed = values.under(standing, book.largest)
        if book.renormalize or book.relative:
            mixed.div_((kept if book.renormalize else total).clamp_min(1).float())
        return found.to(torch.uint8), mixed if self.factor is None else mixed.mul_(self.factor)


def _sum(row: torch.Tensor) -> torch.Tensor:
    return row.sum(-1, keepdim=True, dtype=torch.int64)


def exp2(x: torch.Tensor) -> torch.Tensor:
    """2^x of float32 `-126 ≤ x ≤ 126`, off by at most 2e-7 of it.

    A polynomial on [-1/2, 1/2] whose steps are rounded one by one: torch's own depends in its last bit on the library,
    the instruction set and where in a vector a number stands.
    """
    whole = x.add(0.5).floor_()
    rest = x - whole
    result = torch.full_like(x, EXP2[-1])
    for coefficient in reversed((1.0, *EXP2[:-1])):
        result.mul_(rest).add_(coefficient)
    power = whole.int().add_(127).bitwise_left_shift_(23).view(torch.float32)
    return result.mul_(power)
