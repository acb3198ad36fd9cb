"""ZeroQuant (Yao et al., NeurIPS 2022): fine-grained INT8 and INT4 weights and token-wise INT8 activations.

Every Linear of every block (GPT-2's Conv1D too) runs as an int8 × int8 → int32 product (paper, section 4.1:
`(S_token · S_channel) · Σ`).
Embedding tables are stored as integers with a scale a row; the head stays in float, as do LayerNorm, softmax and GELU.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from qtool.anatomy import Anatomy, Feed, Part, Unit, matrix_kind
from qtool.calibrate.statistics import Statistics
from qtool.distill import CHECK_STEPS, Schedule, distill
from qtool.errors import InputError
from qtool.kernels.reference import QMAX
from qtool.lesson import Lesson
from qtool.methods.base import Method, Options, Plan, weight_sqnr_db
from qtool.methods.zeroquant import migration
from qtool.methods.zeroquant.attention import ATTENTION, plan_attention, value_scale, value_sites
from qtool.methods.zeroquant.kept import float_rest, irreplaceable, vocabulary_head
from qtool.methods.zeroquant.migration import Migration
from qtool.methods.zeroquant.specs import check_linear, check_table
from qtool.nn import MODULES, QAttention, QEmbedding, QLinear, QModule
from qtool.numerics import QTensor, QuantSpec
from qtool.recipe import ActivationSpec, Count, Recipe, Spec
from qtool.rounding import DATA_ROUNDINGS, ROUNDINGS, Moments
from qtool.stream import Reader, stored

_PRODUCTS = {False: "int8 x int8 -> int32", True: "float32 x integer codes -> float32"}
_TILED, _TURNED, _WIDE = 4, 4, 32  # bytes of a weight while it is laid out, turned round, or tried on many scales
_SQUARES = 8  # float64 matrices of inputs by inputs: moments, factors and what they are made from
_MORE_SQUARES = 6  # moments of three more matrices that read the same tensor, where each has its own
_STAGES = 4  # of a block, that wait for each other
_LEARNING = 40  # bytes of a weight that is distilled: itself, places, gradient, two moments, the best, products


class LKD(Options):
    """Layer-by-layer knowledge distillation: `true` for the defaults, or what differs from them; see `Schedule`."""

    enabled: bool = True
    inputs: Literal["teacher", "student"] = Schedule.inputs
    loss: Literal["mse", "kl"] = Schedule.loss
    train: Literal["weights", "scales", "both"] = Schedule.train
    steps: Count = Schedule.steps
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Schedule.learning_rate
    patience: Count | None = Schedule.patience

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"enabled": value} if isinstance(value, bool) else value

    def schedule(self) -> Schedule:
        """As distillation reads it."""
        return Schedule(**self.model_dump(exclude={"enabled"}))


class ZeroQuantOptions(Options):
    """How embedding tables are stored, whether the products of attention are on int8 codes too, and what learns.

    INT8 for the small tables costs agreement; 16 bits cost almost no space. `head` is for an output layer over the
    vocabulary that is not tied to the word table (a tied one uses its codes).
    """

    word_embeddings: Spec | Literal["float"] = Field(QuantSpec.parse("int8:channel:sym"), union_mode="left_to_right")
    small_embeddings: Spec | Literal["float"] = Field(QuantSpec.parse("int16:channel:sym"), union_mode="left_to_right")
    token_weights: Literal["even", "sensitivity"] = Field(
        "even", description="How calibration tokens count in gptq and gpfq: the same, or by what hangs on their rows"
    )
    lkd: LKD = LKD(enabled=False)
    smoothing: float | None = Field(None, ge=0, le=1, description="Exponent of migration into weights; null: none")
    tuning: int = Field(0, ge=0, description="Steps in which the smoothing is tuned on a sample of activations")
    head: Spec | Literal["float"] = Field("float", union_mode="left_to_right")
    head_activations: ActivationSpec = "float"
    attention: Literal["float", "int8"] = "float"


class ZeroQuant(Method):
    """See the module."""

    name = "zeroquant"
    phase = "lower"
    options_class = ZeroQuantOptions
    options: ZeroQuantOptions

    def __init__(self, recipe: Recipe, options: Options) -> None:
        super().__init__(recipe, options)
        self._floats: dict[str, torch.Tensor] = {}
        self._remarks: dict[str, str] = {}
        self._migration: Migration | None = None

    def plan(self, anatomy: Anatomy, model: Any) -> Plan:
        """A rule's overrides are applied here; a spec that cannot be executed is refused with the module's name."""
        if self.options.tuning and self.options.smoothing is None:
            raise InputError("methods.zeroquant.tuning: it tunes the smoothing, which is null")
        self._anatomy = anatomy
        if self.options.smoothing is not None and not any(self._feeds(unit) for unit in anatomy.blocks):
            raise InputError(
                f"methods.zeroquant.smoothing: {anatomy.architecture} has nothing from which ranges can migrate; "
                "set it to null"
            )
        whole = {part.path: (unit, part) for unit, part in anatomy.parts()}  # parts of a fused matrix share a module
        attention = plan_attention(anatomy, model) if self.options.attention == "int8" else {}
        tables = [path for path, (unit, _) in whole.items() if unit.kind == "embeddings"]
        bare = [*attention, *self.other_paths]
        self.recipe.check_rules([*whole, *bare], {"weights": bare, "activations": [*tables, *bare]})
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
        modules |= self._head(anatomy, model)
        kept |= float_rest(anatomy, model, modules)
        self.arithmetic = _arithmetic(modules)
        return Plan(modules, kept, changes)

    def _head(self, anatomy: Anatomy, model: Any) -> dict[str, dict[str, Any]]:
        """The output layer over the vocabulary, where an option asks for it."""
        weights, activations = self.options.head, self.options.head_activations
        if weights == "float":
            if activations != "float":
                raise InputError("methods.zeroquant.head_activations: the head itself is float; set head too")
            return {}
        path = vocabulary_head(anatomy, model)
        module = model.get_submodule(path)
        shape = tuple(module.weight.shape)
        check_linear(weights, activations, shape, path)
        if activations != "float" and not activations.dynamic:
            raise InputError(f"{path}: the input of a head is not calibrated; use int8:token:sym or float")
        words = {"weights": str(weights), "activations": str(activations), "bias": module.bias is not None}
        return {path: {"type": "linear", "shape": list(shape), **words}}

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
        static = {path: "minmax" for path in paths if path in plan.modules and _is_static(plan.modules[path])}
        static |= value_sites(unit, plan)
        if self.options.smoothing is None:
            return static
        return {**static, **migration.observers(self._feeds(unit), tuned=self.options.tuning > 0)}

    def _feeds(self, unit: Unit) -> tuple[Feed, ...]:
        """Where ranges migrate: not from values that have static scales."""
        quantized = self.options.attention == "int8"
        return tuple(
            feed
            for feed in unit.feeds
            if not (quantized and isinstance(feed.source, Part) and feed.source.name == "attention.value")
        )

    def source(self, plan: Plan, statistics: Statistics | None, weights: Reader) -> Reader:
        """The float model with ranges migrated."""
        if self.options.smoothing is None:
            return weights
        assert statistics is not None  # there are observers
        self._migration = Migration(
            [(unit, self._feeds(unit)) for unit in self._anatomy.blocks],
            plan.modules,
            statistics,
            weights,
            alpha=self.options.smoothing,
            tuning=self.options.tuning,
        )
        return self._migration

    @property
    def learns(self) -> bool:
        """Where rounding looks at data, or distillation follows it."""
        return self._rounds_with_data or self.options.lkd.enabled

    @property
    def independent(self) -> bool:
        """Where a block learns from what the float model computes alone: not with rounding that corrects what the
        blocks before it left, nor with LKD on the student's inputs."""
        return not self._rounds_with_data and not (self.options.lkd.enabled and self.options.lkd.inputs == "student")

    @property
    def differentiates(self) -> bool:
        """Where a block learns, or its tokens count by their gradients."""
        return self.options.lkd.enabled or self._weighs_tokens

    @property
    def _rounds_with_data(self) -> bool:
        return self.recipe.weights.rounding in DATA_ROUNDINGS

    @property
    def _weighs_tokens(self) -> bool:
        return self._rounds_with_data and self.options.token_weights == "sensitivity"

    def floats(self, unit: Unit) -> Mapping[str, torch.Tensor]:
        """What distillation changed beside the linears; it is asked for once."""
        return {name: self._floats.pop(name) for name in list(self._floats) if unit.owns(name)}

    def remark(self, unit: Unit) -> str:
        """The loss of a block before and after its distillation."""
        return self._remarks.get(unit.name, "")

    def passes(self, batches: int) -> float:
        """Models that go on (both, or the float one), half a block of both for a stage's inputs, and three blocks each
        for gradients and steps of LKD.
        """
        if not self.learns:
            return 0.0
        lkd, models = self.options.lkd, 1.0 if self.independent else 2.0
        taught = lkd.steps * (3 + 2 / CHECK_STEPS) / batches if lkd.enabled else 0.0
        careful = (_STAGES if self._rounds_with_data else 0) + (3 if self._weighs_tokens else 0)
        return models + careful + taught

    def in_hand(self, module: Any, description: Mapping[str, Any]) -> int:
        """Codes in rows, padded, in tiles; a matrix the other way round; what rounding with care takes whole."""
        if description["type"] == "embedding":
            return 0
        elements = int(module.weight.numel())
        copies = _TILED + (_TURNED if matrix_kind(module) == "conv1d" else 0)
        whole = self.recipe.weights.rounding == "mse" and QuantSpec.parse(description["weights"]).block[0] is None
        if not self._rounds_with_data:
            return elements * (copies + (_WIDE if whole else 0))
        inputs = elements // int(description["shape"][0])
        squares = _SQUARES + (_MORE_SQUARES if self._weighs_tokens else 0)
        return elements * (copies + _WIDE) + squares * 8 * inputs * inputs

    def memory(self, unit: Unit, plan: Plan) -> int:
        """What distillation keeps: float weights, places and scales with their gradients and optimizer state, twice."""
        if not self.options.lkd.enabled or unit.kind != "block":
            return 0
        shapes = (plan.modules[path]["shape"] for path in _owned(unit, plan, "linear"))
        return _LEARNING * sum(int(rows) * int(columns) for rows, columns in shapes)

    def lower(
        self, unit: Unit, plan: Plan, weights: Reader, statistics: Statistics | None, lesson: Lesson | None = None
    ) -> dict[str, QModule]:
        """Round each matrix of the unit and fill a module with codes and scales."""
        paths = _owned(unit, plan, "linear", "embedding")  # a tied layer has only a float bias
        lowered: dict[str, QModule] = {}
        careful = lesson if self._rounds_with_data else None
        counts = careful.sensitivities(paths) if careful and self._weighs_tokens else {}
        for stage in lesson.stages(paths) if lesson else [[path] for path in paths]:
            moments = careful.moments(stage, lowered, counts) if careful else {}
            lowered |= {path: self._lower(unit, path, plan, weights, statistics, moments.get(path)) for path in stage}
        if lesson and self.options.lkd.enabled:
            lowered |= self._distill(unit, lesson, lowered, weights)
        attention = {path: _attention(unit, path, plan, statistics) for path in _owned(unit, plan, *ATTENTION)}
        return {path: lowered[path] for path in paths} | attention

    def _distill(
        self, unit: Unit, lesson: Lesson, lowered: Mapping[str, QModule], weights: Reader
    ) -> Mapping[str, QModule]:
        """The block's linears after LKD; none where it would have got worse."""
        linears = {path: module for path, module in lowered.items() if isinstance(module, QLinear)}
        if not linears:
            return {}
        matrices = {path: self._matrix(unit, path, weights) for path in linears}
        outcome = distill(lesson, linears, matrices, self.options.lkd.schedule())
        self._floats |= outcome.floats
        for path, module in outcome.linears.items():
            self._report[path]["weight_sqnr_db"] = weight_sqnr_db(matrices[path], module.matrix())
        self._report[unit.modules[0]] = {"lkd_before": outcome.before, "lkd_after": outcome.after}
        kept = "" if outcome.linears else ": no better, so the block stays as it was"
        self._remarks[unit.name] = (
            f"{unit.name}: LKD loss {outcome.before:.4g} → {outcome.after:.4g} in {outcome.steps} steps{kept}"
        )
        return outcome.linears

    @staticmethod
    def _matrix(unit: Unit, path: str, weights: Reader) -> torch.Tensor:
        """The float weight of a module, `[out, in]`."""
        weight = stored(weights, f"{path}.weight")
        return weight.t().contiguous() if any(part.transposed for part in unit.parts if part.path == path) else weight

    def _lower(
        self,
        unit: Unit,
        path: str,
        plan: Plan,
        weights: Reader,
        statistics: Statistics | None,
        moments: Moments | None,
    ) -> QModule:
        """One module, rounded with what is known of its inputs, if anything is."""
        description = plan.modules[path]
        module = MODULES[description["type"]].from_description(torch.nn.Module(), path, description, device="meta")
        weight = self._matrix(unit, path, weights)
        tensor = self._round(weight, QuantSpec.parse(description["weights"]), moments, isinstance(module, QLinear))
        assert isinstance(module, QLinear | QEmbedding)
        module.fill(tensor)
        if isinstance(module, QLinear):
            if module.bias is not None:
                module.bias = weights(f"{path}.bias")
            if statistics is not None and _is_static(description):
                module.act_scale = self._static_scale(statistics, path)
        self._report[path] = {"weight_sqnr_db": weight_sqnr_db(weight, tensor)}
        return module

    def _static_scale(self, statistics: Statistics, path: str) -> torch.Tensor:
        """max|x| / 127 over the calibration data, `[1]`; 1 where the input was always zero."""
        moved = self._migration.largest(path) if self._migration else None
        state = statistics.state(path, "minmax")
        largest = torch.maximum(state["max"], -state["min"]).clamp_min(0) if moved is None else moved.float()
        largest = largest.reshape(1)
        return torch.where(largest > 0, largest / QMAX, torch.ones_like(largest))

    def _round(self, weight: torch.Tensor, spec: QuantSpec, moments: Moments | None, tiled: bool) -> QTensor:
        """A data-driven rounding falls back to least squares where no data are: tables, experts that nobody asked."""
        layout: Literal["rows", "tiled"] = "tiled" if tiled else "rows"
        name = self.recipe.weights.rounding
        if name not in DATA_ROUNDINGS:
            rule = self.recipe.weights.scale_rule
            return ROUNDINGS[name](weight, spec, layout=layout, **({} if rule == "absmax" else {"scale_rule": rule}))
        if moments is None:
            return ROUNDINGS["mse"](weight, spec, layout=layout)
        return DATA_ROUNDINGS[name](weight, spec, moments, layout=layout)


def _owned(unit: Unit, plan: Plan, *kinds: str) -> list[str]:
    """Paths of a unit's modules of some types."""
    return [path for path, one in plan.modules.items() if unit.owns(path) and one["type"] in kinds]


def _attention(unit: Unit, path: str, plan: Plan, statistics: Statistics | None) -> QAttention:
    """The products of a block's attention."""
    assert statistics is not None  # `observers` asked for them
    description = plan.modules[path]
    module = MODULES[description["type"]].from_description(torch.nn.Module(), path, description, device="meta")
    assert isinstance(module, QAttention)
    module.value_scale = value_scale(unit, module.groups, statistics)
    return module


def _arithmetic(modules: Mapping[str, Any]) -> str:
    """Which products the linears of a plan are."""
    floats = {module["activations"] == "float" for module in modules.values() if module["type"] == "linear"}
    return " and ".join(_PRODUCTS[kind] for kind in sorted(floats)) or "none: tables only"


def _is_static(description: Any) -> bool:
    if description["type"] != "linear" or description["activations"] == "float":
        return False
    return not QuantSpec.parse(description["activations"]).dynamic
