"""A pre-norm decoder block with float activations as a few kernels of a GPU, around its attention: for few rows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool.nn.decoder import FRONT, NORMS, SETTINGS, Heads, Parts
from qtool.nn.plan import Plan

TOGETHER = (FRONT, ("output",), ("gate", "up"), ("down",))
"""Linears that multiply the same rows."""


def fits_step(linears: Mapping[str, Any]) -> bool:
    """Whether linears, by role, multiply float rows by the codes that are stored, in one form where rows are shared."""
    from qtool.kernels.triton.float_launch import Codes

    if not all(linear.activations == "float" and isinstance(linear._prepared(), Codes) for linear in linears.values()):
        return False
    return all(len({_matrix(linears[role]).form for role in roles}) == 1 for roles in TOGETHER)


def _matrix(linear: Any) -> Any:
    from qtool.kernels.triton.step import Matrix

    offset = linear._offset()
    scale = linear.weight_scale.detach().contiguous()
    return Matrix(linear._prepared(), scale, None if offset is None else offset.detach().contiguous())


class StepPlan(Plan):
    """A block of which `heads_of` gave the heads; whoever runs it calls the hooks of its attention that only check."""

    runs_checks = True

    def __init__(self, block: nn.Module, parts: Parts, heads: Heads, activation: str) -> None:
        super().__init__([block], SETTINGS, called=True)
        self.heads, self._activation = heads, activation
        self._states, self._output, self._gates, self._down = (self._product(parts, roles) for roles in TOGETHER)
        norms: list[Any] = [parts[role] for role in NORMS]
        self._norms = [(norm.weight.detach().contiguous(), norm.variance_epsilon) for norm in norms]

    def front(
        self, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[batch, heads, tokens, size]` of float32 hidden states `[batch, tokens, hidden]`.

        `cosine` and `sine` are float32 `[1 or batch, tokens, size]`.
        """
        from qtool.kernels.triton import step
        from qtool.kernels.triton.backend import on

        batch, tokens, width = hidden.shape
        queries, groups, size = self.heads.queries, self.heads.groups, self.heads.size
        angles = [x.reshape(-1, size).contiguous() for x in (cosine, sine)]
        with on(hidden):
            _, normal = step.norm(hidden.reshape(-1, width).contiguous(), *self._norms[0])
            states = step.multiply(normal, self._states)
            mixed = step.turn(states, angles[0], angles[1], queries + 2 * groups, queries + groups)
        query, key, value = mixed.view(batch, tokens, -1, size).transpose(1, 2).split((queries, groups, groups), dim=1)
        return query, key, value

    def back(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the block returns `[batch, tokens, hidden]`, for `context` `[batch, tokens, heads · size]`."""
        from qtool.kernels.triton import step
        from qtool.kernels.triton.backend import on

        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        with on(hidden):
            mixed = step.multiply(context.reshape(len(rows), -1).contiguous(), self._output)
            sums, normal = step.norm(rows, *self._norms[1], mixed)
            inner = step.gate(step.multiply(normal, self._gates), self._activation)
            return step.finish(step.multiply(inner, self._down), sums).view(hidden.shape)

    def _product(self, parts: Parts, roles: tuple[str, ...]) -> Any:
        from qtool.kernels.triton.step import Product

        linears: list[Any] = [parts[role] for role in roles]
        biases = [x.weight_scale.new_zeros(x.out_features) if x.bias is None else x.bias.float() for x in linears]
        none = all(linear.bias is None for linear in linears)
        return Product([_matrix(linear) for linear in linears], None if none else torch.cat(biases).detach())
