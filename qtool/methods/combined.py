"""The methods of a recipe as one: each plans, observes and lowers its share, in the order of their phases."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from qtool.anatomy import Anatomy, Unit
from qtool.calibrate.statistics import Statistics
from qtool.checkpoint import Checkpoint
from qtool.errors import InputError
from qtool.lesson import Lesson
from qtool.methods.base import Method, Options, Plan
from qtool.nn import QModule
from qtool.numerics.grid import Grid
from qtool.stream import Reader


class Combined(Method):
    """Several methods, of which at most one lowers; see `Method` for what each hook is.

    Learning and correcting are for the one that lowers. The others replace modules that it leaves alone.
    """

    name = "combined"
    phase = "lower"

    def __init__(self, methods: Sequence[Method]) -> None:
        super().__init__(methods[0].recipe, Options())
        self.methods = tuple(methods)
        self._lowering = [method for method in methods if method.phase == "lower"]

    def reshape(self, model: Any, checkpoint: Checkpoint) -> None:
        """One after the other."""
        for method in self.methods:
            method.reshape(model, checkpoint)

    def plan(self, anatomy: Anatomy, model: Any) -> Plan:
        """All plans together; what one replaces, another may keep in float.

        Raises InputError where two replace the same module.
        """
        for method in self.methods:
            others = (other for other in self.methods if other is not method)
            method.other_paths = [path for other in others for path in other.rule_paths(model)]
        plans = {method.name: method.plan(anatomy, model) for method in self.methods}
        modules = _united({name: plan.modules for name, plan in plans.items()}, "both replace {}")
        config = _united({name: plan.config for name, plan in plans.items()}, "both set {}")
        heads = _united({name: plan.heads for name, plan in plans.items()}, "both cut heads of layer {}")
        kept = {path: reason for plan in reversed(plans.values()) for path, reason in plan.kept_float.items()}
        outside = {path: reason for path, reason in kept.items() if not _inside(path, modules)}
        plan = Plan(modules, outside, config, heads)
        for method in self.methods:
            plan = method.amend(plan)
        computing = [method for method in self.methods if method.phase != "shape"] or self.methods
        self.arithmetic = "; ".join(dict.fromkeys(method.arithmetic for method in computing if method.arithmetic))
        return plan

    def observers(self, unit: Unit, plan: Plan) -> dict[str, str]:
        """Raises InputError where two want to observe one site in different ways."""
        wanted = {method.name: method.observers(unit, plan) for method in self.methods}
        return _united(wanted, "cannot both observe {}")

    def resolve(self, plan: Plan, statistics: Statistics | None) -> None:
        """One after the other."""
        for method in self.methods:
            method.resolve(plan, statistics)

    def source(self, plan: Plan, statistics: Statistics | None, weights: Reader) -> Reader:
        """Each reads what the one before leaves."""
        for method in self.methods:
            weights = method.source(plan, statistics, weights)
        return weights

    @property
    def follows(self) -> bool:
        """Whether one does."""
        return any(method.follows for method in self.methods)

    def grids(self) -> Mapping[str, Grid]:
        """Of all."""
        return {path: grid for method in self.methods for path, grid in method.grids().items()}

    def stages(self, unit: Unit) -> Sequence[Sequence[str]]:
        """Of all, one after the other."""
        return [stage for method in self.methods for stage in method.stages(unit)]

    def correct(self, module: Any, path: str, error: torch.Tensor) -> None:
        """By the method whose stage it is."""
        for method in self.methods:
            if path in method.grids():
                method.correct(module, path, error)

    @property
    def learns(self) -> bool:
        """Whether one does."""
        return any(method.learns for method in self.methods)

    @property
    def independent(self) -> bool:
        """Whether all are."""
        return all(method.independent for method in self.methods)

    @property
    def differentiates(self) -> bool:
        """Whether one does."""
        return any(method.differentiates for method in self.methods)

    def lower(
        self, unit: Unit, plan: Plan, weights: Reader, statistics: Statistics | None, lesson: Lesson | None = None
    ) -> dict[str, QModule]:
        """The modules of all; a lesson is for those that learn."""
        lowered: dict[str, QModule] = {}
        for method in self.methods:
            lowered |= method.lower(unit, plan, weights, statistics, lesson if method.learns else None)
        for method in self.methods:
            method.attach(unit, plan, lowered, statistics)
        return lowered

    def floats(self, unit: Unit) -> Mapping[str, torch.Tensor]:
        """Of all."""
        return {name: value for method in self.methods for name, value in method.floats(unit).items()}

    def remark(self, unit: Unit) -> str:
        """What each has to say."""
        return "; ".join(filter(None, (method.remark(unit) for method in self.methods)))

    def passes(self, batches: int) -> float:
        """Of all."""
        return sum(method.passes(batches) for method in self.methods)

    def in_hand(self, module: Any, description: Mapping[str, Any]) -> int:
        """Of the method that lowers: others round no matrix."""
        return max((method.in_hand(module, description) for method in self._lowering), default=0)

    def memory(self, unit: Unit, plan: Plan) -> int:
        """Of all."""
        return sum(method.memory(unit, plan) for method in self.methods)

    def report(self) -> dict[str, dict[str, float]]:
        """Of all; of a module that several measured, together."""
        found: dict[str, dict[str, float]] = {}
        for method in self.methods:
            for path, figures in method.report().items():
                found.setdefault(path, {}).update(figures)
        return found


def _united(shares: Mapping[str, Mapping[Any, Any]], clash: str) -> dict[Any, Any]:
    """Mappings by method as one. Raises InputError where two have different values for a key."""
    united: dict[Any, Any] = {}
    owner: dict[Any, str] = {}
    for name, share in shares.items():
        for key in _different(united, share):
            raise InputError(f"{owner[key]} and {name} {clash.format(key)}; choose one of them")
        owner |= dict.fromkeys(share, name)
        united |= share
    return united


def _different(known: Mapping[Any, Any], share: Mapping[Any, Any]) -> Iterable[Any]:
    return (key for key, value in share.items() if key in known and known[key] != value)


def _inside(path: str, modules: Collection[str]) -> bool:
    """Whether a path is one of `modules` or lies in one."""
    names = path.split(".")
    return any(".".join(names[:end]) in modules for end in range(1, len(names) + 1))
