"""The kernels of linear layers with float scales, launched as models of common shapes launch them."""

import torch

from qtool.kernels.triton.backend import Triton
from qtool.numerics import QTensor, QuantSpec

INPUTS, OUTPUTS = 768, 1024


def calls() -> None:
    """Launch them all."""
    weight = torch.randn(OUTPUTS, INPUTS)
    for spelling in ("int8:channel:sym", "int8:group:128:min", "int4:group:64:sym"):
        spec = QuantSpec.parse(spelling)
        stored = QTensor.quantize(weight, spec, layout="tiled")
        scale, offsets, width = stored.params.scale, stored.params.offsets(), spec.block[1] or INPUTS
        bias = torch.zeros(OUTPUTS)
        for rows in (1, 33, 4096):
            x = torch.zeros(rows, INPUTS)
            int8 = Triton().prepare(stored.codes, stored.shape, width)
            Triton().int8_linear(x, int8, scale, bias, None, offsets)
            Triton().code_linear(x, Triton().prepare_codes(stored.codes, stored.shape, width), scale, bias, offsets)
    Triton().int8_linear(x, int8, scale, None, torch.ones(1))
