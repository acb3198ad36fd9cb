"""The output layer that shares an embedding's codes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.errors import InputError
from qtool.nn.embedding import QEmbedding
from qtool.nn.module import QModule


class QTiedLinear(QModule):
    """`x @ (codes · scale)^T + b` with the codes and row scales of a `QEmbedding`, which stay there, stored once.

    Activations stay in float: logits over a vocabulary are the most sensitive product of a model. Input
    `[..., columns]`, output `[..., rows]` in `output_dtype`. The only buffer is `bias`, `[rows]`.
    """

    bias: torch.Tensor | None

    def __init__(self, table: QEmbedding, table_path: str, *, bias: bool, device: str = "cpu") -> None:
        super().__init__()
        self.table_path = table_path
        # In a tuple the table is not a submodule, so its tensors are not listed (and stored) twice.
        self._table = (table,)
        self.register_buffer("bias", torch.empty(table.num_embeddings, device=device) if bias else None)

    @property
    def weight(self) -> torch.Tensor:
        """The table's codes, for code that looks whether the weight of an output layer was loaded."""
        return self._table[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any leading shape, any float dtype."""
        table = self._table[0]
        rows = x.reshape(-1, table.embedding_dim).float()
        scale, rows_of_one = table.weight_scale, table.num_embeddings // table.weight_scale.shape[0]
        scale = scale if rows_of_one == 1 else scale.repeat_interleave(rows_of_one, dim=0)
        bias = None if self.bias is None else self.bias.float()
        y = kernels.backend(x.device).row_table_linear(rows, table.weight.squeeze(1), scale, bias)
        return y.view(*x.shape[:-1], table.num_embeddings).to(self.output_dtype)

    def description(self) -> dict[str, Any]:
        """The path of the table that is shared."""
        return {"type": "tied_linear", "table": self.table_path, "bias": self.bias is not None}

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "QTiedLinear":
        """See `QModule`. Raises InputError when the table is not a quantized embedding."""
        table = model.get_submodule(description["table"])
        if not isinstance(table, QEmbedding):
            raise InputError(f"{path}: its table {description['table']} is not a quantized embedding")
        return cls(table, description["table"], bias=description["bias"], device=device)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"table={self.table_path}"
