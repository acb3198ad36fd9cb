"""Recipes: what to do, as one YAML file with one level of nesting for each concern.

Precedence, weakest first: built-in defaults, preset, file, `--set`, command-line flags. Unknown keys are refused with
the nearest known one. A resolved recipe is written into the artifact, so it can be run again.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from qtool.errors import InputError, QtoolError, UsageError, one_of
from qtool.numerics import QuantSpec


def _spec(value: Any) -> QuantSpec:
    try:
        return QuantSpec.parse(value)
    except QtoolError as error:
        raise ValueError(str(error)) from error


def _merge_specs(old: Any, new: Any) -> dict[str, Any]:
    """The words of both. A new strategy or group size replaces the old block, not only half of it."""
    kept, words = _worded(old), _worded(new)
    if {"strategy", "group_size", "block_structure"} & set(words):
        gone = {"strategy", "group_size", "block_structure", "dynamic"}
        kept = {key: value for key, value in kept.items() if key not in gone}
    return {**kept, **words}


def _worded(spec: Any) -> dict[str, Any]:
    """A spec in words, with the other keys of its section beside them. Raises InputError."""
    if not isinstance(spec, Mapping):
        return QuantSpec.parse(spec).words()
    words = {key: value for key, value in spec.items() if key != "spec"}
    return _merge_specs(spec["spec"], words) if "spec" in spec else words


Spec = Annotated[QuantSpec, BeforeValidator(_spec), PlainSerializer(str)]
Percent = Annotated[float, Field(ge=0, le=100)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are an error, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class SpecSection(Section):
    """A section that is a `QuantSpec`, written as words or in the short spelling, with further keys beside it."""

    spec: Spec

    @model_validator(mode="before")
    @classmethod
    def _gather_words(cls, value: Any) -> Any:
        if isinstance(value, str | QuantSpec):
            return {"spec": value}
        if isinstance(value, Mapping) and not isinstance(value.get("spec"), QuantSpec):
            words = _worded(value)
            own = {key: words.pop(key) for key in cls.model_fields if key in words}
            return {**own, "spec": words} if words else own
        return value


class Model(Section):
    """The float model: a folder or a hub name."""

    name: str | None = None
    revision: str | None = None


class Calibration(Section):
    """Where calibration text comes from. `auto` is the task's training split if one is given, else our sentences."""

    source: str = "auto"
    text_column: str | None = None
    num_samples: Count = 256
    batch_size: Count = 32
    max_length: Count = 128


class Weights(SpecSection):
    """How weight matrices of the blocks are stored."""

    spec: Spec = QuantSpec.parse("int8:channel:sym")
    rounding: Literal["nearest"] = "nearest"


class Activations(SpecSection):
    """How the inputs of quantized layers are quantized."""

    spec: Spec = QuantSpec.parse("int8:token:sym")


