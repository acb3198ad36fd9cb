"""A pre-norm decoder block with integer weights as two native calls, around its attention."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool.kernels import structs
from qtool.kernels.integer import Native, NativeCodes, Operand, q_linear
from qtool.nn.linear import QLinear
from qtool.nn.plan import Plan

FRONT, BACK = ("query", "key", "value"), ("output", "gate", "up", "down")
NORMS = ("attention_norm", "ffn_norm")
BUFFERS = {"weight", "weight_scale", "weight_zero_point", "weight_offset", "bias", "act_scale"}
ACTIVATIONS = {"silu": structs.DecoderBack.SILU, "gelu": structs.DecoderBack.GELU}
SETTINGS = ("variance_epsilon", "head_dim", "activations", "output_dtype")

Parts = Mapping[str, nn.Module]
"""A block: linears by role, of FRONT and BACK, and RMSNorms, of NORMS."""


@dataclass(frozen=True)
class Heads:
    """Heads of queries, heads of keys and values, and channels of each."""

    queries: int
    groups: int
    size: int


def heads_of(parts: Parts, size: int, fits: Callable[[Mapping[str, Any]], bool]) -> Heads | None:
    """The heads of a block that can be joined, else None; `fits` says it of linears by role."""
    linears: dict[str, Any] = {role: parts[role] for role in (*FRONT, *BACK)}
    if not all(map(_plain, linears.values())) or not fits(linears):
        return None
    hidden, inner = linears["query"].in_features, linears["up"].out_features
    outer, keys = linears["query"].out_features, linears["key"].out_features
    shapes = {
        **{"query": (outer, hidden), "key": (keys, hidden), "value": (keys, hidden), "output": (hidden, outer)},
        **{"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)},
    }
    whole = all((linears[role].out_features, linears[role].in_features) == shape for role, shape in shapes.items())
    if not whole or not all(_fits_norm(parts[role], hidden) for role in NORMS):
        return None
    heads = Heads(outer // size, keys // size, size)
    exact = heads.queries * size == outer and heads.groups * size == keys
    return heads if exact and size % 2 == 0 and heads.queries % heads.groups == 0 else None


def _plain(linear: Any) -> bool:
    if type(linear) is not QLinear or linear.output_dtype != torch.float32:
        return False
    # What is listed is what the kernels read: a linear with another tensor computes something else.
    return {name for name, _ in linear.named_buffers(recurse=False)} <= BUFFERS


def fits_native(linears: Mapping[str, Any]) -> bool:
    """Whether linears, by role, have codes that the native kernels run, which they do in any mix."""
    return all(
        isinstance(linear._prepared(), NativeCodes if linear.activations == "float" else Operand)
        for linear in linears.values()
    )


def _products(linear: Any) -> int:
    return int(linear.out_features * linear.in_features)


def _fits_norm(norm: Any, hidden: int) -> bool:
    tensors = {name: tensor for name, tensor in (*norm.named_parameters(), *norm.named_buffers())}
    if set(tensors) != {"weight"} or not isinstance(getattr(norm, "variance_epsilon", None), float):
        return False
    return tuple(tensors["weight"].shape) == (hidden,) and tensors["weight"].dtype == torch.float32


class DecoderPlan(Plan):
    """A block of which `heads_of` gave the heads; whoever runs it calls the hooks of its attention that only check."""

    runs_checks = True

    def __init__(self, block: nn.Module, parts: Parts, heads: Heads, activation: str) -> None:
        super().__init__([block], SETTINGS, called=True)
        self.heads = heads
        front, back = ({role: self._linear(parts[role]) for role in roles} for roles in (FRONT, BACK))
        norms = [self._norm(parts[role]) for role in NORMS]
        self._front = structs.DecoderFront(*front.values(), norms[0], heads.queries, heads.groups, heads.size)
        self._back = structs.DecoderBack(*back.values(), norms[1], ACTIVATIONS[activation])
        self._work = [sum(_products(parts[role]) for role in roles) for roles in (FRONT, BACK)]

    def front(
        self, hidden: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `[batch, heads, tokens, size]`; see `Native.decoder_front`."""
        mixed = Native.decoder_front(self._front, self._work[0], hidden, cosine, sine).transpose(1, 2)
        queries, groups = self.heads.queries, self.heads.groups
        query, key, value = mixed.split((queries, groups, groups), dim=1)
        return query, key, value

    def back(self, context: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See `Native.decoder_back`."""
        return Native.decoder_back(self._back, self._work[1], context, hidden)

    def _linear(self, module: Any) -> structs.DecoderLinear:
        operand, offset = module._prepared(), module._offset()
        bias = None if module.bias is None else module.bias.detach().float()
        self._kept += [operand, offset, bias]
        if isinstance(operand, NativeCodes):
            codes = operand.struct(module.weight_scale, offset, bias)
            self._kept.append(codes.kept)
            return structs.DecoderLinear(codes=codes, is_float=1)
        made = q_linear(operand, module.weight_scale, bias, module.act_scale, self._kept, offset)
        return structs.DecoderLinear(quantized=made, is_float=0)

    def _norm(self, module: Any) -> structs.RmsNorm:
        return structs.RmsNorm(self._address(module.weight), module.variance_epsilon, module.weight.shape[0])
