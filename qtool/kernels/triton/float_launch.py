"""Kernels of float linear layers as functions on tensors: shapes, tiles and grids."""

from typing import NamedTuple

import torch

from qtool.kernels.triton import codes as kernels
from qtool.kernels.triton import float_linear, tuning

Tensor = torch.Tensor


def tokens(x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 codes of float32 rows `[rows, width]` and float32 scales `[rows]`; by the `given` scale where there is one.

    A row has at least one value.
    """
    count, width = x.shape
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty(count, dtype=torch.float32, device=x.device)
    many, padded, warps = tuning.rows_of(width)
    float_linear.tokens_kernel[(-(-count // many),)](
        x, codes, scales, given, count, width, ROWS=many, WIDTH=padded, num_warps=warps, enable_fp_fusion=False
    )
    return codes, scales


def block_sums(codes: Tensor, width: int) -> Tensor:
    """int32 `[rows, column blocks]`: the sums of each `width` codes of a row, the last of what is left."""
    count, inputs = codes.shape
    blocks = -(-inputs // width)
    sums = torch.empty((count, blocks), dtype=torch.int32, device=codes.device)
    many, size, warps = tuning.sums_of(width)
    float_linear.sums_kernel[(-(-count // many), blocks)](
        codes, sums, count, inputs, width, blocks, ROWS=many, SIZE=size, num_warps=warps
    )
    return sums


def int8_linear(
    codes: Tensor, act_scale: Tensor, weight: Tensor, width: int, scale: Tensor, offset: Tensor | None,
    bias: Tensor | None, result: Tensor,
) -> None:  # fmt: skip
    """int8 codes `[rows, inputs]` and their scales `[rows]` times int8 `weight`, into float32 `[rows, outputs]`.

    `scale` and `offset` are `[row blocks, column blocks]`, of `width` columns.
    """
    (outputs, inputs), count = weight.shape, len(codes)
    blocks = scale.shape[1]
    cut = tuning.tile(count, outputs, twice=blocks > 1)
    depth = cut.k if blocks == 1 else min(cut.k, max(32, tuning.power_of_two(width)))
    even = inputs % depth == 0 if blocks == 1 else width % depth == 0 and inputs % width == 0
    sums = None if offset is None else block_sums(codes, width)
    float_linear.int8_kernel[(-(-count // cut.m) * -(-outputs // cut.n),)](
        codes, act_scale, sums, weight, scale, outputs // len(scale),
        offset, None if offset is None else outputs // len(offset), bias, result,
        count, inputs, outputs, width, blocks,
        WHOLE=blocks == 1, SINGLE=width <= depth, EVEN=even, BLOCK_M=cut.m, BLOCK_N=cut.n, BLOCK_K=depth, GROUP=8,
        num_warps=cut.warps, num_stages=cut.stages, enable_fp_fusion=False,
    )  # fmt: skip


ELEMENTS = 1024  # whose splits a program adds


class Codes(NamedTuple):
    """Tiled codes of a matrix `shape` `(outputs, inputs)` as `codes` has them, `width` columns to a scale."""

    words: Tensor
    shape: tuple[int, int]
    width: int

    @classmethod
    def of(cls, stored: Tensor, shape: tuple[int, int], width: int) -> "Codes":
        """The stored tiles themselves: int8 `[…, 16, 4]`, or uint8 `[…, 16, 2]` of two codes a byte."""
        word = torch.int16 if stored.dtype == torch.uint8 else torch.int32
        return cls(stored.contiguous().view(word), shape, min(width, shape[1]))

    @property
    def bits(self) -> int:
        """Of a code as it is stored."""
        return 4 if self.words.dtype == torch.int16 else 8

    def words_of_block(self, blocks: int) -> int:
        """Words that one of so many column blocks has. One that does not start with a tile reaches into one more."""
        return -(-(self.width + (3 if self.width % 4 and blocks > 1 else 0)) // 4)


def code_linear(
    x: Tensor, codes: Codes, scale: Tensor, offset: Tensor | None, bias: Tensor | None, result: Tensor
) -> None:
    """float32 `x` `[rows, inputs]` times what the codes stand for, into float32 `result` `[rows, outputs]`."""
    (outputs, inputs), count, blocks = codes.shape, len(x), scale.shape[1]
    cut = tuning.codes_of(count, outputs, codes.words_of_block(blocks), blocks)
    target = result if cut.splits == 1 else result.new_empty((cut.splits, *result.shape))
    given = (
        x, codes.words, scale, outputs // len(scale), offset, None if offset is None else outputs // len(offset),
        bias if cut.splits == 1 else None, target, count, inputs, outputs, codes.width, blocks, cut.chunks,
        blocks * cut.chunks, cut.per,
    )  # fmt: skip
    bits, across = codes.bits, -(-outputs // cut.n)
    if count <= tuning.FEW_ROWS:
        kernels.few_rows_kernel[(across, cut.splits)](
            *given, BITS=bits, ROWS=cut.m, BLOCK_N=cut.n, WORDS=cut.words, num_warps=cut.warps
        )
    else:
        kernels.many_rows_kernel[(-(-count // cut.m) * across, cut.splits)](
            *given, BITS=bits, WHOLE=blocks == 1, BLOCK_M=cut.m, BLOCK_N=cut.n, WORDS=cut.words, GROUP=8,
            num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    if cut.splits > 1:
        size = result.numel()
        kernels.splits_kernel[(-(-size // ELEMENTS),)](
            target, bias, None, result, size, outputs, cut.splits, SIZE=ELEMENTS
        )
