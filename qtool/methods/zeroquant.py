"""ZeroQuant (Yao et al., NeurIPS 2022), W8A8: fine-grained INT8 weights and token-wise INT8 activations.

Every Linear of every block runs as an int8 × int8 → int32 product (paper, section 4.1: `(S_token · S_channel) · Σ`).
Embedding tables are stored as integers with a scale a row; the head stays in float, as do LayerNorm, softmax and GELU.
"""

import math
from typing import Any, Literal

import torch
from pydantic import Field

from qtool.anatomy import Anatomy, Part, Unit
from qtool.calibrate.statistics import Statistics
from qtool.errors import InputError
from qtool.methods.base import Method, Options, Plan
from qtool.nn import MODULES, QEmbedding, QLinear, QModule
from qtool.numerics import QTensor, QuantSpec
from qtool.recipe import Spec
from qtool.rounding import ROUNDINGS
from qtool.stream import Reader

_QMAX = 127


class ZeroQuantOptions(Options):
    """How embedding tables are stored. INT8 for the small tables costs agreement; 16 bits cost almost no space."""

    word_embeddings: Spec | Literal["float"] = Field(QuantSpec.parse("int8:channel:sym"), union_mode="left_to_right")
    small_embeddings: Spec | Literal["float"] = Field(QuantSpec.parse("int16:channel:sym"), union_mode="left_to_right")


class ZeroQuant(Method):
    """See the module."""

    name = "zeroquant"
    phase = "lower"
    options_class = ZeroQuantOptions
    options: ZeroQuantOptions

    def plan(self, anatomy: Anatomy, model: Any) -> Plan:
        """A rule's overrides are applied here; a spec that cannot be executed is refused with the module's name."""
        self.recipe.check_rules([part.path for _, part in anatomy.parts()])
        modules: dict[str, dict[str, Any]] = {}
        kept: dict[str, str] = {}
        for unit, part in anatomy.parts():
            description = self._describe(unit, part, model.get_submodule(part.path))
            if description is None:
                kept[part.path] = "asked for by a rule or an option"
            else:
                modules[part.path] = description
        changes: dict[str, Any] = {}
        if anatomy.tied_head and anatomy.word_table in modules:
            bias = model.get_submodule(anatomy.tied_head).bias is not None
            modules[anatomy.tied_head] = {"type": "tied_linear", "table": anatomy.word_table, "bias": bias}
            changes["tie_word_embeddings"] = False
        kept |= _float_rest(anatomy, model, modules)
        return Plan(modules, kept, changes)

    def _describe(self, unit: Unit, part: Part, module: Any) -> dict[str, Any] | None:
        """The description of one part, or None where it stays float."""
        rule = self.recipe.rule_for(part.path)
        if rule.keep_float:
            return None
        shape = tuple(module.weight.shape)
        if unit.kind == "embeddings":
            default = self.options.word_embeddings if part.name == "word" else self.options.small_embeddings
            weights = rule.weights or default
            if weights == "float":
                return None
            _check_table(weights, shape, part.path)
            padding = getattr(module, "padding_idx", None)
            return {"type": "embedding", "shape": list(shape), "weights": str(weights), "padding_idx": padding}
        weights = rule.weights or self.recipe.weights.spec
        activations = rule.activations or self.recipe.activations.spec
        _check_linear(weights, activations, shape, part.path)
        return {
            "type": "linear", "shape": list(shape), "weights": str(weights), "activations": str(activations),
            "bias": module.bias is not None,
        }  # fmt: skip

    def observers(self, unit: Unit, plan: Plan) -> dict[str, str]:
        """The input range of each Linear with static activations."""
        return {
            part.path: "minmax"
            for part in unit.parts
            if part.path in plan.modules and _is_static(plan.modules[part.path])
        }

    def lower(self, unit: Unit, plan: Plan, weights: Reader, statistics: Statistics | None) -> dict[str, QModule]:
        """Round each matrix of the unit and fill a module with codes and scales."""
        lowered: dict[str, QModule] = {}
        for path, description in plan.modules.items():
            if not unit.owns(path) or description["type"] == "tied_linear":  # a tied layer has only a float bias
                continue
            module = MODULES[description["type"]].from_description(torch.nn.Module(), path, description, device="meta")
            weight = weights(f"{path}.weight")
            spec = QuantSpec.parse(description["weights"])
            rounding = ROUNDINGS[self.recipe.weights.rounding]
            tensor = rounding(weight, spec, layout="tiled" if isinstance(module, QLinear) else "rows")
            _fill(module, tensor)
            if isinstance(module, QLinear):
                if module.bias is not None:
                    module.bias = weights(f"{path}.bias")
                if statistics is not None and _is_static(description):
                    module.act_scale = _static_scale(statistics, path)
            self._report[path] = _figures(weight, tensor)
            lowered[path] = module
        return lowered


