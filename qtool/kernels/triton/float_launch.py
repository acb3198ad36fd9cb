"""Kernels of linear layers with float scales as functions on tensors."""

import torch

from qtool.kernels.reference import Codes
from qtool.kernels.triton import codes, float_linear, tuning
from qtool.numerics.qtensor import TILE_COLUMNS, TILE_ROWS

Tensor = torch.Tensor

FEW_ROWS = 4
"""Rows for which a matrix is read as a vector reads it: the time is that of its bytes."""
_STRETCH = 512  # tiles that a program adds up at least, 2,048 inputs


def tokens(x: Tensor, act_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """int8 codes of float32 rows `[rows, width]` and their scales `[rows, 1]`; by one `act_scale`, or each its own."""
    found = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = x.new_empty((len(x), 1))
    many, padded, warps = tuning.rows_of(x.shape[1])
    float_linear.tokens_kernel[(-(-len(x) // many),)](
        x, act_scale, found, scales, len(x), x.shape[1], ROWS=many, WIDTH=padded, num_warps=warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return found, scales


def linear(
    x: Tensor, act_scales: Tensor, weight: Tensor, width: int, scales: Tensor, offsets: Tensor | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """float32 `[rows, outputs]` from int8 codes and their scales; see `float_linear_kernel`."""
    outputs, inputs = weight.shape
    result = x.new_empty((len(x), outputs), dtype=torch.float32)
    cut = tuning.tile(len(x), outputs)
    depth = min(cut.k, max(32, tuning.power_of_two(width)))
    float_linear.float_linear_kernel[(-(-len(x) // cut.m), -(-outputs // cut.n))](
        x, act_scales, weight, scales.contiguous(), None if offsets is None else offsets.contiguous(), bias,
        result, len(x), inputs, outputs, width, scales.shape[1], outputs // len(scales),
        BLOCK_M=cut.m, BLOCK_N=cut.n, BLOCK_K=depth, EVEN=inputs % width == 0 and width % depth == 0,
        num_warps=cut.warps, num_stages=cut.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return result


def code_linear(x: Tensor, operand: Codes, scales: Tensor, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """float32 `[rows, outputs]` from float32 rows and stored tiles."""
    scales, offsets = scales.contiguous(), None if offsets is None else offsets.contiguous()
    whole = operand.width >= operand.shape[1]
    if len(x) <= FEW_ROWS and (whole or operand.width % TILE_COLUMNS == 0):
        return _vector(x, operand, scales, offsets, bias)
    outputs, inputs = operand.shape
    result = x.new_empty((len(x), outputs))
    m, n, k, warps = tuning.float_tile(len(x))
    codes.matrix_kernel[(-(-len(x) // m), -(-outputs // n))](
        x, operand.codes, scales, offsets, bias, result, len(x), inputs, outputs, operand.codes.shape[1],
        min(operand.width, inputs), scales.shape[1], outputs // len(scales),
        NIBBLES=operand.codes.dtype == torch.uint8, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return result


def _vector(x: Tensor, operand: Codes, scales: Tensor, offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """Stretches of each sum, added up from the first on: in one order, and without waiting for each other."""
    outputs, inputs = operand.shape
    panels, tiles = operand.codes.shape[:2]
    pieces = tuning.pieces(panels, tiles, _STRETCH)
    parts = x.new_empty((pieces, len(x), outputs))
    depth = 16 if tuning.machine()[0] == 0 else 64
    codes.vector_kernel[(panels, pieces)](
        x, operand.codes, scales, offsets, parts, inputs, outputs, tiles,
        max(1, -(-min(operand.width, inputs) // TILE_COLUMNS)), scales.shape[1], outputs // len(scales), len(x),
        -(-tiles // pieces), NIBBLES=operand.codes.dtype == torch.uint8, ROWS=tuning.power_of_two(len(x)), TILES=depth,
        num_warps=4,
    )  # fmt: skip
    assert panels * TILE_ROWS >= outputs
    result = parts[0] if pieces == 1 else parts.sum(0)
    return result if bias is None else result.add_(bias)
