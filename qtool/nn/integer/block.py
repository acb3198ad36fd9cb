"""Attention and the transformer block on integers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.nn.integer.module import Bound, IntComposite, IntModule
from qtool.numerics.grid import Grid


class IntAttention(IntModule):
    """softmax(Q·Kᵀ/√d)·V (math.md, 9). int32 query, 8-bit key and value `[batch, tokens, hidden]` → int32 context.

    Buffers, int32: `score_multiplier`, `score_shift` `[heads]`; `multiplier`, `shift` `[hidden]`; `align` `[1]`.
    """

    align: torch.Tensor
    score_multiplier: torch.Tensor
    score_shift: torch.Tensor
    multiplier: torch.Tensor
    shift: torch.Tensor

    def __init__(self, description: Mapping[str, Any], *, device: str) -> None:
        super().__init__()
        self.words = {key: value for key, value in description.items() if key not in ("path", "type")}
        self.heads, self.hidden = self.words["heads"], self.words["hidden"]
        self.size = self.hidden // self.heads
        self.rescale_buffers("score_", (self.heads,), device)
        self.rescale_buffers("", (self.hidden,), device)
        self.register_buffer("align", torch.empty(1, dtype=torch.int32, device=device))

    def lower(self, query: Grid, value: torch.Tensor, target: Grid) -> None:
        """Fill the buffers. `query.unit`, a number a head `[heads]`, includes the key's unit; `value` `[hidden]` is the
        unit of each channel of the values, and `target.unit` one number or one a channel.
        """
        reach = self.size * 127 * 127 * query.limit
        align = max(0, reach.bit_length() - 30)
        self.align = torch.tensor([align], dtype=torch.int32)
        unit = torch.as_tensor(query.unit, dtype=torch.float64) / 127 * 2.0**align
        self.fill_rescale("score_", unit / self.size**0.5 / (math.log(2) / 2 ** self.words["grid"]))
        self.fill_rescale("", value / 2.0 ** self.words["probability_bits"] / target.unit)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """`real` is boolean `[batch, tokens]`."""
        heads = (self.heads, self.size)
        query, key, value = (x.unflatten(-1, heads) for x in (query, key, value))
        return kernels.backend().integer_attention(
            query, key, value, real, self.align,
            (self.score_multiplier.view(-1, 1, 1), self.score_shift.view(-1, 1, 1)),
            (self.multiplier.view(-1, 1, self.size), self.shift.view(-1, 1, self.size)),
            grid=self.words["grid"], bits=self.words["probability_bits"], context_bits=self.words["out_bits"],
        )  # fmt: skip

    def bounds(self) -> list[Bound]:
        """Q·K, its row product, and P·V for the longest text."""
        products = self.size * 127 * 127
        row = products * ((1 << (self.words["query_bits"] - 1)) - 1)
        mass = (1 << self.words["probability_bits"]) + self.words["tokens"] // 2
        return [
            Bound("Q·K", products, (1 << 31) - 1),
            Bound("Q·K row product", row, (1 << 62) - 1),
            Bound("Q·K aligned", (row >> int(self.align)) + 1, (1 << 31) - 1),
            Bound("P·V", 127 * mass, (1 << 31) - 1),
        ]

    def description(self) -> dict[str, Any]:
        """Shape, widths and the grid of the scores."""
        return {"type": "int_attention", **self.words}

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "IntAttention":
        """See `QModule`."""
        return cls(description, device=device)


class IntBlock(IntComposite):
    """A post-norm encoder block: int32 `[batch, tokens, hidden]` in and out, on the grid of the residual stream.

    Parts: `query`, `key`, `value`, `attention`, `output`, `attention_norm`, `up`, `act`, `down`, `ffn_norm`.
    """

    kind = "int_block"

    def forward(self, hidden: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """`real` is boolean `[batch, tokens]`: false keys are not attended to."""
        query, key, value = (self.part(role) for role in ("query", "key", "value"))
        codes = query.quantize(hidden)  # one input, one rounding, three products
        context = self.part("attention")(query(codes), key(codes), value(codes), real)
        hidden = self.part("attention_norm")(hidden + self.part("output")(context))
        inner = self.part("act")(self.part("up")(hidden))
        result: torch.Tensor = self.part("ffn_norm")(hidden + self.part("down")(inner))
        return result