class Rule(Section):
    """An override for the modules that a glob matches: other specs, or `float` to leave them alone."""

    weights: Spec | None = None
    activations: Spec | None = None
    keep_float: bool = False

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        if isinstance(value, str) and value != "float":
            raise ValueError(f"a rule is the word float or a mapping with weights and activations, not '{value}'")
        return {"keep_float": True} if value == "float" else value

    @model_serializer(mode="wrap")
    def _only_given(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A key that was not given does not override other rules, also after it was written and read again."""
        return {key: value for key, value in serialize(self).items() if key in self.model_fields_set}


class MethodChoice(BaseModel):
    """A method's name and its own options."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @model_validator(mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the name."""
        return dict(self.model_extra or {})


class Evaluate(Section):
    """What `qtool run` evaluates, and where the data is."""

    task: str | None = None
    data: str | None = None
    split: Literal["train", "validation", "test"] = "validation"
    baseline: str | None = None
    text_columns: list[str] | None = None
    label_column: str | None = None
    batch_size: Count = 32
    max_length: Count = 128
    limit: Count | None = None
    allow_weak_baseline: bool = False


class GateSection(Section):
    """Limits in points of a 0–100 score; a measured value on the wrong side fails the run (exit code 5)."""

    max_drop: Percent | None = None
    min_score: Percent | None = None
    min_agreement: Percent | None = None


class Recipe(Section):
    """The whole recipe."""

    model: Model = Model()
    calibration: Calibration = Calibration()
    weights: Weights = Weights()
    activations: Activations = Activations()
    rules: dict[str, Rule] = {}
    methods: tuple[MethodChoice, ...] = ()
    evaluate: Evaluate = Evaluate()
    gate: GateSection = GateSection()
    output: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None

    def quantization_part(self) -> dict[str, Any]:
        """What decides the bytes of the artifact; JSON-clean. Rules are a list: their order counts."""
        part = self.model_dump(mode="json", exclude={"model", "evaluate", "gate", "output", "threads"})
        return {**part, "rules": list(part["rules"].items())}

    def to_yaml(self) -> str:
        """Runs again to the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    def without_paths(self) -> "Recipe":
        """For publication: no name of a folder or file of this machine."""
        calibration = self.calibration
        if calibration.source not in ("auto", "task", "builtin", "random"):
            calibration = calibration.model_copy(update={"source": Path(calibration.source).name})
        model = self.model.model_copy(update={"name": Path(self.model.name).name if self.model.name else None})
        evaluate = self.evaluate.model_copy(update={"data": None, "baseline": None})
        changes = {"calibration": calibration, "model": model, "evaluate": evaluate, "output": None}
        return self.model_copy(update=changes)

    def rule_for(self, path: str) -> Rule:
        """The overrides for a module path; of several matching globs the later one wins, key by key."""
        values: dict[str, Any] = {}
        for glob, rule in self.rules.items():
            if _matches(glob, path):
                values |= {key: getattr(rule, key) for key in rule.model_fields_set}
        return Rule(**values)

    def check_rules(self, paths: Sequence[str]) -> None:
        """Raises InputError for a rule that matches none of `paths`, with near misses."""
        for glob in self.rules:
            if not any(_matches(glob, path) for path in paths):
                near = ", ".join(_nearest(glob.replace("*", ""), paths))
                raise InputError(f"rule '{glob}' matches no module that can be quantized; near misses: {near}")


def _matches(glob: str, path: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(path, glob)


def _nearest(text: str, paths: Sequence[str]) -> list[str]:
    """The three paths most like `text`, as a whole or at their ends: a glob often names the end alone."""
    from difflib import SequenceMatcher

    def likeness(path: str) -> float:
        return max(SequenceMatcher(None, text, part).ratio() for part in (path, path[-len(text) :]))

    return sorted(paths, key=likeness, reverse=True)[:3]


def preset_folder() -> Any:
    """Where presets are: inside the wheel, or beside the package in a checkout."""
    packaged = resources.files("qtool") / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


@cache
def presets() -> dict[str, str]:
    """YAML text of each preset by name."""
    files = {f.name.removesuffix(".yaml"): f for f in preset_folder().iterdir() if f.name.endswith(".yaml")}
    return {name: files[name].read_text("utf-8") for name in sorted(files)}


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping. Raises InputError with the line for anything else."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if value is None:
        return {}
    try:
        json.dumps(value, default=str)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: an alias contains itself") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: a recipe is a mapping of sections, not a {type(value).__name__}")
    return value


def read(name: str) -> dict[str, Any]:
    """A recipe file, or a preset by its name, merged with the preset that it names in `preset`."""
    path = Path(name)
    if path.is_file():
        try:
            own = parse_yaml(path.read_text("utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name} cannot be read: {error}") from error
        base = own.pop("preset", None)
        return merge(preset(str(base)), own) if base is not None else own
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise InputError(f"no recipe at {name}")
    return preset(name)


def preset(name: str) -> dict[str, Any]:
    """Raises InputError for an unknown preset."""
    if name not in presets():
        raise InputError(one_of(name, list(presets()), "preset"))
    return parse_yaml(presets()[name], f"preset {name}")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on `base`, key by key and one mapping into another; specs are merged by their words."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if key == "methods":
            value = _merge_methods(old, value)
        elif key in ("weights", "activations") and old is not None and isinstance(value, str | Mapping):
            try:
                value = _merge_specs(old, value)
            except QtoolError as error:
                raise InputError(f"{key}: {error}") from error
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
        known[item["name"]].update(item)
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
_SPEC_WORDS = ("num_bits", "type", "symmetric", "dynamic", "strategy", "group_size", "block_structure")


def check_keys(values: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a key that no section has, and for any wish to run remote code."""
    _refuse_remote_code(values, where)
    _known(values, list(Recipe.model_fields), where)
    for name, cls in _SECTIONS.items():
        words = _SPEC_WORDS if issubclass(cls, SpecSection) else ()
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
    where = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return one_of(str(problem["loc"][-1]), list(model.model_fields), "option")
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}" if where else message
