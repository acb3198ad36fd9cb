"""The specification of every operation: plain torch on integer dtypes, available everywhere.

The integer product runs on `torch._int_mm` where a self-test finds it exact. Without VNNI instructions that function
adds pairs of unsigned × signed products in 16 bits and saturates; weights split in two digits keep every pair sum
within 255 · 64 · 2 = 32,640 and are exact there too. Where neither holds, torch's integer matmul does the work.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch

from qtool.kernels.codebook import WholeCodebook
from qtool.numerics.dyadic import rescale
from qtool.numerics.qtensor import TILE_COLUMNS, TILE_ROWS, on_blocks, rows_of, unpack_nibbles

QMAX = 127
_TINY = torch.finfo(torch.float32).tiny
_TABLE_ROWS = 512  # of a matrix of codes, expanded to float at a time: they should stay in the cache

Product = Literal["direct", "split", "double", "integer"]


@dataclass(frozen=True)
class Operand:
    """A weight ready for `int8_gemm`: digits are int8 `[out, in]`, value = codes, or 2 · digits[0] + digits[1].

    Scales are shared by `width` inputs of a row, by all when it is None.
    """

    digits: tuple[torch.Tensor, ...]
    product: Product
    width: int | None = None

    @property
    def in_features(self) -> int:
        """Length of a row."""
        return self.digits[0].shape[1]


@dataclass
class Codes:
    """Tiled codes of logical `shape` `(out, in)`, `width` inputs to a scale, that floats are multiplied by."""

    codes: torch.Tensor
    shape: tuple[int, int]
    width: int


def operand(codes: torch.Tensor, product: Product | None = None, width: int | None = None) -> Operand:
    """Prepare int8 `codes` `[out, in]` for the exact product of this machine (or for the `product` named)."""
    product = product or ("double" if codes.is_cuda else exact_product())
    if codes.shape[1] == 1:  # torch._int_mm leaves the product with a matrix of one column unwritten (torch 2.13)
        product = "double" if codes.is_cuda else "integer"
    if product == "split":
        return Operand((codes >> 1, codes & 1), product, width)
    return Operand((codes,), product, width)


def whole_codes(stored: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """int8 codes `[out, in]` from either layout, nibbles unpacked."""
    return rows_of(unpack_nibbles(stored, TILE_COLUMNS) if stored.dtype == torch.uint8 else stored, shape)


def int8_gemm(a: torch.Tensor, weight: Operand, columns: slice = slice(None)) -> torch.Tensor:
    """`a @ W[:, columns]^T`: int8 `[tokens, in]` × `[out, in]` → int32 `[tokens, out]`, exact while in ≤ 133,144."""
    digits = [digit[:, columns].t() for digit in weight.digits]
    if weight.product == "integer":
        return a.int() @ digits[0].int()
    if weight.product == "double":
        return whole_product(a, digits[0])
    if a.shape[0] == 0:
        return a.new_zeros((0, digits[0].shape[1]), dtype=torch.int32)
    if weight.product == "direct":
        return torch._int_mm(a, digits[0])
    return torch._int_mm(a, digits[0]).mul_(2).add_(torch._int_mm(a, digits[1]))


def whole_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int32 `a @ b` of integers whose sums fit int32, on any device.

    torch multiplies matrices of integers on the CPU alone; elsewhere float64 holds every sum exactly.
    """
    if a.is_cuda:
        return (a.double() @ b.double()).int()
    return a.int() @ b.int()


@functools.cache
def exact_product() -> Product:
    """The fastest product that passes the self-test on this machine."""
    order: tuple[Product, ...] = ("direct", "split")
    return next((product for product in order if _passes_self_test(product)), "integer")


