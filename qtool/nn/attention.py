"""The two products of attention on integer codes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.errors import InputError
from qtool.nn.module import QModule

CHILD = "int8_products"
"""Name that the module has inside the attention module that it serves."""
_ACTIVATIONS = "int8:token:sym"


class QAttention(QModule):
    """QKᵀ and PV as int8 products (`kernels.attention`); lies beside the projections that an attention module owns.

    Buffer: `value_scale`, float32 `[groups]`, what a value code is worth in each head of keys and values. Query and key
    are scaled by token and head as they come, so that a key has the same codes whenever they are made.
    """

    _scales = ("value_scale",)
    value_scale: torch.Tensor

    def __init__(self, heads: int, groups: int, size: int, *, device: str = "cpu") -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.calls = 0
        self.register_buffer("value_scale", torch.empty(groups, dtype=torch.float32, device=device))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Context `[batch, queries, heads, size]` in `output_dtype`, and probability codes; see `int8_attention`."""
        self.calls += 1
        scaling = self.size**-0.5 if scaling is None else scaling
        operation = kernels.backend().int8_attention
        context, codes = operation(query, key, value, self.value_scale, mask, scaling=scaling, softcap=softcap)
        return context.to(self.output_dtype), codes

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The probabilities that codes `[batch, heads, queries, keys]` stand for, float32."""
        return codes / codes.sum(-1, keepdim=True).clamp_min(1)

    def description(self) -> dict[str, Any]:
        """Heads of queries, heads of keys and values, and their size."""
        return attention_description(self.heads, self.groups, self.size)

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "QAttention":
        """See `QModule`."""
        if description["activations"] != _ACTIVATIONS:
            raise InputError(f"{path}: activations {description['activations']} cannot run; use {_ACTIVATIONS}")
        return cls(description["heads"], description["groups"], description["size"], device=device)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"heads={self.heads}, groups={self.groups}, size={self.size}"


def attention_description(heads: int, groups: int, size: int) -> dict[str, Any]:
    """JSON-clean; queries and keys are scaled by token and head."""
    return {"type": "attention", "heads": heads, "groups": groups, "size": size, "activations": _ACTIVATIONS}