def _fill(module: QModule, tensor: QTensor) -> None:
    assert isinstance(module, QLinear | QEmbedding)
    module.weight, module.weight_scale = tensor.codes, tensor.params.scale


def _is_static(description: Any) -> bool:
    return description["type"] == "linear" and not QuantSpec.parse(description["activations"]).dynamic


def _static_scale(statistics: Statistics, path: str) -> torch.Tensor:
    """max|x| / 127 over the calibration data, `[1]`; 1 where the input was always zero."""
    state = statistics.state(path, "minmax")
    largest = torch.maximum(state["max"], -state["min"]).clamp_min(0).reshape(1)
    return torch.where(largest > 0, largest / _QMAX, torch.ones_like(largest))


def _figures(weight: torch.Tensor, tensor: QTensor) -> dict[str, float]:
    """Signal to quantization noise of the weights in dB (infinite for an exact matrix is reported as 999)."""
    exact = weight.double()
    noise = (exact - tensor.dequantize().double()).square().sum().item()
    signal = exact.square().sum().item()
    return {"weight_sqnr_db": round(10 * math.log10(signal / noise), 2) if noise > 0 and signal > 0 else 999.0}


def _check_linear(weights: QuantSpec, activations: QuantSpec, shape: Any, path: str) -> None:
    """Refuse specs that the int8 product cannot execute. Raises InputError naming the module."""
    if weights.dynamic or not weights.symmetric or not 5 <= weights.num_bits <= 8:
        raise InputError(f"{path}: weights {weights} cannot run; zeroquant takes static symmetric int5 to int8 weights")
    token_wise = activations.dynamic and activations.block == (1, None)
    tensor_wise = not activations.dynamic and activations.block == (None, None)
    if activations.num_bits != 8 or not activations.symmetric or not (token_wise or tensor_wise):
        raise InputError(f"{path}: activations {activations} cannot run; use int8:token:sym or int8:tensor:sym")
    _check_block(weights, shape, path)


def _check_table(weights: QuantSpec, shape: Any, path: str) -> None:
    """Refuse specs that a table lookup cannot execute. Raises InputError naming the module."""
    if weights.dynamic or not weights.symmetric or not 5 <= weights.num_bits <= 16 or weights.block[1] is not None:
        raise InputError(
            f"{path}: weights {weights} cannot run; a table takes static symmetric int5 to int16, scaled by whole rows"
        )
    _check_block(weights, shape, path)


def _check_block(weights: QuantSpec, shape: Any, path: str) -> None:
    try:
        weights.scale_shape(shape)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _float_rest(anatomy: Anatomy, model: Any, modules: Any) -> dict[str, str]:
    """Why what is left stays float."""
    reasons = {}
    for path, module in model.named_modules():
        if path in modules or not any(True for _ in module.parameters(recurse=False)):
            continue
        if anatomy.head.owns(path):
            reasons[path] = "head: small, and its error reaches the logits undamped"
        elif not any(path == part.path for _, part in anatomy.parts()):
            reasons[path] = "normalisation: a vector of weights, computed in float"
    return reasons
