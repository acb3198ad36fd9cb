"""A pre-norm decoder block in few kernels, for steps of generation: one token of each of few texts.

Such a step waits for the weights. What stands between two products (norms, rotations, the gate, residuals, what adds
up the splits of the product before) is one kernel each time, and products of the same rows are one, too: a small kernel
takes as long as it takes to start it, even in a graph.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qtool.kernels.triton import tuning
from qtool.kernels.triton.codes import added, few_rows, splits_kernel
from qtool.kernels.triton.float_launch import ELEMENTS, Codes

ACTIVATIONS = ("silu", "gelu")
_SILU = tl.constexpr(0)
_ROOT = tl.constexpr(0.5**0.5)

Tensor = torch.Tensor


@triton.jit
def products_kernel(
    x: tl.tensor, inputs: tl.tensor, share: tl.tensor, offset_share: tl.tensor, width: tl.tensor, blocks: tl.tensor,
    chunks: tl.tensor, steps: tl.tensor, per: tl.tensor, result: tl.tensor, stride: tl.tensor,
    words: tl.tensor, scale: tl.tensor, offset: tl.tensor, outputs: tl.tensor,
    words2: tl.tensor, scale2: tl.tensor, offset2: tl.tensor, outputs2: tl.tensor,
    words3: tl.tensor, scale3: tl.tensor, offset3: tl.tensor, outputs3: tl.tensor,
    BITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    """`few_rows_kernel` for up to three matrices of the same rows and form; the last may be None.

    float32 `x` `[ROWS, inputs]` → float32 `result` `[splits, ROWS, stride]`, outputs of the matrices side by side.
    """
    number = tl.program_id(0)
    first, second = tl.cdiv(outputs, BLOCK_N), tl.cdiv(outputs2, BLOCK_N)
    if words2 is None or number < first:
        few_rows(
            x, words, scale, share, offset, offset_share, None, result, ROWS, inputs, outputs, width, blocks, chunks,
            steps, per, number, stride, BITS, ROWS, BLOCK_N, WORDS,
        )  # fmt: skip
    elif words3 is None or number < first + second:
        few_rows(
            x, words2, scale2, share, offset2, offset_share, None, result + outputs, ROWS, inputs, outputs2, width,
            blocks, chunks, steps, per, number - first, stride, BITS, ROWS, BLOCK_N, WORDS,
        )  # fmt: skip
    else:
        few_rows(
            x, words3, scale3, share, offset3, offset_share, None, result + outputs + outputs2, ROWS, inputs, outputs3,
            width, blocks, chunks, steps, per, number - first - second, stride, BITS, ROWS, BLOCK_N, WORDS,
        )  # fmt: skip


@triton.jit
def norm_kernel(
    parts: tl.tensor, bias: tl.tensor, beside: tl.tensor, weight: tl.tensor, sums: tl.tensor, result: tl.tensor,
    size: tl.tensor, width: tl.tensor, splits: tl.tensor, EPS: tl.constexpr, WIDTH: tl.constexpr,
) -> None:  # fmt: skip
    """A row of `beside` `[rows, width]`, with `parts` `[splits, rows, width]` added into `sums`; its RMSNorm: `result`.

    `size` is rows · width. Without parts there is nothing to add: they, the bias and the sums are None.
    """
    columns = tl.arange(0, WIDTH)
    here = columns < width
    at = tl.program_id(0) * width + columns
    x = tl.load(beside + at, mask=here, other=0.0)
    if parts is not None:
        x += added(parts, bias, at, columns, here, size, splits)
        tl.store(sums + at, x, mask=here)
    mean = tl.sum(x * x, 0) / width
    normal = x * (1.0 / tl.sqrt_rn(mean + EPS))
    tl.store(result + at, tl.load(weight + columns, mask=here, other=0.0) * normal, mask=here)


@triton.jit
def turn_kernel(
    parts: tl.tensor, bias: tl.tensor, cosine: tl.tensor, sine: tl.tensor, result: tl.tensor, turned: tl.tensor,
    half: tl.tensor, angles: tl.tensor, splits: tl.tensor, HALF: tl.constexpr,
) -> None:  # fmt: skip
    """Program ids: row, head of queries, keys or values. Heads before number `turned` are rotated by position.

    float32 `parts` `[splits, rows, heads, 2 · half]`, added, → `result` `[rows, heads, 2 · half]`. `cosine` and `sine`
    are `[angles, 2 · half]`: row number r of the parts has angle r % angles.
    """
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    pairs = tl.arange(0, HALF)
    here = pairs < half
    column = head * 2 * half + pairs
    at = row * heads * 2 * half + column
    size = tl.num_programs(0) * heads * 2 * half
    low = added(parts, bias, at, column, here, size, splits)
    high = added(parts, bias, at + half, column + half, here, size, splits)
    if head < turned:
        angle = row % angles * 2 * half + pairs
        across, along = tl.load(cosine + angle, mask=here, other=0.0), tl.load(sine + angle, mask=here, other=0.0)
        angle += half
        across2, along2 = tl.load(cosine + angle, mask=here, other=0.0), tl.load(sine + angle, mask=here, other=0.0)
        low, high = low * across - high * along, high * across2 + low * along2
    tl.store(result + at, low, mask=here)
    tl.store(result + at + half, high, mask=here)


@triton.jit
def gate_kernel(
    parts: tl.tensor, bias: tl.tensor, result: tl.tensor, inner: tl.tensor, splits: tl.tensor,
    ACTIVATION: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Program ids: block of columns, row. float32 `parts` `[splits, rows, 2 · inner]`, added, gates first → `result`
    `[rows, inner]`: what an activation lets through, by gates."""
    columns, row = tl.program_id(0) * SIZE + tl.arange(0, SIZE), tl.program_id(1)
    here = columns < inner
    size = tl.num_programs(1) * 2 * inner
    at = row * 2 * inner + columns
    gate = added(parts, bias, at, columns, here, size, splits)
    up = added(parts, bias, at + inner, columns + inner, here, size, splits)
    if ACTIVATION == _SILU:
        small = tl.exp(-tl.abs(gate))  # the other way round large ones overflow
        share = tl.where(gate < 0, small, 1.0) / (1.0 + small)
    else:
        share = 0.5 * (1.0 + tl.erf(gate * _ROOT))
    tl.store(result + row * inner + columns, gate * share * up, mask=here)


