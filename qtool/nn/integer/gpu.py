"""An integer encoder as a chain of GPU kernels: its modules' buffers as the tensors that `kernels.triton` reads."""

from collections.abc import Sequence
from typing import Any

import torch

from qtool.kernels import reference
from qtool.kernels.triton import encoder, linear
from qtool.kernels.triton.backend import on
from qtool.kernels.triton.launch import Activation, Coding, Heads, Layer, Norm, Table
from qtool.nn.integer.activation import IntRelu, IntTable
from qtool.nn.integer.block import IntAttention, IntBlock
from qtool.nn.integer.embedding import TABLES, IntEmbeddings
from qtool.nn.integer.linear import IntLinear
from qtool.nn.integer.norm import IntNorm
from qtool.nn.integer.plan import check_widths, roots_of
from qtool.nn.plan import Plan


class GpuPlan(Plan):
    """The embeddings and blocks of an integer encoder. Codes of weights are copied into rows, once."""

    def __init__(self, embeddings: IntEmbeddings, projection: IntLinear | None, blocks: Sequence[IntBlock]) -> None:
        super().__init__(roots_of(embeddings, projection, blocks))
        for block in blocks:
            check_widths(block)
        self.encoder = encoder.Encoder(
            [_table(embeddings.part(role)) if role in embeddings.parts else None for role in TABLES],
            _norm(embeddings.part("norm")),
            None if projection is None else _coding(projection),
            None if projection is None else _layer(projection),
            [_block(block) for block in blocks],
        )

    def run(self, ids: list[torch.Tensor | None], real: torch.Tensor) -> torch.Tensor:
        """See `Encoder.forward`."""
        with on(real):
            return self.encoder.forward(ids, real)


def _block(block: IntBlock) -> encoder.Block:
    query, key, value = (block.part(role) for role in ("query", "key", "value"))
    return encoder.Block(
        states_coding=_coding(query),
        states=_side_by_side([query, key, value]),
        heads=_heads(block.part("attention")),
        output_coding=_coding(block.part("output")),
        output=_layer(block.part("output")),
        attention_norm=_norm(block.part("attention_norm")),
        up_coding=_coding(block.part("up")),
        up=_layer(block.part("up"), _activation(block.part("act"))),
        down_coding=_coding(block.part("down")),
        down=_layer(block.part("down")),
        ffn_norm=_norm(block.part("ffn_norm")),
    )


def _limit(bits: int) -> int:
    return (1 << (bits - 1)) - 1


def _coding(linear: IntLinear) -> Coding:
    if not linear.rescales:
        return Coding(linear.unsigned, not linear.dynamic)
    given = linear.in_multiplier, linear.in_shift, linear.in_offset
    return Coding(linear.unsigned, not linear.dynamic, *given, _limit(linear.in_bits if linear.dynamic else 8))


def _rows(linear: IntLinear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """int8 codes `[outputs, inputs]`, and what codes of non-negative rows lack."""
    codes = reference.whole_codes(linear.weight, (linear.out_features, linear.in_features)).contiguous()
    return codes, codes.sum(1, dtype=torch.int32) * reference.QMAX if linear.unsigned else None


def _layer(linear: IntLinear, act: Activation | None = None) -> Layer:
    given = linear.align, linear.bias, linear.multiplier, linear.shift
    return Layer(*_rows(linear), *given, _limit(linear.out_bits), act or Activation())


def _side_by_side(linears: Sequence[IntLinear]) -> Layer:
    """Layers with one input as one layer."""
    layers = [_layer(linear) for linear in linears]
    widths = torch.tensor([linear.out_features for linear in linears], device=layers[0].bias.device)
    corrections = [layer.correction for layer in layers if layer.correction is not None]
    assert len(corrections) in (0, len(layers))  # they have the same codes
    limits = torch.tensor([_limit(linear.out_bits) for linear in linears], dtype=torch.int32, device=widths.device)
    return Layer(
        torch.cat([layer.weight for layer in layers]),
        torch.cat(corrections) if corrections else None,
        torch.cat([layer.align for layer in layers]).repeat_interleave(widths),
        torch.cat([layer.bias for layer in layers]),
        torch.cat([layer.multiplier for layer in layers]),
        torch.cat([layer.shift for layer in layers]),
        limits.repeat_interleave(widths),
    )


def _norm(norm: IntNorm) -> Norm:
    return Norm(norm.weight, norm.shift, norm.bias, norm.eps, _limit(norm.out_bits))


def _heads(attention: IntAttention) -> Heads:
    words = attention.words
    return Heads(
        attention.heads, attention.size, attention.align,
        (attention.score_multiplier, attention.score_shift), (attention.multiplier, attention.shift),
        words["grid"], words["probability_bits"], _limit(words["out_bits"]), attention.book,
    )  # fmt: skip


def _activation(act: Any) -> Activation:
    if isinstance(act, IntTable):
        return Activation(linear.TABLE, 1 << (act.in_bits - 1), act.table)
    if isinstance(act, IntRelu):
        return Activation(linear.RELU)
    given = act.constants, act.multiplier, act.shift
    return Activation(linear.POLYNOMIAL, int(act.shifted), None, *given)


def _table(table: Any) -> Table:
    return Table(table.weight.squeeze(1), table.multiplier, table.shift)
