"""An integer encoder as one native call: its modules' buffers as the structs that the kernels read."""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from qtool import kernels
from qtool.errors import InputError
from qtool.kernels import reference, structs
from qtool.kernels.integer import Native, Operand
from qtool.nn.integer.activation import IntRelu, IntTable
from qtool.nn.integer.block import IntBlock
from qtool.nn.integer.embedding import TABLES, IntEmbeddings
from qtool.nn.integer.linear import IntLinear
from qtool.nn.plan import Plan, kept_plan


class IntPlan(Plan):
    """The embeddings and blocks of an integer encoder."""

    def __init__(self, embeddings: IntEmbeddings, projection: IntLinear | None, blocks: Sequence[IntBlock]) -> None:
        super().__init__(roots_of(embeddings, projection, blocks))
        self.width = blocks[0].part("output").out_features
        tables = [
            self._rows(embeddings.part(role)) if role in embeddings.parts else structs.IntRows() for role in TABLES
        ]
        for block in blocks:
            check_widths(block)
        layers = [structs.IntBlock(**{role: self._part(block.part(role)) for role in block.parts}) for block in blocks]
        self._blocks = (structs.IntBlock * len(layers))(*layers)
        self.encoder = structs.IntEncoder(
            (structs.IntRows * 3)(*tables),
            self._part(embeddings.part("norm")),
            structs.IntLinear() if projection is None else self._part(projection),
            self._blocks,
            len(layers),
            self.width,
        )

    def run(self, ids: list[torch.Tensor | None], real: torch.Tensor) -> torch.Tensor:
        """See `Native.integer_encoder`."""
        return Native.integer_encoder(self.encoder, ids, real, self.width)

    def _part(self, module: nn.Module) -> Any:
        makers: dict[str, Callable[[Any], Any]] = {
            "IntLinear": self._linear, "IntNorm": self._norm, "IntAttention": self._attention,
            "IntCodedAttention": self._attention,
            "IntTable": self._activation, "IntGelu": self._activation, "IntRelu": self._activation,
        }  # fmt: skip
        return makers[type(module).__name__](module)

    def _rows(self, table: Any) -> structs.IntRows:
        bits = 8 * table.weight.element_size()
        return structs.IntRows(
            *(self._address(x) for x in (table.weight, table.multiplier, table.shift)), table.num_embeddings, bits
        )

    def _linear(self, linear: IntLinear) -> structs.IntLinear:
        operand: Operand = linear._prepared()[0]
        names = ("multiplier", "shift", "offset")
        inputs = [getattr(linear, f"in_{name}") if linear.rescales else None for name in names]
        tensors = (operand.tiles, operand.correction(linear.unsigned), linear.bias, linear.multiplier, linear.shift)
        return structs.IntLinear(
            *(self._address(x) for x in (*tensors, *inputs)),
            linear.in_features, linear.out_features, linear.in_bits, linear.out_bits, int(linear.align),
            linear.dynamic, linear.unsigned,
        )  # fmt: skip

    def _norm(self, norm: Any) -> structs.IntNorm:
        addresses = (self._address(x) for x in (norm.weight, norm.shift, norm.bias))
        return structs.IntNorm(*addresses, int(norm.eps), norm.size, norm.out_bits)

    def _attention(self, attention: Any) -> structs.IntAttention:
        names = ("score_multiplier", "score_shift", "multiplier", "shift")
        words = attention.words
        return structs.IntAttention(
            *(self._address(getattr(attention, name)) for name in names),
            attention.heads, attention.size, int(attention.align), words["grid"], words["probability_bits"],
            words["out_bits"], *reference.exp_constants(words["grid"]), self._codebook(attention),
        )  # fmt: skip

    def _codebook(self, attention: Any) -> structs.WholeCodebook:
        book = attention.book
        if book is None:
            return structs.WholeCodebook()
        addresses = self._address(book.edges), None if book.levels is None else self._address(book.levels)
        return structs.WholeCodebook(*addresses, book.edges.shape[1], book.relative, book.renormalize)

    def _activation(self, act: Any) -> structs.IntActivation:
        if isinstance(act, IntTable):
            return structs.IntActivation(
                # The kernels load two entries at a time and use the first.
                table=self._address(torch.nn.functional.pad(act.table, (0, 1))),
                kind=structs.IntActivation.TABLE,
                in_bits=act.in_bits,
            )
        if isinstance(act, IntRelu):
            return structs.IntActivation(kind=structs.IntActivation.RELU)
        return structs.IntActivation(
            constants=(ctypes.c_int64 * 4)(*act.constants.tolist()), kind=structs.IntActivation.POLYNOMIAL,
            in_bits=act.in_bits, multiplier=int(act.multiplier), shift=int(act.shift), shifted=act.shifted,
        )  # fmt: skip


def check_widths(block: IntBlock) -> None:
    """An activation is looked up without a look at its index. Raises InputError where that may leave the table."""
    up, act = block.part("up"), block.part("act")
    if isinstance(act, IntTable) and act.in_bits < up.out_bits:
        raise InputError(f"a table for {act.in_bits} bits behind a layer of {up.out_bits}: the model is damaged")


class Runs(Protocol):
    """A plan of a whole encoder."""

    def run(self, ids: list[torch.Tensor | None], real: torch.Tensor) -> torch.Tensor:
        """Ids of each table `[batch, tokens]` and boolean `real` → int32 `[batch, tokens, width]`, 0 at padding."""


def planned(embeddings: IntEmbeddings, projection: IntLinear | None, blocks: Sequence[IntBlock]) -> Runs | None:
    """The plan of an encoder, kept beside its embeddings; None where modules have to be called one by one."""

    def make() -> Any:
        if kernels.backend(embeddings.exponents.device).name == "native":
            return IntPlan(embeddings, projection, blocks)
        from qtool.nn.integer.gpu import GpuPlan  # imports triton

        return GpuPlan(embeddings, projection, blocks)

    return kept_plan(embeddings, roots_of(embeddings, projection, blocks), make, backends=("native", "triton"))


def roots_of(embeddings: IntEmbeddings, projection: IntLinear | None, blocks: Sequence[IntBlock]) -> list[nn.Module]:
    """The modules that a plan depends on."""
    return [embeddings, *([] if projection is None else [projection]), *blocks]
