"""The blocks of a float encoder with integer weights as one native call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qtool.kernels import structs
from qtool.kernels.integer import Native, Operand, q_linear, whole_tiles
from qtool.nn.linear import QLinear
from qtool.nn.plan import Plan
from qtool.numerics import QuantSpec
from qtool.numerics.qtensor import column_width

LINEARS = ("query", "key", "value", "output", "up", "down")
NORMS = ("attention_norm", "ffn_norm")
BUFFERS = {"weight", "weight_scale", "bias", "act_scale"}
ACTIVATION_SPECS = (QuantSpec.parse("int8:token:sym"), QuantSpec.parse("int8:tensor:sym"))
ACTIVATIONS = {"gelu": structs.QEncoder.GELU, "relu": structs.QEncoder.RELU}

Parts = Mapping[str, nn.Module]
"""A post-norm block: modules by role, of LINEARS and NORMS."""


def fits(blocks: Sequence[Parts], heads: int, activation: str) -> bool:
    """Whether the kernels run such blocks: int8 or int4 linears in any mix, float32 throughout."""
    hidden = int(blocks[0]["query"].in_features)  # type: ignore[arg-type]
    return (
        activation in ACTIVATIONS
        and hidden % heads == 0
        and all(_fits_attention(block, hidden, hidden // heads) for block in blocks)
        and all(_fits_linear(block["up"], (hidden, None)) for block in blocks)
        and all(_fits_linear(block["down"], (None, hidden)) for block in blocks)
        and all(_fits_norm(block[role]) for block in blocks for role in NORMS)
        and len({block["up"].out_features for block in blocks}) == 1
        and len({block["query"].act_scale is None for block in blocks if not _headless(block)}) <= 1
    )


def _fits_attention(block: Parts, hidden: int, size: int) -> bool:
    """Heads of `size` channels, not wider than the residual stream; or what is left of an attention without any."""
    if _headless(block):
        output: Any = block["output"]
        return bool(output.out_features == hidden and output.weight.dtype == torch.float32)
    width = int(block["query"].out_features)  # type: ignore[arg-type]
    return (
        width % size == 0
        and width <= hidden
        and all(_fits_linear(block[role], (hidden, width)) for role in ("query", "key", "value"))
        and _fits_linear(block["output"], (width, hidden))
        and all(_shares_codes(block["query"], block[role]) for role in ("key", "value"))
    )


def _headless(block: Parts) -> bool:
    """Whether an attention lost all of its heads: float projections from and to nothing."""
    projections = [block[role] for role in ("query", "key", "value", "output")]
    return all(type(one) is nn.Linear and not one.weight.numel() for one in projections)


def plain(block: nn.Module, parts: Parts, heads: int, activation: type[nn.Module]) -> bool:
    """Whether a block is made of its `parts`, dropout and `activation` alone, and scales its scores as usual."""
    known = {id(part) for part in parts.values()}
    leaves = [module for module in block.modules() if not any(True for _ in module.children())]
    usual = all(id(leaf) in known or type(leaf) in (nn.Dropout, activation) for leaf in leaves)
    size = parts["query"].in_features / heads  # type: ignore[operator]
    scales = [module.scaling for module in block.modules() if isinstance(getattr(module, "scaling", None), float)]
    return usual and all(scale == size**-0.5 for scale in scales)


def _shares_codes(one: Any, other: Any) -> bool:
    """Whether codes that were made for one linear are those of another."""
    if one.activations != other.activations:
        return False
    return one.act_scale is None or torch.equal(one.act_scale, other.act_scale)


def _fits_linear(linear: Any, sizes: tuple[int | None, int | None]) -> bool:
    """Whether the kernels run a linear of these inputs and outputs (None: any)."""
    if type(linear) is not QLinear or linear.output_dtype != torch.float32:
        return False
    # What is listed is what the kernels read: a linear with another tensor or spec computes something else.
    if not {name for name, _ in linear.named_buffers(recurse=False)} <= BUFFERS:
        return False
    known = linear.weights.symmetric and linear.weights.storage in ("int8", "nibble")
    if not known or linear.activations not in ACTIVATION_SPECS:
        return False
    width = column_width(linear.weights, linear.in_features)
    found = linear.in_features, linear.out_features
    return whole_tiles(linear.in_features, width) and all(
        want in (None, have) for want, have in zip(sizes, found, strict=True)
    )


def _fits_norm(norm: Any) -> bool:
    return type(norm) is nn.LayerNorm and norm.elementwise_affine and norm.weight.dtype == torch.float32


class FloatPlan(Plan):
    """Blocks that `fits` found fit. `roots` are the modules that hold them."""

    def __init__(self, roots: Sequence[nn.Module], blocks: Sequence[Parts], heads: int, activation: str) -> None:
        """`heads` are those of a block that lost none."""
        super().__init__(roots, ("eps", "scaling"))
        layers = [structs.QBlock(**{role: self._part(module) for role, module in block.items()}) for block in blocks]
        self._blocks = (structs.QBlock * len(layers))(*layers)
        hidden = int(blocks[0]["query"].in_features)  # type: ignore[arg-type]
        self.encoder = structs.QEncoder(self._blocks, len(layers), hidden, hidden // heads, ACTIVATIONS[activation])

    def run(self, hidden: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """See `Native.float_encoder`."""
        return Native.float_encoder(self.encoder, hidden, real)

    def _part(self, module: Any) -> Any:
        if isinstance(module, QLinear):
            operand: Operand = module._prepared()
            bias = None if module.bias is None else module.bias.detach().float()
            self._kept.append(bias)
            return q_linear(operand, module.weight_scale, bias, module.act_scale, self._kept)
        if isinstance(module, nn.Linear):  # of an attention without heads
            return structs.QLinear(
                bias=self._address(module.bias), inputs=module.in_features, outputs=module.out_features
            )
        addresses = self._address(module.weight), self._address(module.bias)
        return structs.Norm(*addresses, module.eps, module.normalized_shape[0])
