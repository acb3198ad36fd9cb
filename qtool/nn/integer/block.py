"""Attention and the transformer block on integers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.kernels.codebook import EDGE_BITS, LEVEL_MAX, WholeCodebook, whole_edges, whole_levels
from qtool.kernels.reference import exp_constants, share_bits
from qtool.nn.integer.module import Bound, IntComposite, IntModule
from qtool.numerics.codebook import Codebook, check_bits
from qtool.numerics.dyadic import Dyadic
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
        return kernels.backend(query.device).integer_attention(
            query, key, value, real, self.align,
            (self.score_multiplier.view(-1, 1, 1), self.score_shift.view(-1, 1, 1)),
            (self.multiplier.view(-1, 1, self.size), self.shift.view(-1, 1, self.size)),
            grid=self.words["grid"], bits=self.words["probability_bits"], context_bits=self.words["out_bits"],
            book=self.book,
        )  # fmt: skip

    @property
    def book(self) -> WholeCodebook | None:
        """The codebooks that stand in the place of probabilities; none here."""
        return None

    @property
    def sums_to_one(self) -> bool:
        """Whether what values are multiplied by does in each row, so that a center of theirs passes through."""
        return True

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


class IntCodedAttention(IntAttention):
    """`IntAttention` whose probabilities are codes of a few bits (math.md, 9.1).

    Further buffers, int32: `edges` `[heads, codes - 1]` and `levels` `[heads, codes]`, as in `WholeCodebook`; `levels`
    is None where probabilities are only pruned. Further words: `code_bits`, `relative`, `renormalize`.
    """

    edges: torch.Tensor
    levels: torch.Tensor | None

    def __init__(self, description: Mapping[str, Any], *, device: str) -> None:
        super().__init__(description, device=device)
        bits = check_bits(self.words["code_bits"])
        edges, levels = (1, 0) if bits is None else ((1 << bits) - 1, 1 << bits)
        self.register_buffer("edges", torch.empty((self.heads, edges), dtype=torch.int32, device=device))
        held = torch.empty((self.heads, levels), dtype=torch.int32, device=device) if levels else None
        self.register_buffer("levels", held)

    def fill(self, codebook: Codebook) -> None:
        """Take a codebook of all heads, or one for all, once `lower` has filled the rest."""
        self.edges = whole_edges(codebook.edges.expand(self.heads, -1))
        if self.levels is None:
            return
        # Σ levels · values of the longest text must fit int32.
        most = min(LEVEL_MAX, _INT32 // (127 * self.words["tokens"]))
        self.levels, units = whole_levels(codebook.levels.expand(self.heads, -1), most)
        if not self.words["renormalize"]:
            self._scale(units)

    def _scale(self, units: torch.Tensor) -> None:
        """Let the context start from levels worth `units` `[heads]`, not from probabilities."""
        grid = self.words["grid"]
        b, c = exp_constants(grid)
        worth = (b * b + c) / 2.0 ** share_bits(grid) if self.words["relative"] else 1.0
        factor = (units * worth * 2.0 ** self.words["probability_bits"]).repeat_interleave(self.size)
        self.fill_rescale("", Dyadic(self.multiplier, self.shift).to_float() * factor)

    @property
    def sums_to_one(self) -> bool:
        """Where rows are renormalised."""
        return bool(self.words["renormalize"])

    @property
    def book(self) -> WholeCodebook:
        """The codebooks of all heads."""
        return WholeCodebook(self.edges, self.levels, self.words["relative"], self.words["renormalize"])

    def bounds(self) -> list[Bound]:
        """Those of attention, with levels for probabilities; and what edges are multiplied by."""
        b, c = exp_constants(self.words["grid"])
        whole = (b * b + c) * (1 if self.words["relative"] else self.words["tokens"])
        shared = super().bounds()
        if self.levels is not None:
            shared = [bound for bound in shared if bound.what != "P·V"]
            shared.append(Bound("levels·V", 127 * int(self.levels.max()) * self.words["tokens"], _INT32))
        return [*shared, Bound("edge product", (whole << EDGE_BITS) + (1 << EDGE_BITS), (1 << 63) - 1)]

    def description(self) -> dict[str, Any]:
        """Shape, widths, the grid of the scores, and what codes are."""
        return {**super().description(), "type": "int_coded_attention"}


_INT32 = (1 << 31) - 1


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
