"""ZeroQuant (Yao et al., NeurIPS 2022): fine-grained INT8 and INT4 weights and token-wise INT8 activations.

Every Linear of every block (GPT-2's Conv1D too) runs as an int8 × int8 → int32 product (paper, section 4.1:
`(S_token · S_channel) · Σ`).
Embedding tables are stored as integers with a scale a row; the head stays in float, as do LayerNorm, softmax and GELU.
"""

from typing import Any, Literal

import torch
from pydantic import Field

from qtool.anatomy import Anatomy, Part, Unit
from qtool.calibrate.statistics import Statistics
from qtool.methods.base import Method, Options, Plan, weight_sqnr_db
from qtool.methods.zeroquant.attention import plan_attention, value_scale, value_sites
from qtool.methods.zeroquant.kept import float_rest, irreplaceable
from qtool.methods.zeroquant.specs import check_linear, check_table
from qtool.nn import MODULES, QAttention, QEmbedding, QLinear, QModule
from qtool.numerics import QTensor, QuantSpec
from qtool.recipe import Spec
from qtool.rounding import ROUNDINGS
from qtool.stream import Reader

_QMAX = 127


class ZeroQuantOptions(Options):
    """How embedding tables are stored, and whether the products of attention are on int8 codes too.

    INT8 for the small tables costs agreement; 16 bits cost almost no space.
    """

    word_embeddings: Spec | Literal["float"] = Field(QuantSpec.parse("int8:channel:sym"), union_mode="left_to_right")
    small_embeddings: Spec | Literal["float"] = Field(QuantSpec.parse("int16:channel:sym"), union_mode="left_to_right")
    attention: Literal["float", "int8"] = "float"


class ZeroQuant(Method):
    """See the module."""

    name = "zeroquant"
    phase = "lower"
    options_class = ZeroQuantOptions
    options: ZeroQuantOptions

    def plan(self, anatomy: Anatomy, model: Any) -> Plan:
        """A rule's overrides are applied here; a spec that cannot be executed is refused with the module's name."""
        whole = {part.path: (unit, part) for unit, part in anatomy.parts()}  # parts of a fused matrix share a module
        attention = plan_attention(anatomy, model) if self.options.attention == "int8" else {}
        self.recipe.check_rules([*whole, *attention])
        modules: dict[str, dict[str, Any]] = {}
        kept: dict[str, str] = {}
        for path, (unit, part) in whole.items():
            module = model.get_submodule(path)
            reason = irreplaceable(anatomy, model, path)
            description = None if reason else self._describe(unit, part, module)
            if description is None:
                kept[path] = reason or "asked for by a rule or an option"
            else:
                modules[path] = description
        for path, description in attention.items():
            if self.recipe.rule_for(path).keep_float:
                kept[path] = "asked for by a rule or an option"
            else:
                modules[path] = description
        changes: dict[str, Any] = {}
        if anatomy.tied_head and anatomy.word_table in modules:
            bias = model.get_submodule(anatomy.tied_head).bias is not None
            modules[anatomy.tied_head] = {"type": "tied_linear", "table": anatomy.word_table, "bias": bias}
            changes["tie_word_embeddings"] = False
        kept |= float_rest(anatomy, model, modules)
        return Plan(modules, kept, changes)

    def _describe(self, unit: Unit, part: Part, module: Any) -> dict[str, Any] | None:
        """The description of one part, or None where it stays float."""
        rule = self.recipe.rule_for(part.path)
        if rule.keep_float:
            return None
        shape = tuple(module.weight.shape)[:: -1 if part.transposed else 1]
        if unit.kind == "embeddings":
            default = self.options.word_embeddings if part.name == "word" else self.options.small_embeddings
            weights = rule.weights or default
            if weights == "float":
                return None
            check_table(weights, shape, part.path)
            padding = getattr(module, "padding_idx", None)
            return {"type": "embedding", "shape": list(shape), "weights": str(weights), "padding_idx": padding}
        weights = rule.weights or self.recipe.weights.spec
        activations = rule.activations or self.recipe.activations.spec
        check_linear(weights, activations, shape, part.path)
        return {
            "type": "linear", "shape": list(shape), "weights": str(weights), "activations": str(activations),
            "bias": module.bias is not None,
        }  # fmt: skip

    def observers(self, unit: Unit, plan: Plan) -> dict[str, str]:
        """The input range of each Linear with static activations; the values of quantized attention."""
        paths = dict.fromkeys(part.path for part in unit.parts)
        inputs = {path: "minmax" for path in paths if path in plan.modules and _is_static(plan.modules[path])}
        return {**inputs, **value_sites(unit, plan)}

    def lower(self, unit: Unit, plan: Plan, weights: Reader, statistics: Statistics | None) -> dict[str, QModule]:
        """Round each matrix of the unit and fill a module with codes and scales."""
        lowered: dict[str, QModule] = {}
        transposed = {part.path for part in unit.parts if part.transposed}
        for path, description in plan.modules.items():
            if not unit.owns(path) or description["type"] == "tied_linear":  # a tied layer has only a float bias
                continue
            module = MODULES[description["type"]].from_description(torch.nn.Module(), path, description, device="meta")
            if isinstance(module, QAttention):
                assert statistics is not None  # `observers` asked for them
                module.value_scale = value_scale(unit, module.groups, statistics)
                lowered[path] = module
                continue
            weight = weights(f"{path}.weight")
            weight = weight.t().contiguous() if path in transposed else weight
            spec = QuantSpec.parse(description["weights"])
            rounding = ROUNDINGS[self.recipe.weights.rounding]
            tensor = rounding(weight, spec, layout="tiled" if isinstance(module, QLinear) else "rows")
            _fill(module, tensor)
            if isinstance(module, QLinear):
                if module.bias is not None:
                    module.bias = weights(f"{path}.bias")
                if statistics is not None and _is_static(description):
                    module.act_scale = _static_scale(statistics, path)
            self._report[path] = {"weight_sqnr_db": weight_sqnr_db(weight, tensor)}
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
