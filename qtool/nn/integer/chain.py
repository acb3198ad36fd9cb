"""Poolers and heads on integers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool.errors import InputError
from qtool.nn.integer.embedding import IntTableRows
from qtool.nn.integer.linear import IntLinear
from qtool.nn.integer.module import IntComposite
from qtool.numerics import QTensor


class IntChain(IntComposite):
    """Modules one after the other: a pooler, a classification head, the head of a masked language model.

    int32 `[batch, tokens, hidden]`; with `first` only token 0 of each text goes in.
    """

    kind = "int_chain"

    def __init__(self, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str) -> None:
        super().__init__(model, path, description, device=device)
        self.first: bool = description["first"]
        self.order: list[str] = list(description["order"])  # JSON objects have none

    def forward(self, x: torch.Tensor, **unused: Any) -> torch.Tensor:
        """All parts in their order."""
        x = x[:, 0] if self.first else x
        for role in self.order:
            x = self.part(role)(x)
        return x

    def description(self) -> dict[str, Any]:
        """Parts in their order, and what goes in."""
        return {**super().description(), "order": self.order, "first": self.first}


class IntTiedLinear(IntLinear):
    """The output layer that shares an embedding's codes: its weight stays in the table, stored once."""

    def __init__(self, table: IntTableRows, description: Mapping[str, Any], *, device: str) -> None:
        super().__init__(description, device=device)
        # In a tuple the table is not a submodule, so its tensors are not listed (and stored) twice.
        self._table = (table,)
        del self._buffers["weight"]

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "IntTiedLinear":
        """See `QModule`. Raises InputError when the table is not one of integer rows."""
        table = model.get_submodule(description["table"])
        if not isinstance(table, IntTableRows):
            raise InputError(f"{path}: its table {description['table']} is not a table of integer rows")
        return cls(table, description, device=device)

    def description(self) -> dict[str, Any]:
        """As a linear's, with the path of the table."""
        return {**super().description(), "type": "int_tied_linear"}

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The table's codes."""
        return self._table[0].weight

    def _stored(self, weight: QTensor, floor: torch.Tensor) -> QTensor:
        if bool((weight.params.scale.double().flatten() < floor).any()):
            raise InputError("the bias of an output layer that shares the word table is too large for its rows")
        return weight
