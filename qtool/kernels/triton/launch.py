"""Kernels as functions on tensors: shapes, tiles and grids.

Rows are counted by a number, or by an int32 tensor `[1]` on the device: a grid then has programs for as many rows as
`most` says, and those that are not there end at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qtool.kernels import reference
from qtool.kernels.codebook import WholeCodebook
from qtool.kernels.triton import attention, linear, rows, tuning

Tensor = torch.Tensor


class Count(NamedTuple):
    """How many rows there are: `most`, or what stands in `given` int32 `[1]`, which is no more."""

    most: int
    given: Tensor | None = None

    @property
    def argument(self) -> Tensor | int:
        """What a kernel is given."""
        return self.most if self.given is None else self.given


class Coding(NamedTuple):
    """How rows get codes (math.md, 2.3 and 3): moved and divided by channel where `multiplier` is given, saturated to
    ±`limit`; then by each row's largest value, or with `static` as they are.
    """

    unsigned: bool = False
    static: bool = False
    multiplier: Tensor | None = None
    shift: Tensor | None = None
    offset: Tensor | None = None
    limit: int = 0


class Activation(NamedTuple):
    """What follows a layer: `kind` of `linear`, an int16 `table` and where its 0 is, or the constants of i-GELU."""

    kind: int = linear.NONE
    half: int = 0
    table: Tensor | None = None
    constants: Tensor | None = None
    multiplier: Tensor | None = None
    shift: Tensor | None = None


class Layer(NamedTuple):
    """A linear layer: int8 `weight` `[outputs, inputs]`, and the rest as `linear.linear_kernel` has it.

    `limit` is a number or int32 `[outputs]`; `align` int32 `[1]` or `[outputs]`.
    """

    weight: Tensor
    correction: Tensor | None
    align: Tensor
    bias: Tensor
    multiplier: Tensor
    shift: Tensor
    limit: int | Tensor
    act: Activation = Activation()


class Norm(NamedTuple):
    """i-LayerNorm: γ as dyadic numbers, β, n·ε in memory, and what saturates."""

    weight: Tensor
    shift: Tensor
    bias: Tensor
    eps: Tensor
    limit: int


class Heads(NamedTuple):
    """Attention of `heads` of `size` channels, as `reference.integer_attention` has it."""

    heads: int
    size: int
    align: Tensor
    to_scores: reference.Rescale
    to_context: reference.Rescale
    grid: int
    bits: int
    limit: int
    book: WholeCodebook | None


def quantize(x: Tensor, coding: Coding, count: Count, codes: Tensor, amax: Tensor | None) -> None:
    """Codes int8 and largest values `[rows, 1]` of int16 or int32 rows `[rows, width]`, into `codes` and `amax`."""
    width = x.shape[-1]
    many, padded, warps = tuning.rows_of(width)
    rows.quantize_kernel[(-(-count.most // many),)](
        x, codes, amax, coding.multiplier, coding.shift, coding.offset, coding.limit, count.argument, width,
        UNSIGNED=coding.unsigned, COUNTED=count.given is not None, ROWS=many, WIDTH=padded, num_warps=warps,
    )  # fmt: skip


def norm(
    x: Tensor, residual: Tensor | None, given: Norm, count: Count, result: Tensor,
    coding: Coding | None = None, codes: Tensor | None = None, amax: Tensor | None = None,
) -> None:  # fmt: skip
    """i-LayerNorm of int32 rows `x + residual` into `result`, and with a `coding` their codes."""
    width = x.shape[-1]
    coding = coding or Coding()
    many, padded, warps = tuning.rows_of(width)
    rows.norm_kernel[(-(-count.most // many),)](
        x, residual, given.weight, given.shift, given.bias, given.eps, result, given.limit,
        codes, amax, coding.multiplier, coding.shift, coding.offset, coding.limit, count.argument, width,
        UNSIGNED=coding.unsigned, COUNTED=count.given is not None, ROWS=many, WIDTH=padded, num_warps=warps,
    )  # fmt: skip


def layer(codes: Tensor, amax: Tensor | None, given: Layer, count: Count, result: Tensor) -> None:
    """A linear layer with what follows it, from int8 codes `[rows, inputs]` into `result` `[rows, outputs]`."""
    outputs, inputs = given.weight.shape
    if not count.most:
        return
    cut, act = tuning.tile(count.most, outputs), given.act
    limits, limit = (None, given.limit) if isinstance(given.limit, int) else (given.limit, 0)
    linear.linear_kernel[(-(-count.most // cut.m) * -(-outputs // cut.n),)](
        codes, amax, given.weight, given.correction, given.align, given.bias, given.multiplier, given.shift,
        limits, limit, act.table, act.constants, act.multiplier, act.shift,
        result, count.argument, inputs, outputs,
        ACT=act.kind, HALF=act.half, ALIGNS=given.align.numel() > 1, EVEN=inputs % cut.k == 0,
        COUNTED=count.given is not None, BLOCK_M=cut.m, BLOCK_N=cut.n, BLOCK_K=cut.k, GROUP=8,
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip


def attend(
    states: Sequence[Tensor], given: Heads, starts: Tensor, key_starts: Tensor, tokens: int, result: Tensor
) -> None:
    """Integer attention of query, key and value rows, which may lie side by side, into `result` `[rows, heads · size]`.

    `starts` int32 `[texts + 1]` are of queries, of which a text has up to `tokens`; `key_starts` of keys, likewise.
    """
    query, key, value = states
    book, texts = given.book, len(starts) - 1
    kind = attention.PLAIN if book is None else attention.PRUNED if book.levels is None else attention.LEVELS
    cut = tuning.window(tokens, coded=book is not None)
    edges, levels, count = (None, None, 0) if book is None else (book.edges, book.levels, book.edges.shape[1])
    blocks = -(-tokens // cut.m)
    attention.attention_kernel[(blocks * texts, given.heads)](
        query, key, value, query.stride(0), key.stride(0), starts, key_starts,
        given.align, *given.to_scores, *given.to_context, given.limit, *reference.exp_constants(given.grid),
        edges, levels, count, result, given.size, given.heads, blocks,
        GRID=given.grid, BITS=given.bits, SHARE_BITS=reference.share_bits(given.grid), KIND=kind,
        RELATIVE=book is not None and book.relative, RENORMALIZE=book is not None and book.renormalize,
        SINGLE=cut.single, BLOCK_M=cut.m, BLOCK_N=cut.n, SIZE=max(32, tuning.power_of_two(given.size)),
        num_warps=cut.warps,
    )  # fmt: skip


class Table(NamedTuple):
    """Codes of an embedding table, `[rows, columns]`, and each row's way to the grid of the sum."""

    codes: Tensor
    multiplier: Tensor
    shift: Tensor


