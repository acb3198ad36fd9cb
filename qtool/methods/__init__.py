"""The table of methods. Descriptions are plain text, so that `qtool methods` needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from qtool.errors import InputError, UsageError, one_of

if TYPE_CHECKING:
    from qtool.methods.base import Method
    from qtool.recipe import Recipe


@dataclass(frozen=True)
class Entry:
    """Where a method is, in one line what it does, and the preset that is its default."""

    target: str
    summary: str
    preset: str
    execution: str


METHODS: dict[str, Entry] = {
    "zeroquant": Entry(
        "qtool.methods.zeroquant:ZeroQuant",
        "INT8 weights per channel, token-wise dynamic INT8 activations (W8A8); float LayerNorm, softmax and GELU",
        "zeroquant-w8a8",
        "real: int8 × int8 → int32 products",
    ),
}
"""Methods by the name that recipes and `--method` use."""


def entry(name: str) -> Entry:
    """Raises UsageError with the nearest names for an unknown method."""
    if name not in METHODS:
        raise UsageError(one_of(name, list(METHODS), "method"))
    return METHODS[name]


def method_class(name: str) -> "type[Method]":
    """The class behind a name."""
    module, _, attribute = entry(name).target.partition(":")
    cls: type[Method] = getattr(import_module(module), attribute)
    return cls


def build(recipe: "Recipe") -> "Sequence[Method]":
    """The recipe's methods in the order of their phases. Raises InputError for a combination that makes no sense."""
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
    lowering = [method.name for method in methods if method.phase == "lower"]
    if len(lowering) != 1:
        raise InputError(f"exactly one method must lower the model, not {' and '.join(lowering) or 'none'}")
    return sorted(methods, key=lambda method: PHASES.index(method.phase))