class Matrix(NamedTuple):
    """Codes, their scales and, of asymmetric ones, what code 0 stands for: float32 `[row blocks, column blocks]`."""

    codes: Codes
    scale: Tensor
    offset: Tensor | None

    @property
    def form(self) -> tuple[int, int, int, int, int | None, int | None]:
        """What matrices have in common that are multiplied together."""
        outputs, inputs = self.codes.shape
        offset_share = None if self.offset is None else outputs // len(self.offset)
        share = outputs // len(self.scale)
        return self.codes.bits, self.codes.width, inputs, self.scale.shape[1], share, offset_share


class Product(NamedTuple):
    """Up to three matrices of one form whose outputs lie side by side, and the bias of them all."""

    matrices: Sequence[Matrix]
    bias: Tensor | None


class Parts(NamedTuple):
    """float32 `[splits, rows, outputs]`, to be added up in this order with the bias."""

    values: Tensor
    bias: Tensor | None


def multiply(x: Tensor, product: Product) -> Parts:
    """float32 `x` `[rows, inputs]`, of up to `tuning.FEW_ROWS` rows."""
    head, rows = product.matrices[0], len(x)
    sizes = [matrix.codes.shape[0] for matrix in product.matrices]
    _, width, inputs, blocks, share, offset_share = head.form
    cut = tuning.codes_of(rows, sum(sizes), head.codes.words_of_block(blocks), blocks)
    result = x.new_empty((cut.splits, rows, sum(sizes)))
    given = [
        value
        for matrix, size in zip(product.matrices, sizes, strict=True)
        for value in (matrix.codes.words, matrix.scale, matrix.offset, size)
    ]
    given += [None, None, None, 0] * (3 - len(sizes))
    products_kernel[(sum(-(-size // cut.n) for size in sizes), cut.splits)](
        x, inputs, share, offset_share, width, blocks, cut.chunks, blocks * cut.chunks, cut.per, result,
        sum(sizes), *given,
        BITS=head.codes.bits, ROWS=rows, BLOCK_N=cut.n, WORDS=cut.words, num_warps=cut.warps,
    )  # fmt: skip
    return Parts(result, product.bias)


def norm(x: Tensor, weight: Tensor, eps: float, parts: Parts | None = None) -> tuple[Tensor, Tensor]:
    """Rows `[rows, width]` with the parts added, and RMSNorm of that."""
    rows, width = x.shape
    normal = torch.empty_like(x)
    sums = x if parts is None else torch.empty_like(x)
    padded = tuning.power_of_two(width)
    norm_kernel[(rows,)](
        None if parts is None else parts.values, None if parts is None else parts.bias, x, weight,
        None if parts is None else sums, normal, x.numel(), width, 0 if parts is None else len(parts.values),
        EPS=eps, WIDTH=padded, num_warps=max(1, min(8, padded // 256)),
    )  # fmt: skip
    return sums, normal


def turn(parts: Parts, cosine: Tensor, sine: Tensor, heads: int, turned: int) -> Tensor:
    """float32 `[rows, heads, size]`, of which the first `turned` heads are rotated by angles `[angles, size]`."""
    rows, width = parts.values.shape[1:]
    result = parts.values.new_empty((rows, heads, width // heads))
    half = width // heads // 2
    turn_kernel[(rows, heads)](
        *parts, cosine, sine, result, turned, half, len(cosine), len(parts.values),
        HALF=tuning.power_of_two(half), num_warps=1,
    )  # fmt: skip
    return result


def gate(parts: Parts, activation: str) -> Tensor:
    """float32 `[rows, inner]` of `[splits, rows, 2 · inner]`, gates first."""
    rows, width = parts.values.shape[1:]
    result = parts.values.new_empty((rows, width // 2))
    gate_kernel[(-(-width // 2 // ELEMENTS), rows)](
        *parts, result, width // 2, len(parts.values), ACTIVATION=ACTIVATIONS.index(activation), SIZE=ELEMENTS
    )
    return result


def finish(parts: Parts, beside: Tensor) -> Tensor:
    """The parts and what is `beside` them, `[rows, outputs]`, added."""
    result = torch.empty_like(beside)
    splits_kernel[(-(-result.numel() // ELEMENTS),)](
        *parts, beside, result, result.numel(), result.shape[1], len(parts.values), SIZE=ELEMENTS
    )
    return result
