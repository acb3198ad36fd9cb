"""The specification of every operation: plain torch on integer dtypes, available everywhere.

The integer product runs on `torch._int_mm` where a self-test finds it exact. Without VNNI instructions that function
adds pairs of unsigned × signed products in 16 bits and saturates; weights split in two digits keep every pair sum
within 255 · 64 · 2 = 32,640 and are exact there too. Where neither holds, torch's integer matmul does the work.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from qtool.numerics.qtensor import untile

QMAX = 127
_TINY = torch.finfo(torch.float32).tiny
_TABLE_ROWS = 512  # of a vocabulary table, expanded to float at a time: they should stay in the cache

Product = Literal["direct", "split", "integer"]


@dataclass(frozen=True)
class Operand:
    """A weight ready for `int8_gemm`: digits are int8 `[out, in]`, value = codes, or 2 · digits[0] + digits[1]."""

    digits: tuple[torch.Tensor, ...]
    product: Product

    @property
    def in_features(self) -> int:
        """Length of a row."""
        return self.digits[0].shape[1]


def operand(codes: torch.Tensor, product: Product | None = None) -> Operand:
    """Prepare int8 `codes` `[out, in]` in ±127 for the exact product of this machine (or for the `product` named)."""
    product = product or exact_product()
    if codes.shape[1] == 1:  # torch._int_mm leaves the product with a matrix of one column unwritten (torch 2.13)
        product = "integer"
    if product == "split":
        return Operand((codes >> 1, codes & 1), product)
    return Operand((codes,), product)


def int8_gemm(a: torch.Tensor, weight: Operand, columns: slice = slice(None)) -> torch.Tensor:
    """`a @ W[:, columns]^T`: int8 `[tokens, in]` × `[out, in]` → int32 `[tokens, out]`, exact while in ≤ 133,144."""
    digits = [digit[:, columns].t() for digit in weight.digits]
    if weight.product == "integer":
        return a.int() @ digits[0].int()
    if a.shape[0] == 0:
        return a.new_zeros((0, digits[0].shape[1]), dtype=torch.int32)
    if weight.product == "direct":
        return torch._int_mm(a, digits[0])
    return torch._int_mm(a, digits[0]).mul_(2).add_(torch._int_mm(a, digits[1]))


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
    weights[1::2] = -QMAX
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
    scale = x.abs().amax(dim=-1, keepdim=True).div_(QMAX).clamp_min_(_TINY)
    return torch.floor_(torch.div(x, scale).add_(0.5)).to(torch.int8), scale


def quantize_static(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 by one calibrated scale: float32 `[tokens, in]` → codes in ±127 (saturating), scale `[tokens, 1]`.

    The scale of a row is `scale`, or NaN where the row holds an infinity or NaN, which codes cannot show.
    """
    codes = torch.floor_(torch.div(x, scale).add_(0.5)).clamp_(-QMAX, QMAX).to(torch.int8)
    return codes, x.mul(0).sum(dim=-1, keepdim=True).add_(scale)


class Reference:
    """The backend that the others are compared with."""

    name = "reference"

    def prepare(self, codes: torch.Tensor, shape: tuple[int, int]) -> Operand:
        """A row-major operand from tiled codes of logical `shape` `(out, in)`."""
        return operand(untile(codes, shape))

    def int8_linear(
        self,
        x: torch.Tensor,
        operand: Operand,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        act_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """`((acc · act scale) · weight scale) + bias` in float32, in this order; one term a column block.

        `x` is float32 `[tokens, in]`; the result is float32 `[tokens, out]`.
        """
        if act_scale is None:
            codes, act_scale = quantize_tokens(x)
        else:
            codes, act_scale = quantize_static(x, act_scale)
        out_features = operand.digits[0].shape[0]
        row_scale = weight_scale.repeat_interleave(out_features // weight_scale.shape[0], dim=0)
        width = operand.in_features // weight_scale.shape[1]
        result: torch.Tensor | None = None
        for block, scale in enumerate(row_scale.unbind(dim=1)):
            columns = slice(block * width, (block + 1) * width)
            term = int8_gemm(codes[:, columns], operand, columns).float().mul_(act_scale).mul_(scale)
            result = term if result is None else result.add_(term)
        assert result is not None  # a weight has at least one column block
        return result if bias is None else result.add_(bias)

    def row_table_linear(
        self, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`x` float32 `[tokens, in]`, integer `codes` `[out, in]`, `scale` `[out, 1]` → float32 `[tokens, out]`."""
        chunks = [x @ chunk.float().t() for chunk in codes.split(_TABLE_ROWS)]
        result = torch.cat(chunks, dim=-1).mul_(scale.t())
        return result if bias is None else result.add_(bias)
