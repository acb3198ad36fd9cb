"""What a method is: a class that says what it does to each unit of a model, and does it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict

from qtool.anatomy import Anatomy, Unit
from qtool.calibrate.statistics import Statistics
from qtool.checkpoint import Checkpoint
from qtool.lesson import Lesson
from qtool.nn import QModule
from qtool.numerics import QTensor
from qtool.numerics.grid import Grid
from qtool.pruning import Gone
from qtool.recipe import Recipe
from qtool.stream import Reader

_IN_HAND = 16  # bytes of a weight
_AT_ONCE = 1 << 20  # weights that are compared in float64 at a time

PHASES = ("shape", "lower", "attach")
"""Methods run in this order; at most one of a recipe's methods lowers."""


@dataclass(frozen=True)
class Plan:
    """What happens to a model: quantized modules by path, and what stays float with the reason."""

    modules: Mapping[str, Mapping[str, Any]]
    kept_float: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    """Entries of config.json that the method changes."""
    heads: Gone = field(default_factory=dict)
    """Attention heads that the float model has and the artifact has not."""


class Options(BaseModel):
    """Base of a method's own options; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Method(ABC):
    """Lifecycle of a method. The mathematics lives in `rounding`, `numerics` and `kernels`.

    `plan` decides, from shapes alone; `observers` says what to watch in the float model (nothing: no pass over data);
    `lower` turns one unit's float weights into
    modules of `qtool.nn`, filled. A method of another package also says in a line what it does (`summary`) and how the
    result computes (`execution`), and may name a default `preset`: one of qtool's, or recipe keys.
    """

    name: ClassVar[str]
    phase: ClassVar[Literal["shape", "lower", "attach"]]
    options_class: ClassVar[type[Options]] = Options
    summary: ClassVar[str]
    execution: ClassVar[str]
    preset: ClassVar[str | Mapping[str, Any] | None] = None
    arithmetic: str = "int8 x int8 -> int32"
    """Which integer arithmetic its models execute, as their reports say it."""

    other_paths: Sequence[str] = ()
    """Paths that rules may name for the sake of the recipe's other methods: their `rule_paths`."""

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe, self.options = recipe, options
        self._report: dict[str, dict[str, float]] = {}

    def reshape(self, model: Any, checkpoint: Checkpoint) -> None:  # noqa: B027 (most leave shapes alone)
        """Change the float skeleton, and what `checkpoint` reads for it, in place, before anything else looks at them.

        For methods of phase `shape`: all that follows, calibration too, sees a model of that shape.
        """

    def settled(self) -> Mapping[str, Any]:
        """Options as an artifact records them, where they only point to what they mean (to a file). Nothing: as they
        are."""
        return {}

    def rule_paths(self, model: Any) -> Sequence[str]:
        """Paths that are no modules of the skeleton, which rules may name where this method is one of several."""
        return ()

    @abstractmethod
    def plan(self, anatomy: Anatomy, model: Any) -> Plan:
        """From the anatomy and the skeleton. Raises InputError naming the module for a spec that does not fit."""

    def amend(self, plan: Plan) -> Plan:
        """The plan of several methods together, with what this one adds to modules of the others."""
        return plan

    def observers(self, unit: Unit, plan: Plan) -> dict[str, str]:
        """Module path → name of the observer that watches its input."""
        return {}

    def resolve(self, plan: Plan, statistics: Statistics | None) -> None:  # noqa: B027 (most have nothing to freeze)
        """Freeze what crosses the borders of units, before the first is lowered."""

    def source(self, plan: Plan, statistics: Statistics | None, weights: Reader) -> Reader:
        """The float model that is lowered: `weights`, or tensors that compute the same and round better."""
        return weights

    @property
    def follows(self) -> bool:
        """Whether calibration data flows through the float and the lowered units in pass 2, to measure and correct."""
        return False

    def grids(self) -> Mapping[str, Grid]:
        """What the outputs of lowered modules stand for, by path, where a method `follows`."""
        return {}

    def stages(self, unit: Unit) -> Sequence[Sequence[str]]:
        """Paths whose mean output error is to be corrected, in an order in which what runs earlier comes first."""
        return ()

    def correct(self, module: Any, path: str, error: torch.Tensor) -> None:  # noqa: B027 (most correct nothing)
        """Take the mean output error, float64 `[channels]`, out of a module in place."""

    @property
    def learns(self) -> bool:
        """Whether `lower` learns from calibration data: then it is given a lesson for each block."""
        return False

    @property
    def independent(self) -> bool:
        """Whether lowering a block depends on nothing that the lowered blocks before it compute.

        Then ranks share the blocks, and a lesson has what the float model computes in the place of both.
        """
        return not (self.follows or self.learns)

    @property
    def differentiates(self) -> bool:
        """Whether gradients flow through a block in `lower`, for which all that is computed in it is kept."""
        return False

    @abstractmethod
    def lower(
        self, unit: Unit, plan: Plan, weights: Reader, statistics: Statistics | None, lesson: Lesson | None = None
    ) -> dict[str, QModule]:
        """Filled modules by path. `weights(name)` reads a float tensor of the source."""

    def attach(  # noqa: B027 (most add nothing)
        self, unit: Unit, plan: Plan, lowered: Mapping[str, QModule], statistics: Statistics | None
    ) -> None:
        """Fill in place what `amend` added to the modules of a unit that the others have just lowered."""

    def floats(self, unit: Unit) -> Mapping[str, torch.Tensor]:
        """Float tensors of a unit that was just lowered which differ from the source's, by name."""
        return {}

    def remark(self, unit: Unit) -> str:
        """What users should know of a unit that was just lowered."""
        return ""

    def passes(self, batches: int) -> float:
        """How often all of `batches` flow through a block while a method that `learns` lowers it; for estimates."""
        return 0.0

    def in_hand(self, module: Any, description: Mapping[str, Any]) -> int:
        """Bytes that the matrix of a float `module` takes while it becomes the one of a description, beside the codes.

        Here: float32, codes again, and what these stand for.
        """
        return _IN_HAND * int(module.weight.numel())

    def memory(self, unit: Unit, plan: Plan) -> int:
        """Bytes that are kept for a unit while it is lowered, beside its codes and the matrix in hand."""
        return 0

    def report(self) -> dict[str, dict[str, float]]:
        """Figures by module path, of the units that were lowered in this process."""
        return self._report


def weight_sqnr_db(weight: torch.Tensor, tensor: QTensor) -> float:
    """Signal to quantization noise of `tensor` for float `weight` `[rows, columns]`, in dB; 999 for an exact matrix."""
    noise = signal = 0.0
    first = 0
    # In stretches of rows: float64 copies of a whole vocabulary table would take more memory than all else.
    for stretch in tensor.stretches(_AT_ONCE // max(1, weight.shape[1])):
        exact = weight[first : first + stretch.shape[0]].double()
        noise += (exact - stretch.dequantize().double()).square().sum().item()
        signal += exact.square().sum().item()
        first += stretch.shape[0]
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """10·log10(signal / noise) to two places; 999 without noise, -999 for noise alone."""
    if noise > 0 and signal > 0:
        return round(10 * math.log10(signal / noise), 2)
    return -999.0 if noise > 0 else 999.0
