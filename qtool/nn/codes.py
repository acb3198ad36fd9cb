"""Attention on a few bits a probability."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.errors import InputError
from qtool.nn.module import QModule
from qtool.numerics.codebook import Codebook

CODES_CHILD = "attention_codes"
"""Name that the module has inside the attention module that it serves."""


class CodedAttention(QModule):
    """softmax(QKᵀ) as codes and the levels that they stand for times V (`kernels.coding`).

    Lies beside the projections that an attention module owns. Buffers: `edges` float64 `[heads, codes - 1]` and
    `levels` float32 `[heads, codes]`, a codebook of each head; `levels` is None where probabilities are only pruned.
    """

    _scales = ("edges", "levels")
    edges: torch.Tensor
    levels: torch.Tensor | None

    def __init__(self, description: Mapping[str, Any], *, device: str) -> None:
        super().__init__()
        self.words = {key: value for key, value in description.items() if key != "type"}
        self.calls = 0
        heads, bits = self.words["heads"], self.words["bits"]
        edges, levels = (1, 0) if bits is None else ((1 << bits) - 1, 1 << bits)
        self.register_buffer("edges", torch.empty((heads, edges), dtype=torch.float64, device=device))
        held = torch.empty((heads, levels), dtype=torch.float32, device=device) if levels else None
        self.register_buffer("levels", held)

    def fill(self, codebook: Codebook) -> None:
        """Take a codebook of all heads, or one for all. Where probabilities are only pruned, its levels say nothing."""
        heads = self.words["heads"]
        self.edges = codebook.edges.expand(heads, -1).clone()
        if self.levels is not None:
            self.levels = codebook.levels.expand(heads, -1).float()

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
        """Context `[batch, queries, heads, size]` in `output_dtype`; codes uint8 `[batch, heads, queries, keys]`."""
        self.calls += 1
        context, codes = kernels.backend(query.device).coded_attention(
            query, key, value, mask, self.edges, self.levels,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, softcap=softcap,
            relative=self.words["relative"], renormalize=self.words["renormalize"],
        )  # fmt: skip
        return context.to(self.output_dtype), codes

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The levels of codes `[batch, heads, queries, keys]`, each row divided by its sum: float32.

        Raises InputError where probabilities are only pruned: then codes do not say them.
        """
        if self.levels is None:
            raise InputError("attention that is only pruned cannot give its probabilities; leave output_attentions out")
        values = Codebook(self.edges, self.levels.double()).values(codes)
        return (values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)).float()

    def description(self) -> dict[str, Any]:
        """Heads, codes, and what they are shares of."""
        return {"type": "attention_codes", **self.words}

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "CodedAttention":
        """See `QModule`."""
        return cls(description, device=device)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return ", ".join(f"{key}={value}" for key, value in self.words.items())
