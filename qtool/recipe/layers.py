"""From layers (preset, file, `--set`, flags) to one checked recipe."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from qtool.errors import InputError, QtoolError, UsageError, one_of
from qtool.numerics.spec import WORDS
from qtool.recipe.sections import (
    FLOAT,
    Activations,
    Calibration,
    Evaluate,
    GateSection,
    Model,
    Recipe,
    Rule,
    SpecSection,
    Weights,
    merge_specs,
)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on `base`, key by key and one mapping into another; specs are merged by their words."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if key == "methods":
            value = _merge_methods(old, value)
        elif key in ("weights", "activations") and old is not None and isinstance(value, str | Mapping):
            try:
                value = merge_specs(old, value)
            except QtoolError as error:
                near = key == "activations" and isinstance(value, str) and get_close_matches(value, [FLOAT])
                raise InputError(f"{key}: {error}{'; did you mean float?' if near else ''}") from error
        elif isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(old, value)
        merged[key] = value
    return merged


def method_list(methods: Any) -> list[dict[str, Any]]:
    """`methods` of a recipe as mappings with a `name`, from names, such mappings, or one mapping `{name: options}`.

    Raises InputError for anything else.
    """
    if isinstance(methods, Mapping):
        return [{"name": name, **_method_options(name, options)} for name, options in methods.items()]
    listed = [methods] if isinstance(methods, str) else methods or []
    named = [{"name": item} if isinstance(item, str) else item for item in listed] if isinstance(listed, list) else [{}]
    if not all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in named):
        raise InputError(f"methods is a list of names or of mappings with a name, not {methods!r}")
    return named


def _method_options(name: str, options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping | None):
        raise InputError(f"methods.{name}: options are key=value, such as methods.{name}.option=1, not {options!r}")
    return dict(options or {})


def _merge_methods(old: Any, new: Any) -> list[dict[str, Any]]:
    """`methods` as a list replaces; as a mapping `{name: options}` (from `--set`) it adds options to those present."""
    if old is None or not isinstance(new, Mapping):
        return method_list(new)
    known = {item["name"]: dict(item) for item in method_list(old)}
    for item in method_list(new):
        if item["name"] not in known:
            raise InputError(f"methods.{item['name']}: {one_of(item['name'], list(known), 'method')}")
        known[item["name"]] = merge(known[item["name"]], item)
    return list(known.values())


def assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """`--set a.b=value` pairs as a nested mapping; values are YAML. Raises UsageError."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not all(key.split(".")):
            raise UsageError(f"--set wants key=value, such as weights.group_size=64, not '{pair}'")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {pair}: the value is not YAML: {getattr(error, 'problem', None)}") from error
        _assign(result, key.split("."), value, pair)
    return result


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys, `{"a.b": 1}`, as nested mappings, `{"a": {"b": 1}}`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        _assign(result, key.split("."), value, key)
    return result


def _assign(tree: dict[str, Any], keys: list[str], value: Any, pair: str) -> None:
    for name in keys[:-1]:
        below = tree.setdefault(name, {})
        if isinstance(below, str) and name in ("weights", "activations"):
            below = tree[name] = {"spec": below}
        elif below is True:  # what is on gets settings
            below = tree[name] = {}
        if not isinstance(below, dict):
            raise UsageError(f"--set {pair}: an earlier --set gives {name} a value that has no keys")
        tree = below
    tree[keys[-1]] = value


def build(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> Recipe:
    """A recipe from layers `(where it came from, values)`, weakest first. Raises InputError with where and what."""
    merged: dict[str, Any] = {"weights": str(Weights().spec), "activations": str(Activations().spec)}
    for where, values in layers:
        check_keys(values, where)
        try:
            merged = merge(merged, values)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    try:
        return Recipe.model_validate(merged)
    except ValidationError as error:
        raise InputError(f"recipe: {first_problem(error, Recipe)}") from error


_SECTIONS: dict[str, type[BaseModel]] = {
    "model": Model, "calibration": Calibration, "weights": Weights, "activations": Activations,
    "evaluate": Evaluate, "gate": GateSection,
}  # fmt: skip


def check_keys(values: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a key that no section has, and for any wish to run remote code."""
    _refuse_remote_code(values, where)
    _known(values, list(Recipe.model_fields), where)
    for name, cls in _SECTIONS.items():
        words = WORDS if issubclass(cls, SpecSection) else ()
        section = values.get(name)
        if not isinstance(section, Mapping | None) and not (words and isinstance(section, str)):
            raise InputError(
                f"{where}: {name} is a section with the keys {', '.join(cls.model_fields)}, not {section!r}"
            )
        _known(values.get(name), [*cls.model_fields, *words], f"{where}: {name}")
    rules = values.get("rules")
    for glob, rule in rules.items() if isinstance(rules, Mapping) else ():
        _known(rule, list(Rule.model_fields), f"{where}: rules.{glob}")


def _known(section: Any, names: list[str], where: str) -> None:
    for key in section if isinstance(section, Mapping) else ():
        if key not in names:
            raise InputError(f"{where}: {one_of(str(key), names, 'key')}")


def _refuse_remote_code(value: Any, where: str) -> None:
    """Wherever it stands, also among a method's options."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if re.fullmatch(r"trust_remote_code(_\w+)?", str(key)):
                raise InputError(f"{where}: {key} is not possible; qtool never runs code that comes with a model")
            _refuse_remote_code(item, where)
    elif isinstance(value, list):
        for item in value:
            _refuse_remote_code(item, where)


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint of pydantic in one line: where, and what is wrong."""
    problem = error.errors()[0]
    steps = [str(step) for step in problem["loc"]]
    where = ".".join(step for step in steps if not re.search(r"[\[\]-]", step))  # without pydantic's own
    if problem["type"] == "extra_forbidden":
        *outer, key = problem["loc"]
        for step in outer:
            model = _section_of(model, str(step))
        return "".join(f"{step}." for step in outer) + one_of(str(key), list(model.model_fields), "option")
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}" if where else message


def _section_of(model: type[BaseModel], name: str) -> type[BaseModel]:
    """The class of a section inside a section."""
    inner = model.model_fields[name].annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