def _passes_self_test(product: Product) -> bool:
    """Compare with the int64 product at the extremes, where 16-bit saturation shows, and on mixed signs."""
    k, tokens, out = 96, 17, 24
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randint(-QMAX, QMAX + 1, (tokens, k), generator=generator, dtype=torch.int8)
    full = torch.full((tokens, k), QMAX, dtype=torch.int8)
    weights = torch.full((out, k), QMAX, dtype=torch.int8)
    weights[1::2] = -QMAX - 1  # which asymmetric weights use
    weights[2::3] = torch.randint(-QMAX, QMAX + 1, (k,), generator=generator, dtype=torch.int8)
    try:
        return all(
            torch.equal(int8_gemm(a, operand(weights, product)).long(), a.long() @ weights.long().t())
            for a in (full, -full, mixed, full[:1])
        )
    except RuntimeError:  # this build of torch has no such kernel for this CPU
        return False


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-wise symmetric INT8 (ZeroQuant, section 3.2): float32 `[tokens, in]` → codes, scale `[tokens, 1]`.

    scale = max|x| / 127 of the row and codes = floor(x / scale + 1/2), so |codes| ≤ 127 without a clip. A row of zeros
    gives zeros; a row with an infinity or NaN gives a scale that is not finite, so that the damage stays visible.
    """
    top = x.abs().amax(dim=-1, keepdim=True)
    # torch multiplies by 1/127 on a GPU if it is given a number: not the same bits. By a tensor it divides.
    scale = top.div_(top.new_full((), QMAX)).clamp_min_(_TINY)
    return torch.floor_(torch.div(x, scale).add_(0.5)).to(torch.int8), scale


def quantize_static(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 by one calibrated scale: float32 `[tokens, in]` → codes in ±127 (saturating), scale `[tokens, 1]`.

    The scale of a row is `scale`, or NaN where the row holds an infinity or NaN, which codes cannot show.
    """
    codes = torch.floor_(torch.div(x, scale).add_(0.5)).clamp_(-QMAX, QMAX).to(torch.int8)
    return codes, x.mul(0).sum(dim=-1, keepdim=True).add_(scale)


# Integer-only operations (I-BERT, Kim et al. 2021). docs/math.md numbers the equations and bounds the errors.

RECIPROCAL_BITS = 46
"""Fixed-point places of 1/σ in LayerNorm and of 1/Σ in softmax: quotients stay below 2^47, products in int64."""
NORM_BITS = 30
"""A normalised value y/(σ·√n) is an integer in units of 2^-30."""
SCORE_BITS = 24
"""Attention scores saturate at ±2^23 units of ln2/2^grid: far beyond what exp can tell from zero."""
_INT32_MAX = (1 << 31) - 1
_QUOTIENT_BITS = 29  # of a reciprocal beyond those of what it divides by: at most 2^30
_EXTRA_BITS = 22  # of a row's reciprocal beyond its largest value: codes are then off by at most 2^-22 before rounding
_ROOT_BITS = 60  # a variance is shifted up to about this length before its root is taken
_PIECE = 1 << 15  # elements at a time
_EXP_A, _EXP_B, _EXP_C = 0.35815147, 1.3536624322664372, 0.3437225370424528
_EXP_OCTAVES = 30  # exp(-30 ln 2) = 1e-9 and everything below it is zero


def saturate(x: torch.Tensor, bits: int, what: str = "") -> torch.Tensor:
    """Clip to the symmetric range of `bits`, ±(2^(bits-1) - 1), as int32; counted inside `counting_saturation`.

    `what` tells values of one module apart.
    """
    limit = (1 << (bits - 1)) - 1
    meter = _METER.get()
    if meter is not None:
        meter.add(what, (x.abs() > limit).sum(-1).flatten(), x.shape[-1])
    return x.clamp(-limit, limit).int()


