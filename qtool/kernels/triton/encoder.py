"""An integer encoder on a GPU: its blocks as a chain of kernels over the rows of real tokens.

Where tokens lie is computed on the device, and programs beyond the last row end at once: nothing waits for the host, so
that a forward can be recorded as a graph for a shape of ids, whatever the padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qtool.kernels.triton import launch
from qtool.kernels.triton.launch import Coding, Count, Heads, Layer, Norm, Table

Tensor = torch.Tensor


@dataclass(frozen=True)
class Block:
    """A post-norm block. `states` makes query, key and value side by side; a Coding belongs to what reads it."""

    states_coding: Coding
    states: Layer
    heads: Heads
    output_coding: Coding
    output: Layer
    attention_norm: Norm
    up_coding: Coding
    up: Layer
    down_coding: Coding
    down: Layer
    ffn_norm: Norm


@dataclass(frozen=True)
class Encoder:
    """Embedding tables with their norm, a projection where embeddings are narrower than blocks, and the blocks."""

    tables: Sequence[Table | None]
    norm: Norm
    projection_coding: Coding | None
    projection: Layer | None
    blocks: Sequence[Block]

    def forward(self, ids: Sequence[Tensor | None], real: Tensor) -> Tensor:
        """Integer ids of each table `[batch, tokens]` and boolean `real` → int32 `[batch, tokens, width]`.

        What is not real is not computed, and 0. Ids that a table does not have stop the device, as torch's embedding
        does.
        """
        self._check(ids, real)
        order = real.flatten().cumsum(0).int()
        starts = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()
        count = Count(real.numel(), starts[-1:])
        # Rows of padding are all written to one place behind the last, which nobody reads.
        place = torch.where(real.flatten(), order - 1, real.numel()).long()
        packed = [None if x is None else self._packed(x, place) for x in ids]
        hidden = self._blocks(self._embeddings(packed, count), starts, real.shape[1], count)
        rows = hidden.index_select(0, (order - 1).clamp_min(0).long()) * real.flatten()[:, None]
        return rows.view(*real.shape, -1)

    def _check(self, ids: Sequence[Tensor | None], real: Tensor) -> None:
        for each, table in zip(ids, self.tables, strict=True):
            if each is not None and table is not None:
                known = ~real | ((each >= 0) & (each < len(table.codes)))
                torch._assert_async(known.all(), "an id is not one of the rows of its embedding table")

    @staticmethod
    def _packed(x: Tensor, place: Tensor) -> Tensor:
        return x.new_zeros(x.numel() + 1).scatter_(0, place, x.flatten())

    def _embeddings(self, ids: Sequence[Tensor | None], count: Count) -> Tensor:
        """int32 rows that enter the first block."""
        first = self.tables[0]
        assert first is not None
        total = first.codes.new_empty((count.most, first.codes.shape[1]), dtype=torch.int32)
        launch.embed(ids, self.tables, count, total)
        hidden = torch.empty_like(total)
        launch.norm(total, None, self.norm, count, hidden)
        if self.projection is None or self.projection_coding is None:
            return hidden
        codes, amax = _room(hidden, self.projection_coding)
        launch.quantize(hidden, self.projection_coding, count, codes, amax)
        return _outputs(codes, amax, self.projection, count, torch.int32)

    def _blocks(self, hidden: Tensor, starts: Tensor, tokens: int, count: Count) -> Tensor:
        codes, amax = _room(hidden, self.blocks[0].states_coding)
        launch.quantize(hidden, self.blocks[0].states_coding, count, codes, amax)
        for number, block in enumerate(self.blocks):
            following = self.blocks[number + 1 : number + 2]
            coding = following[0].states_coding if following else None
            hidden, codes, amax = _block(block, hidden, codes, amax, starts, tokens, count, coding)
        return hidden


def _block(
    block: Block, hidden: Tensor, codes: Tensor, amax: Tensor | None, starts: Tensor, tokens: int, count: Count,
    coding: Coding | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """A block from hidden states and their codes: what leaves it, and its codes where a `coding` comes next."""
    states = _outputs(codes, amax, block.states, count, torch.int16)
    width = block.heads.heads * block.heads.size
    parts = [states[:, start : start + width] for start in (0, width, 2 * width)]
    context = states.new_empty((count.most, width), dtype=torch.int32)
    launch.attend(parts, block.heads, starts, starts, tokens, context)
    codes, amax = _room(context, block.output_coding)
    launch.quantize(context, block.output_coding, count, codes, amax)
    attended = _outputs(codes, amax, block.output, count, torch.int32)
    hidden, codes, amax = _normed(attended, hidden, block.attention_norm, count, block.up_coding)
    inner = _outputs(codes, amax, block.up, count, torch.int16)
    codes, amax = _room(inner, block.down_coding)
    launch.quantize(inner, block.down_coding, count, codes, amax)
    left = _outputs(codes, amax, block.down, count, torch.int32)
    return _normed(left, hidden, block.ffn_norm, count, coding)


def _room(x: Tensor, coding: Coding) -> tuple[Tensor, Tensor | None]:
    """Where the codes of rows go, and their largest values."""
    amax = None if coding.static else x.new_empty((len(x), 1), dtype=torch.int32)
    return torch.empty_like(x, dtype=torch.int8), amax


def _outputs(codes: Tensor, amax: Tensor | None, layer: Layer, count: Count, dtype: torch.dtype) -> Tensor:
    result = codes.new_empty((count.most, len(layer.weight)), dtype=dtype)
    launch.layer(codes, amax, layer, count, result)
    return result


def _normed(
    x: Tensor, residual: Tensor, norm: Norm, count: Count, coding: Coding | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    result = torch.empty_like(x)
    if coding is None:
        launch.norm(x, residual, norm, count, result)
        return result, x.new_empty(0, dtype=torch.int8), None
    codes, amax = _room(x, coding)
    launch.norm(x, residual, norm, count, result, coding, codes, amax)
    return result, codes, amax
