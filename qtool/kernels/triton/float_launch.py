"""Kernels of float linear layers as functions on tensors: shapes, tiles and grids."""

import torch

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
