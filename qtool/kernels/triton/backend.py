"""The triton backend: the reference's integers, and its floats, from kernels on a GPU.

Small and rare operations are the reference's own, which computes wherever its tensors are. So is `coded_attention`:
its products are float64, which few GPUs have tensor cores for, and where one product's result goes into the next Triton
3.7 fails to compile some of its forms.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qtool.kernels import attention, reference
from qtool.kernels.codebook import WholeCodebook
from qtool.kernels.reference import Reference, Rescale
from qtool.kernels.triton import float_attention, float_launch, launch, tables, wide_attention
from qtool.kernels.triton.launch import Coding, Count, Heads, Layer, Norm


@dataclass(frozen=True)
class Operand:
    """A weight as the integer product reads it: int8 codes `[out, in]` on the GPU, and the sums of their rows.

    They lie beside the stored tiles, which no kernel of this backend reads: a weight takes its size twice.
    """

    codes: torch.Tensor
    row_sums: torch.Tensor
    correction: torch.Tensor
    """What codes of non-negative rows lack (math.md, 3.5)."""
    width: int
    """Inputs of a row that share a scale."""

    @classmethod
    def of(cls, codes: torch.Tensor, width: int | None = None) -> "Operand":
        """From int8 codes in rows; without a `width` a row has one scale."""
        sums = codes.sum(1, dtype=torch.int32)
        return cls(codes.contiguous(), sums, sums * reference.QMAX, width or codes.shape[1])


@contextmanager
def on(x: torch.Tensor) -> Iterator[None]:
    """While active, kernels start on the GPU that `x` is on."""
    if x.is_cuda:
        with torch.cuda.device(x.device):
            yield
    else:
        yield


def _whole(values: torch.Tensor | None) -> Any:
    """Parameters as kernels read them."""
    return None if values is None else values.detach().contiguous()


class Triton(Reference):
    """Kernels that Triton compiles for the GPU at first use."""

    name = "triton"

    def prepare(self, codes: torch.Tensor, shape: tuple[int, int], width: int | None = None) -> Any:
        """The codes in rows, with their sums."""
        return Operand.of(reference.whole_codes(codes, shape), width)

    def row_sums(self, operand: Operand) -> torch.Tensor:  # type: ignore[override]
        """int32 `[out]`."""
        return operand.row_sums

    @staticmethod
    def quantize_rows(x: torch.Tensor, *, unsigned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """See `reference.quantize_rows`."""
        x = x.contiguous()
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        amax = torch.empty((*x.shape[:-1], 1), dtype=torch.int64, device=x.device)
        if x.numel():
            with on(x):
                launch.quantize(x, Coding(unsigned), Count(amax.numel()), codes, amax)
        return codes, amax

    @staticmethod
    def integer_norm(
        x: torch.Tensor, eps: torch.Tensor, to_output: Rescale, bias: torch.Tensor, bits: int
    ) -> torch.Tensor:
        """See `reference.integer_norm`."""
        x = x.contiguous()
        result = torch.empty_like(x)
        if x.numel():
            with on(x):
                given = Norm(*to_output, bias, eps, (1 << (bits - 1)) - 1)
                launch.norm(x, None, given, Count(x.numel() // x.shape[-1]), result)
        return result

    @staticmethod
    def integer_linear(
        codes: torch.Tensor,
        amax: torch.Tensor | None,
        weight: Any,
        row_sums: torch.Tensor | None,
        align: torch.Tensor,
        bias: torch.Tensor,
        to_output: Rescale,
        bits: int,
    ) -> torch.Tensor:
        """See `reference.integer_linear`."""
        codes = codes.contiguous()
        outputs = len(weight.codes)
        result = torch.empty((*codes.shape[:-1], outputs), dtype=torch.int32, device=codes.device)
        correction = None if row_sums is None else weight.correction
        limit = (1 << (bits - 1)) - 1
        with on(codes):
            given = Layer(weight.codes, correction, align, bias, *to_output, limit)
            launch.layer(
                codes, None if amax is None else amax.contiguous(), given, Count(result.numel() // outputs), result
            )
        return result

    def int8_linear(
        self,
        x: torch.Tensor,
        operand: Any,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        act_scale: torch.Tensor | None,
        weight_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Reference.int8_linear`; the same bits."""
        result = torch.empty((len(x), len(operand.codes)), dtype=torch.float32, device=x.device)
        if result.numel():
            scale, offset, addend, static = map(_whole, (weight_scale, weight_offset, bias, act_scale))
            with on(x):
                codes, scales = float_launch.tokens(x.contiguous(), static)
                float_launch.int8_linear(codes, scales, operand.codes, operand.width, scale, offset, addend, result)
        return result

    def prepare_codes(self, codes: torch.Tensor, shape: tuple[int, int], width: int) -> Any:
        """The stored tiles, which kernels read as they are."""
        return float_launch.Codes.of(codes, shape, width)

    def code_linear(
        self,
        x: torch.Tensor,
        operand: Any,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None,
        weight_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Reference.code_linear`; sums are added in another order."""
        result = torch.empty((len(x), operand.shape[0]), dtype=torch.float32, device=x.device)
        if result.numel():
            scale, offset, addend = map(_whole, (weight_scale, weight_offset, bias))
            with on(x):
                float_launch.code_linear(x.contiguous(), operand, scale, offset, addend, result)
        return result

    @staticmethod
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
        """See `reference.integer_attention`."""
        batch, tokens, heads, size = query.shape
        starts = torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=query.device)
        key_starts = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
        kept = real.flatten().nonzero().squeeze(1)
        states = [
            query.reshape(batch * tokens, -1),
            *(x.to(torch.int8).flatten(2).flatten(0, 1)[kept] for x in (key, value)),
        ]
        result = torch.empty((batch, tokens, heads * size), dtype=torch.int32, device=query.device)
        limit = (1 << (context_bits - 1)) - 1
        with on(query):
            given = Heads(heads, size, align, to_scores, to_context, grid, bits, limit, book)
            launch.attend(states, given, starts, key_starts, tokens, result)
        return result

    @staticmethod
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
        """See `attention.int8_attention`; the same bits.

        Soft caps, masks that are added and heads of more than `float_attention.MAX_SIZE` channels are the reference's.
        """
        (batch, heads, queries, size), keys = query.shape, key.shape[2]
        added = mask is not None and mask.dtype != torch.bool
        if softcap is not None or added or size > float_attention.MAX_SIZE:
            options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "book": book, "level_unit": level_unit}
            return Reference.int8_attention(query, key, value, value_scale, mask, **options)
        attention.check_codebook(book, level_unit, keys)
        with on(query):
            given = float_attention.coded(query, key, value, value_scale, scaling)
        seen = None if mask is None else mask.expand(batch, heads, queries, keys)
        context = torch.empty((batch, heads, queries, size), dtype=torch.float32, device=query.device)
        codes = torch.empty((batch, heads, queries, keys), dtype=torch.uint8, device=query.device)
        if query.numel():
            with on(query):
                float_attention.attend(given, seen, book, level_unit, context, codes)
        return context.transpose(1, 2), codes

    @staticmethod
    def wide_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
    ) -> torch.Tensor:
        """See `Reference.wide_attention`, which does it for wider heads."""
        if query.shape[3] > wide_attention.MAX_SIZE or not query.numel():
            return Reference.wide_attention(query, key, value, mask, scaling)
        with on(query):
            return wide_attention.attend(query, key, value, mask, scaling)

    @staticmethod
    def integer_gelu(
        x: torch.Tensor, root: torch.Tensor, one: torch.Tensor, pre_shift: torch.Tensor | int
    ) -> torch.Tensor:
        """See `reference.integer_gelu`."""
        x = x.contiguous()
        result = torch.empty(x.shape, dtype=torch.int64, device=x.device)
        places = torch.as_tensor(pre_shift, dtype=torch.int64, device=x.device)
        if x.numel():
            with on(x):
                launch.gelu(x, root, one, places, result)
        return result

    @staticmethod
    def integer_tanh(x: torch.Tensor, grid: int) -> torch.Tensor:
        """See `reference.integer_tanh`."""
        x = x.contiguous()
        result = torch.empty_like(x)
        if x.numel():
            with on(x):
                launch.tanh(x, grid, result)
        return result

    def row_table_linear(
        self, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See `Reference.row_table_linear`; the reference's own for codes of 16 bits."""
        if codes.dtype != torch.int8 or not x.numel():
            return super().row_table_linear(x, codes, scale, bias)
        with on(x):
            return tables.multiply(
                x.contiguous(), codes.contiguous(), scale.contiguous(), None if bias is None else bias.contiguous()
            )
