"""The table of methods. Descriptions are plain text, so that `qtool methods` needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qtool import plugins
from qtool.errors import InputError, UsageError, one_of

if TYPE_CHECKING:
    from qtool.methods.base import Method
    from qtool.recipe import Recipe


@dataclass(frozen=True)
class Entry:
    """Where a method is, in one line what it does, and its default preset: a preset's name, or the keys themselves."""

    target: "str | type[Method]"
    summary: str
    preset: str | Mapping[str, Any] | None
    execution: str
    origin: str = "qtool"

    @property
    def preset_name(self) -> str:
        """For tables."""
        return self.preset if isinstance(self.preset, str) else "its own" if self.preset else "none"


METHODS: dict[str, Entry] = {
    "ibert": Entry(
        "qtool.methods.ibert:IBert",
        "the whole encoder in integer arithmetic, from token ids to logits, without retraining",
        "ibert",
        "real: integers only, the same logits everywhere",
    ),
    "zeroquant": Entry(
        "qtool.methods.zeroquant:ZeroQuant",
        "INT8 or INT4 weights, token-wise dynamic INT8 activations; float LayerNorm, softmax and GELU",
        "zeroquant-w8a8",
        "real: int8 × int8 → int32 products",
    ),
    "headprune": Entry(
        "qtool.methods.headprune:HeadPrune",
        "attention heads removed from the weights, alone or before another method",
        None,
        "real: smaller matrices",
    ),
    "logattn": Entry(
        "qtool.methods.logattn:LogAttn",
        "attention probabilities pruned and kept as codes of 2 to 8 bits; alone, with ibert or with zeroquant",
        "logattn",
        "real in integer attention (ibert); else codes with float products, not faster",
    ),
}
"""The built-in methods by the name that recipes and `--method` use."""


@cache
def plugged() -> plugins.Found:
    """The methods of other packages. Importing them is left until somebody asks for what is not built in."""
    return plugins.found("qtool.methods", _check, METHODS)


def known() -> dict[str, Entry]:
    """All methods that can be used: built-in ones and those of plug-ins."""
    declared = {
        name: Entry(p.value, p.value.summary, p.value.preset, p.value.execution, p.origin)
        for name, p in plugged().good.items()
    }
    return {**METHODS, **declared}


def _check(value: Any) -> None:
    """Raises TypeError or ValueError for what is no method, before a recipe meets it."""
    from qtool.methods.base import PHASES, Method, Options
    from qtool.recipe import build as build_recipe

    if not (isinstance(value, type) and issubclass(value, Method)):
        raise TypeError(f"{value!r} is not a subclass of qtool.methods.base.Method")
    for name in ("name", "phase", "summary", "execution"):
        if not isinstance(getattr(value, name, None), str):
            raise TypeError(f"{value.__name__}.{name} is not a text")
    if missing := sorted(value.__abstractmethods__):
        raise TypeError(f"{value.__name__} does not define {', '.join(missing)}")
    if value.phase not in PHASES or not issubclass(value.options_class, Options):
        raise ValueError(f"{value.__name__}: phase is one of {', '.join(PHASES)}, options_class a subclass of Options")
    build_recipe([("preset", preset_keys(value.preset))])


def preset_keys(preset: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The recipe keys of a method's default preset."""
    from qtool.recipe import preset as read_preset

    return read_preset(preset) if isinstance(preset, str) else preset or {}


def entry(name: str) -> Entry:
    """Raises UsageError with the nearest names for an unknown method, UnavailableError for a broken plug-in."""
    if name in METHODS:
        return METHODS[name]
    plugged().refuse_broken(name, "method")
    if name not in known():
        raise UsageError(one_of(name, list(known()), "method"))
    return known()[name]


def method_class(name: str) -> "type[Method]":
    """The class behind a name."""
    target = entry(name).target
    if isinstance(target, type):
        return target
    module, _, attribute = target.partition(":")
    cls: type[Method] = getattr(import_module(module), attribute)
    return cls


def build(recipe: "Recipe") -> "Sequence[Method]":
    """The recipe's methods in the order of their phases. Raises InputError for a combination that makes no sense.

    At most one may lower, and none may be there twice.
    """
    from pydantic import ValidationError

    from qtool.methods.base import PHASES
    from qtool.recipe import first_problem

    methods = []
    for wanted in recipe.methods:
        cls = method_class(wanted.name)
        try:
            methods.append(cls(recipe, cls.options_class(**wanted.options)))
        except ValidationError as error:
            raise InputError(f"methods.{wanted.name}.{first_problem(error, cls.options_class)}") from error
    names = [method.name for method in methods]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"method {twice} is there twice; give it all of its options in one place")
    lowering = [method.name for method in methods if method.phase == "lower"]
    if len(lowering) > 1:
        raise InputError(f"only one method can lower the model, not {' and '.join(lowering)}")
    return sorted(methods, key=lambda method: PHASES.index(method.phase))