def embed(ids: Sequence[Tensor | None], tables: Sequence[Table | None], count: Count, result: Tensor) -> None:
    """The sum of a row of each table into int32 `result` `[rows, columns]`; the first table is always there."""
    width = result.shape[-1]
    many, padded, warps = tuning.rows_of(width)
    given: list[Tensor | int | None] = []
    for each, table in zip(ids, tables, strict=True):
        given += [None] * 4 + [0] if each is None or table is None else [each, *table, len(table.codes)]
    rows.embed_kernel[(-(-count.most // many),)](
        *given, result, count.argument, width,
        COUNTED=count.given is not None, ROWS=many, WIDTH=padded, num_warps=warps,
    )  # fmt: skip


_ELEMENTS = 1024  # of element-wise kernels, a program


def gelu(x: Tensor, root: Tensor, one: Tensor, places: Tensor, result: Tensor) -> None:
    """i-GELU's product of int32 `x` into int64 `result`."""
    grid = (-(-x.numel() // _ELEMENTS),)
    rows.gelu_kernel[grid](x, result, root, one, places, x.numel(), SIZE=_ELEMENTS)


def tanh(x: Tensor, grid: int, result: Tensor) -> None:
    """i-tanh of int32 `x` into int32 `result`."""
    programs = (-(-x.numel() // _ELEMENTS),)
    rows.tanh_kernel[programs](x, result, *reference.exp_constants(grid), x.numel(), GRID=grid, SIZE=_ELEMENTS)
