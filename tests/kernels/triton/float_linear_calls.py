"""Every kernel of float linear layers, launched as layers of common shapes launch them."""

import torch

from qtool.kernels.triton.backend import Triton
from qtool.numerics.qtensor import pack_nibbles, tile

OUTPUTS, INPUTS = 768, 1024


def scales(width: int) -> torch.Tensor:
    return torch.ones((OUTPUTS, -(-INPUTS // width)))


def calls() -> None:
    """Launch them all."""
    ops, shape, bias = Triton(), (OUTPUTS, INPUTS), torch.zeros(OUTPUTS)
    codes = tile(torch.zeros(shape, dtype=torch.int8))
    for rows in (1, 40, 4096):
        x = torch.zeros((rows, INPUTS))
        for width, offset in ((INPUTS, None), (128, None), (32, scales(32)), (20, scales(20)), (512, None)):
            operand = ops.prepare(codes, shape, width)
            ops.int8_linear(x, operand, scales(width), bias, None if width > 32 else bias[:1], offset)
    nibbles = pack_nibbles(codes)
    for rows in (1, 3, 8, 40, 4096):
        x = torch.zeros((rows, INPUTS))
        for width in (INPUTS, 128, 7) if rows in (1, 4096) else (128,):
            for stored in (codes, nibbles):
                operand, scale = ops.prepare_codes(stored, shape, width), scales(width)
                ops.code_linear(x, operand, scale, bias, None if width > 64 and stored is codes else scale)
