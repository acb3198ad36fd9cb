"""Several methods as one: what each does is there, and clashes are refused by both names."""

from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch

from qtool.errors import InputError
from qtool.methods.base import Method, Options, Plan
from qtool.methods.combined import Combined
from qtool.recipe import Recipe


class Plain(Method):
    """Says what it is told to say."""

    phase: ClassVar[Literal["shape", "lower", "attach"]] = "attach"
    watches: ClassVar[dict[str, str]] = {}
    planned = Plan({})
    marks = ""

    def reshape(self, model: Any, checkpoint: Any) -> None:
        model.append(self.name)

    def plan(self, anatomy: Any, model: Any) -> Plan:
        return self.planned

    def observers(self, unit: Any, plan: Plan) -> dict[str, str]:
        return self.watches

    def source(self, plan: Plan, statistics: Any, weights: Any) -> Any:
        return lambda name: [*weights(name), self.name]

    def lower(self, unit: Any, plan: Plan, weights: Any, statistics: Any, lesson: Any = None) -> dict[str, Any]:
        self._report[self.name] = {"lesson": float(lesson is not None)}
        return {self.name: weights("x")}

    def remark(self, unit: Any) -> str:
        return self.marks

    def floats(self, unit: Any) -> dict[str, torch.Tensor]:
        return {self.name: torch.ones(1)}

    def in_hand(self, module: Any, description: Any) -> int:
        return 7 if self.phase == "lower" else 1000

    def memory(self, unit: Any, plan: Plan) -> int:
        return 5

    def passes(self, batches: int) -> float:
        return 2.0


class First(Plain):
    name = "first"
    phase = "lower"
    watches: ClassVar[dict[str, str]] = {"a": "minmax"}
    planned = Plan({"a": {"type": "linear"}}, {"b": "first keeps it", "c": "vector"}, {"tie": False})
    marks = "done"

    @property
    def learns(self) -> bool:
        return True


class Second(Plain):
    name = "second"
    planned = Plan({"b": {"type": "other"}}, {"a": "second keeps it", "c": "no weights"})


def together() -> Combined:
    return Combined([First(Recipe(), Options()), Second(Recipe(), Options())])


def test_plans_are_one_plan() -> None:
    """What one replaces the other may keep; of two reasons the first counts."""
    plan = together().plan(None, None)  # type: ignore[arg-type]
    assert plan.modules == {"a": {"type": "linear"}, "b": {"type": "other"}}
    assert plan.kept_float == {"c": "vector"} and plan.config == {"tie": False}


def test_hooks_are_called_one_after_the_other() -> None:
    both: Any = together()
    model: list[str] = []
    both.reshape(model, None)
    assert model == ["first", "second"]
    assert both.source(None, None, lambda name: [name])("x") == ["x", "first", "second"]
    assert both.lower(None, None, lambda name: name, None, "lesson") == {"first": "x", "second": "x"}
    assert both.report() == {"first": {"lesson": 1.0}, "second": {"lesson": 0.0}}
    assert both.remark(None) == "done" and set(both.floats(None)) == {"first", "second"}
    assert both.learns and not both.follows and not both.differentiates
    assert (both.in_hand(None, None), both.memory(None, None), both.passes(3)) == (7, 10, 4.0)
    assert both.observers(None, None) == {"a": "minmax"}


def test_clashes_are_refused_by_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    both: Any = together()
    monkeypatch.setattr(Second, "watches", {"a": "channels"})
    with pytest.raises(InputError, match="first and second cannot both observe a"):
        both.observers(None, None)
    monkeypatch.setattr(Second, "planned", replace(Second.planned, modules={"a": {"type": "other"}}))
    with pytest.raises(InputError, match="first and second both replace a"):
        both.plan(None, None)
    monkeypatch.setattr(Second, "planned", Plan({}, {}, {"tie": True}))
    with pytest.raises(InputError, match="first and second both set tie"):
        both.plan(None, None)
