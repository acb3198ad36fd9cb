"""The embeddings of an encoder on integers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.nn.integer.module import Bound, IntComposite, IntModule
from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.qtensor import stored_dtype, stored_shape

TABLES = ("word", "position", "token_type")
"""Roles of the tables whose rows are added."""


class IntTableRows(IntModule):
    """An embedding table: rows of codes, each rescaled to the grid of the sum.

    Buffers: `weight`, int8 or int16 `[rows, 1, columns]`; `multiplier` and `shift`, int32 `[rows]`.
    """

    weight: torch.Tensor
    multiplier: torch.Tensor
    shift: torch.Tensor

    def __init__(self, shape: tuple[int, int], weights: QuantSpec, *, device: str) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self.weights = weights
        codes = torch.empty(stored_shape(weights, shape, "rows"), dtype=stored_dtype(weights), device=device)
        self.register_buffer("weight", codes)
        self.rescale_buffers("", (self.num_embeddings,), device)

    def lower(self, table: QTensor, unit: float) -> None:
        """Codes, and each row's way to the common unit."""
        self.weight = table.codes
        scale = table.params.scale.double().flatten()
        self.fill_rescale("", scale.repeat_interleave(self.num_embeddings // len(scale)) / unit)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids in `[0, rows)`, else IndexError; int64 `[..., columns]`."""
        codes = nn.functional.embedding(ids, self.weight.squeeze(1))
        multiplier, shift = (buffer[ids].unsqueeze(-1) for buffer in (self.multiplier, self.shift))
        return kernels.backend(codes.device).rescale(codes, multiplier, shift)

    def description(self) -> dict[str, Any]:
        """Shape and spec."""
        return {
            "type": "int_rows",
            "shape": [self.num_embeddings, self.embedding_dim],
            "weights": str(self.weights),
        }

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "IntTableRows":
        """See `QModule`."""
        rows, columns = description["shape"]
        return cls((rows, columns), QuantSpec.parse(description["weights"]), device=device)


class IntEmbeddings(IntComposite):
    """Token ids → int32 `[batch, tokens, columns]`: rows of up to three tables added, then i-LayerNorm.

    Parts: `word`, `norm`, and where the model has them `position` and `token_type`. `padding_idx` not None means that
    positions are counted behind it over tokens that are not padding, as RoBERTa does. `exponents`, int32
    `[2]`: hidden states between blocks, and those that leave the last one, are in units of 2^-exponent.
    """

    kind = "int_embeddings"
    exponents: torch.Tensor

    def __init__(self, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str) -> None:
        super().__init__(model, path, description, device=device)
        self.padding_idx: int | None = description["padding_idx"]
        self.register_buffer("exponents", torch.empty(2, dtype=torch.int32, device=device))
        # Only so that `model.device` and `model.dtype` have an answer: no number is read from it.
        self.anchor = nn.Parameter(torch.zeros(1, device=device), requires_grad=False)

    def forward(
        self, ids: torch.Tensor, token_types: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """int64 ids `[batch, tokens]`; without `token_types` all are 0, without `positions` they are counted."""
        total: Any = 0
        for role, rows in zip(TABLES, self.ids(ids, token_types, positions), strict=True):
            if rows is not None:
                total = total + self.part(role)(rows)
        norm: torch.Tensor = self.part("norm")(total.int())
        return norm

    def ids(
        self, ids: torch.Tensor, token_types: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> list[torch.Tensor | None]:
        """The rows of each of TABLES that are added, int64 `[batch, tokens]`; None for a table that is not there."""
        found: list[torch.Tensor | None] = [ids, None, None]
        if "position" in self.parts:
            found[1] = self._positions(ids) if positions is None else positions.expand_as(ids)
        if "token_type" in self.parts:
            found[2] = torch.zeros_like(ids) if token_types is None else token_types.expand_as(ids)
        return found

    def _positions(self, ids: torch.Tensor) -> torch.Tensor:
        if self.padding_idx is None:
            return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        real = (ids != self.padding_idx).long()
        return real.cumsum(1) * real + self.padding_idx

    def bounds(self) -> list[Bound]:
        """The sum of the largest rows, against what LayerNorm takes."""
        largest = 0
        for role in TABLES:
            if role in self.parts:
                table = self.part(role)
                rows = table.weight.squeeze(1).long().abs().amax(1)
                ops = kernels.backend(rows.device)
                largest += int(ops.rescale(rows, table.multiplier.abs(), table.shift).max()) + 1
        return [Bound("sum of tables", largest, (1 << (self.part("norm").in_bits - 1)) - 1)]

    def description(self) -> dict[str, Any]:
        """Parts, and how positions are counted."""
        return {**super().description(), "padding_idx": self.padding_idx}
