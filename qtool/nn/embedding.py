"""The embedding table on integer codes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool.nn.module import QModule
from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.qtensor import stored_dtype, stored_shape


class QEmbedding(QModule):
    """Rows of integer codes, expanded to float when looked up.

    Buffers: `weight`, codes `[rows, 1, columns]` (int8 or int16; the middle axis makes a loader without qtool stop);
    `weight_scale`, float32 `[row blocks, 1]`. Input ids of any shape, output `[..., columns]` in `output_dtype`.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, shape: tuple[int, int], weights: QuantSpec, *, padding_idx: int | None, device: str = "cpu"):
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self.weights = weights
        self.padding_idx = padding_idx
        codes = torch.empty(stored_shape(weights, shape, "rows"), dtype=stored_dtype(weights), device=device)
        self.register_buffer("weight", codes)
        # Said explicitly: while transformers loads a model in bfloat16, that is what torch makes by default.
        scale = torch.empty(weights.scale_shape(shape), dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids in `[0, rows)`; anything else is an IndexError, as in torch."""
        codes = nn.functional.embedding(ids, self.weight.squeeze(1))
        rows_per_scale = self.num_embeddings // self.weight_scale.shape[0]
        scale = self.weight_scale[torch.div(ids, rows_per_scale, rounding_mode="floor")]
        return (codes.float() * scale).to(self.output_dtype)

    def fill(self, tensor: QTensor) -> None:
        """Take the codes and scales of `tensor`, row by row, as they are."""
        self.weight, self.weight_scale = tensor.codes, tensor.params.scale

    def description(self) -> dict[str, Any]:
        """Shape and spec."""
        return {
            "type": "embedding",
            "shape": [self.num_embeddings, self.embedding_dim],
            "weights": str(self.weights),
            "padding_idx": self.padding_idx,
        }

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "QEmbedding":
        """See `QModule`."""
        rows, columns = description["shape"]
        weights = QuantSpec.parse(description["weights"])
        return cls((rows, columns), weights, padding_idx=description["padding_idx"], device=device)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, weights={self.weights}"