def _pieces(rows: int, width: int) -> Iterator[slice]:
    """Stretches of rows whose int64 copies stay in the cache."""
    step = max(1, _PIECE // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))


class SaturationMeter:
    """How many values were clipped, and how many there were, by the `site` named last; padding never counts."""

    def __init__(self) -> None:
        self.site = ""
        self.counts: dict[str, tuple[int, int]] = {}
        self._rows: dict[tuple[str, str, int], list[torch.Tensor]] = {}

    def add(self, what: str, clipped: torch.Tensor, width: int) -> None:
        """Note how many of its `width` values each row `[rows]` lost, at the present site."""
        self._rows.setdefault((self.site, what, width), []).append(clipped)

    def end_batch(self, real: torch.Tensor) -> None:
        """Count what came since the last batch. `real` is boolean `[batch, tokens]`.

        Rows are tokens, or tokens of each head; where there are fewer than tokens, texts.
        """
        for (site, _, width), parts in self._rows.items():
            rows = torch.cat(parts)
            repeats = len(rows) // real.numel()
            if repeats:
                rows = rows[real[:, None].expand(-1, repeats, -1).flatten()]
            before = self.counts.get(site, (0, 0))
            self.counts[site] = before[0] + int(rows.sum()), before[1] + len(rows) * width
        self._rows = {}


_METER: ContextVar[SaturationMeter | None] = ContextVar("saturation meter", default=None)


@contextmanager
def counting_saturation(meter: SaturationMeter) -> Iterator[None]:
    """While active, `saturate` reports to `meter`. Other backends count nothing: see `kernels.using`."""
    token = _METER.set(meter)
    try:
        yield
    finally:
        _METER.reset(token)


def bit_length(n: torch.Tensor) -> torch.Tensor:
    """Binary digits of int64 `n` ≥ 0, as Python's `int.bit_length`."""
    powers = torch.bitwise_left_shift(1, torch.arange(63, device=n.device))
    return (n.unsqueeze(-1) >= powers).sum(-1)


def isqrt(n: torch.Tensor) -> torch.Tensor:
    """floor(√n) of int64 `0 ≤ n < 2^62` by Newton's method (math.md, 7)."""
    x = torch.bitwise_left_shift(1, (bit_length(n) + 1) >> 1)
    for _ in range(8):  # enough from this start for 62 bits; the minimum keeps a root that was reached
        x = torch.minimum(x, (x + torch.div(n, x.clamp_min(1), rounding_mode="floor")) >> 1)
    return x.where(n > 0, 0)


def quantize_rows(x: torch.Tensor, *, unsigned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token-wise INT8 in integers (math.md, 3): int32 `[..., in]` → int8 codes and the row's largest magnitude.

    `x ≈ codes · amax / 127`, or for non-negative rows, `unsigned`, `(codes + 127) · amax / 254`. amax is int64
    `[..., 1]`, at least 1; |codes| ≤ 127 without a clip.
    """
    rows = x.reshape(-1, x.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    amax = torch.maximum(rows.amax(-1, keepdim=True), -rows.amin(-1, keepdim=True)).long().clamp_min_(1)
    places = bit_length(amax) + _EXTRA_BITS
    levels = torch.bitwise_left_shift(2 * QMAX if unsigned else QMAX, places)
    factor, half = torch.div(levels, amax, rounding_mode="floor"), torch.bitwise_left_shift(1, places - 1)
    for part in _pieces(*rows.shape):
        wide = (rows[part].long() * factor[part]).add_(half[part]).bitwise_right_shift_(places[part])
        codes[part] = wide.sub_(QMAX) if unsigned else wide
    return codes.view(x.shape), amax.view(*x.shape[:-1], 1)


def shift_round(x: torch.Tensor, places: torch.Tensor | int) -> torch.Tensor:
    """`x / 2^places` rounded half up, int64; `places` may be 0."""
    places = torch.as_tensor(places, dtype=torch.int64, device=x.device)
    return (x.long() + (torch.bitwise_left_shift(1, places) >> 1)).bitwise_right_shift_(places)


def integer_gelu(x: torch.Tensor, root: torch.Tensor, one: torch.Tensor, pre_shift: torch.Tensor | int) -> torch.Tensor:
    """i-GELU (I-BERT, eq. 9; math.md, 5): int32 → int64, the product `q · (erf + 1)` before it is rescaled.

    With scale S of `x` and Se = S/√2: `root` = floor(1.769/Se), `one` = round(1/(0.2888·Se²)), both int64 scalars.
    """
    x = x.long()
    missing = root - torch.minimum(x.abs(), root)
    erf = x.sign() * (one - missing * missing)
    return x * shift_round(erf + one, pre_shift)


def exp_constants(grid: int) -> tuple[int, int]:
    """(b, c) of i-exp in units of ln2/2^grid and of its output, for `integer_exp`."""
    unit = math.log(2) / (1 << grid)
    return math.floor(_EXP_B / unit + 0.5), math.floor(_EXP_C / (_EXP_A * unit * unit) + 0.5)


def integer_exp(distance: torch.Tensor, grid: int) -> torch.Tensor:
    """i-exp (I-BERT, eq. 14; math.md, 4) of `-distance · ln2/2^grid`: int ≥ 0 → int, `exp(0)` = b² + c.

    With octaves of 2^grid there is no division: the quotient is a shift, the remainder a mask.
    """
    b, c = exp_constants(grid)
    octave = distance >> grid
    root = b - (distance & ((1 << grid) - 1))
    return ((root * root + c) >> octave.clamp(max=_EXP_OCTAVES)).masked_fill_(octave >= _EXP_OCTAVES, 0)


def integer_weights(scores: torch.Tensor, allowed: torch.Tensor, grid: int) -> torch.Tensor:
    """i-exp of each row's distances to its largest score: int32 scores in units of ln2/2^grid → int32 weights.

    `allowed` is boolean and broadcasts: other keys get 0.
    """
    lowest = torch.iinfo(scores.dtype).min
    top = scores.masked_fill(~allowed, lowest).amax(-1, keepdim=True)
    return integer_exp((top - scores).clamp_(min=0), grid).masked_fill_(~allowed, 0)


def integer_shares(weights: torch.Tensor, total: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 weights as shares of int64 `total` `[..., 1]`, in units of 2^-bits, at most 2^bits - 1 (math.md, 6)."""
    reciprocal = torch.div(1 << RECIPROCAL_BITS, total.clamp_min(1), rounding_mode="floor")
    places = RECIPROCAL_BITS - bits
    return (
        weights.long()
        .mul_(reciprocal)
        .add_(1 << (places - 1))
        .bitwise_right_shift_(places)
        .clamp_(max=(1 << bits) - 1)
        .int()
    )


def integer_softmax(scores: torch.Tensor, allowed: torch.Tensor, grid: int, bits: int) -> torch.Tensor:
    """i-softmax (math.md, 6) over the last axis: int32 scores in units of ln2/2^grid → int32 in units of 2^-bits.

    `allowed` is boolean and broadcasts: other keys get 0, and so does a whole row without an allowed key.
    """
    weights = integer_weights(scores, allowed, grid)
    return integer_shares(weights, weights.sum(-1, keepdim=True, dtype=torch.int64), bits)


def quotients(sums: torch.Tensor, total: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 `sums` `[..., size]` over int64 `total` `[..., 1]`, in units of 2^-bits, saturated to int32 (math.md, 9.1).

    By one reciprocal a row, of at most 31 bits; `bits` are at most 29 more than the total has.
    """
    total = total.clamp_min(1)
    places = (bit_length(total) + _QUOTIENT_BITS).clamp_(max=62)
    reciprocal = torch.div(torch.bitwise_left_shift(1, places), total, rounding_mode="floor")
    return shift_round(sums.long() * reciprocal, places - bits).clamp_(-_INT32_MAX, _INT32_MAX).int()


def share_bits(grid: int) -> int:
    """Places of what is divided by a row's sum of weights, so that it has 7 beside the weight of its largest score."""
    b, c = exp_constants(grid)
    return (b * b + c).bit_length() + 7


def coded_context(
    weights: torch.Tensor, value: torch.Tensor, book: WholeCodebook, grid: int, bits: int
) -> torch.Tensor:
    """What the codes of int32 weights `[heads, queries, keys]` stand for times int32 `value` `[heads, keys, size]`.

    int32; in units of the levels', or of 2^-bits with `renormalize` or without levels. Relative levels that are not
    renormalised are divided by the row's sum of weights, in units of 2^-`share_bits`.
    """
    b, c = exp_constants(grid)
    total = weights.sum(-1, keepdim=True, dtype=torch.int64)
    largest = torch.full_like(total, b * b + c)
    codes = book.codes(weights, largest if book.relative else total)
    standing = book.standing(codes, weights)
    kept = standing.sum(-1, keepdim=True, dtype=torch.int64) if book.renormalize else total
    if book.levels is None:
        return whole_product(integer_shares(standing, kept, bits), value)
    sums = whole_product(standing, value)
    if book.renormalize:
        return quotients(sums, kept, bits)
    return quotients(sums, torch.maximum(kept, largest), share_bits(grid)) if book.relative else sums


def integer_tanh(x: torch.Tensor, grid: int) -> torch.Tensor:
    """i-tanh (math.md, 8) of `x · ln2/2^grid`: int32 → int32 in units of 2^-15, odd, |result| ≤ 32767."""
    x = x.long()
    one = sum(value * value if i == 0 else value for i, value in enumerate(exp_constants(grid)))
    power = integer_exp(2 * x.abs(), grid)
    value = torch.div(((one - power) << 15) + ((one + power) >> 1), one + power, rounding_mode="floor")
    return (x.sign() * value.clamp(max=(1 << 15) - 1)).int()


Rescale = tuple[torch.Tensor, torch.Tensor]
"""A dyadic number a channel: int32 `multiplier` and `shift` that broadcast against the last axis."""


def integer_linear(
    codes: torch.Tensor,
    amax: torch.Tensor | None,
    weight: Operand,
    row_sums: torch.Tensor | None,
    align: torch.Tensor,
    bias: torch.Tensor,
    to_output: Rescale,
    bits: int,
) -> torch.Tensor:
    """int8 `[..., in]` → int32 `[..., out]` of `bits` (math.md, 2 and 3).

    `Σ codes·W`, times the row's `amax` and shifted by `align` to the unit that all rows share, plus int32 `bias`,
    rescaled and saturated. `row_sums`, int32 `[out]`, adds the 127 that codes of non-negative rows lack.
    """
    acc = int8_gemm(codes.reshape(-1, codes.shape[-1]), weight)
    if row_sums is not None:
        acc += QMAX * row_sums
    scale = None if amax is None else amax.reshape(-1, 1)
    for part in _pieces(*acc.shape):
        total = acc[part].long()
        if scale is not None:
            total = shift_round(total.mul_(scale[part]), align)
        acc[part] = saturate(rescale(total.add_(bias), *to_output), bits)
    return acc.view(*codes.shape[:-1], acc.shape[-1])


def integer_norm(x: torch.Tensor, eps: torch.Tensor, to_output: Rescale, bias: torch.Tensor, bits: int) -> torch.Tensor:
    """i-LayerNorm (I-BERT, section 3.6; math.md, 7): int32 `[..., n]` of up to 24 bits → int32 of `bits`.

    `eps` is n·ε in units of the squared input. Small variances get up to 15 more binary places before the root.
    """
    n = x.shape[-1]
    rows = x.reshape(-1, n)
    result = torch.empty(rows.shape, dtype=torch.int32, device=x.device)
    limit = (1 << (NORM_BITS + 1)) - 1
    for part in _pieces(*rows.shape):
        wide = rows[part].long()
        y = wide.sub_(torch.div(2 * wide.sum(-1, keepdim=True) + n, 2 * n, rounding_mode="floor"))
        variance = (y * y).sum(-1, keepdim=True) + eps
        extra = ((_ROOT_BITS - bit_length(variance)) >> 1).clamp_(0, 15)
        root = isqrt(torch.bitwise_left_shift(variance, 2 * extra)).clamp_min_(1)
        inverse = torch.div(torch.bitwise_left_shift(1, extra + RECIPROCAL_BITS), root, rounding_mode="floor")
        normal = shift_round(y.mul_(inverse), RECIPROCAL_BITS - NORM_BITS).clamp_(-limit, limit)
        result[part] = saturate(rescale(normal, *to_output).add_(bias), bits)
    return result.view(x.shape)


def integer_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    real: torch.Tensor,
    align: torch.Tensor,
    to_scores: Rescale,
    to_context: Rescale,
    *,
    grid: int,
    bits: int,
    context_bits: int,
    book: WholeCodebook | None = None,
) -> torch.Tensor:
    """Attention in integers (math.md, 9): int32 query, int8 key and value `[batch, tokens, heads, size]`.

    Each query row of a head is quantized to INT8 by its own largest value. `real` is boolean `[batch, tokens]`: false
    keys get no weight. `to_scores` leads to units of ln2/2^grid and is `[heads, 1, 1]`, `to_context` is
    `[heads, 1, size]`; probabilities have `bits` bits, or are the codes of a `book` (math.md, 9.1): then `to_context`
    starts from the units of `coded_context`. Returns int32 `[batch, tokens, heads · size]` of `context_bits`.
    """
    batch, tokens, heads, size = query.shape
    codes, amax = quantize_rows(query)
    rows = [x.transpose(1, 2).flatten(0, 1).int() for x in (codes, key, value)]  # [batch · heads, tokens, size]
    amax = amax.transpose(1, 2).flatten(0, 1)
    allowed = real[:, None, None, :].expand(-1, heads, -1, -1).flatten(0, 1)
    (score_m, score_s), (context_m, context_s) = (
        [x.expand(batch, *x.shape).flatten(0, 1) for x in pair] for pair in (to_scores, to_context)
    )
    books = None if book is None else book.repeated(batch)
    result = torch.empty((batch * heads, tokens, size), dtype=torch.int32, device=query.device)
    for part in _pieces(batch * heads, tokens * tokens):
        q, k, v = (x[part] for x in rows)
        products = whole_product(q, k.transpose(1, 2)).long().mul_(amax[part])
        scores = saturate(rescale(shift_round(products, align), score_m[part], score_s[part]), SCORE_BITS, "scores")
        if books is None:
            mixed = whole_product(integer_softmax(scores, allowed[part], grid, bits), v)
        else:
            mixed = coded_context(integer_weights(scores, allowed[part], grid), v, books[part], grid, bits)
        result[part] = saturate(rescale(mixed, context_m[part], context_s[part]), context_bits)
    return result.view(batch, heads, tokens, size).transpose(1, 2).flatten(2)


class Reference:
    """The backend that the others are compared with."""

    name = "reference"
    saturate = staticmethod(saturate)
    rescale = staticmethod(rescale)
    quantize_rows = staticmethod(quantize_rows)
    integer_linear = staticmethod(integer_linear)
    integer_norm = staticmethod(integer_norm)
    integer_attention = staticmethod(integer_attention)
    integer_gelu = staticmethod(integer_gelu)
    integer_tanh = staticmethod(integer_tanh)

    def prepare(self, codes: torch.Tensor, shape: tuple[int, int], width: int | None = None) -> Any:
        """A row-major operand from codes of logical `shape` `(out, in)` in either layout."""
        return operand(whole_codes(codes, shape), width=width)

    def row_sums(self, operand: Operand) -> torch.Tensor:
        """int32 `[out]`."""
        sums = [digit.sum(1, dtype=torch.int32) for digit in operand.digits]
        return sums[0] if operand.product != "split" else 2 * sums[0] + sums[1]

    def int8_linear(
        self,
        x: torch.Tensor,
        operand: Operand,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        act_scale: torch.Tensor | None,
        weight_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`((acc · act scale) · weight scale) + bias` in float32, in this order; one term a column block.

        With a `weight_offset` each term is followed by `(sum · act scale) · offset`, added before the next block's; sum
        is that of the block's activation codes. `x` is float32 `[tokens, in]`; the result is float32 `[tokens, out]`.
        """
        if act_scale is None:
            codes, act_scale = quantize_tokens(x)
        else:
            codes, act_scale = quantize_static(x, act_scale)
        out_features = operand.digits[0].shape[0]
        row_scale = weight_scale.repeat_interleave(out_features // weight_scale.shape[0], dim=0)
        width = operand.width or operand.in_features
        result: torch.Tensor | None = None
        for block, scale in enumerate(row_scale.unbind(dim=1)):
            columns = slice(block * width, (block + 1) * width)
            term = int8_gemm(codes[:, columns], operand, columns).float().mul_(act_scale).mul_(scale)
            if weight_offset is not None:
                offset = weight_offset[:, block].repeat_interleave(out_features // weight_offset.shape[0])
                sums = codes[:, columns].sum(1, keepdim=True, dtype=torch.int32)
                term.add_(sums.float().mul_(act_scale) * offset)
            result = term if result is None else result.add_(term)
        assert result is not None  # a weight has at least one column block
        return result if bias is None else result.add_(bias)

    def prepare_codes(self, codes: torch.Tensor, shape: tuple[int, int], width: int) -> Any:
        """Tiled codes as they are."""
        return Codes(codes, shape, width)

    def code_linear(
        self,
        x: torch.Tensor,
        operand: Codes,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        weight_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`x` float32 `[tokens, in]` → float32 `[tokens, out]`.

        Some rows of weights at a time are what the codes stand for, rounded to float32 by each operation.
        """
        outputs, inputs = operand.shape
        scale, offset = (
            None if values is None else values.repeat_interleave(outputs // values.shape[0], 0)
            for values in (weight_scale, weight_offset)
        )
        result = torch.empty((x.shape[0], outputs), dtype=torch.float32, device=x.device)
        for first in range(0, outputs, _TABLE_ROWS):
            rows = slice(first, min(first + _TABLE_ROWS, outputs))
            panels = operand.codes[first // TILE_ROWS : -(-rows.stop // TILE_ROWS)]
            weight = whole_codes(panels, (rows.stop - first, inputs)).float()
            on_blocks(weight, "mul", None if scale is None else scale[rows], operand.width)
            on_blocks(weight, "add", None if offset is None else offset[rows], operand.width)
            result[:, rows] = x @ weight.t()
        return result if bias is None else result.add_(bias)

    @staticmethod
    def int8_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See `attention.int8_attention`, which is built of the functions above."""
        from qtool.kernels.attention import int8_attention

        return int8_attention(*args, **kwargs)

    @staticmethod
    def coded_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """See `coding.coded_attention`."""
        from qtool.kernels.coding import coded_attention

        return coded_attention(*args, **kwargs)

    @staticmethod
    def wide_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """Attention of one query a head in float64: `[batch, heads, 1, size]` → float32 `[batch, 1, heads, size]`.

        Keys and values are `[batch, groups, keys, size]`, with channels side by side; `mask` is boolean and broadcasts
        to `[batch, heads, 1, keys]`. A query that sees nothing gets 0. Backends agree up to the rounding of float64.
        """
        shared = query.shape[1] // key.shape[1]
        key, value = (x.double().repeat_interleave(shared, dim=1) for x in (key, value))
        scores = (query.double() @ key.mT) * scaling
        if mask is not None:
            scores, value = scores.masked_fill(~mask, -math.inf), value.masked_fill(~mask.mT, 0)
        weights = scores.softmax(-1).masked_fill(scores.amax(-1, keepdim=True) == -math.inf, 0)
        return (weights @ value).transpose(1, 2).float()

    def row_table_linear(
        self, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`x` float32 `[tokens, in]`, integer `codes` `[out, in]`, `scale` `[out, 1]` → float32 `[tokens, out]`."""
        chunks = [x @ chunk.float().t() for chunk in codes.split(_TABLE_ROWS)]
        result = torch.cat(chunks, dim=-1).mul_(scale.t())
        return result if bias is None else result.add_(bias)
