"""Recipes: what to do, as one YAML file with one level of nesting for each concern.

Precedence, weakest first: built-in defaults, preset, file, `--set`, command-line flags. Unknown keys are refused with
the nearest known one. A resolved recipe is written into the artifact, so it can be run again.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from qtool.errors import InputError, QtoolError, UsageError, one_of
from qtool.numerics import QuantSpec


def _spec(value: Any) -> QuantSpec:
    try:
        return QuantSpec.parse(value)
    except QtoolError as error:
        raise ValueError(str(error)) from error


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
        if isinstance(value, Mapping):
            own = {key: item for key, item in value.items() if key in cls.model_fields}
            words = {key: item for key, item in value.items() if key not in cls.model_fields}
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
        return {"keep_float": True} if value == "float" else value


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
    split: str = "validation"
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
    seed: int = 0
    threads: Count | None = None

    def quantization_part(self) -> dict[str, Any]:
        """What decides the bytes of the artifact; JSON-clean."""
        return self.model_dump(mode="json", exclude={"model", "evaluate", "gate", "output", "threads"})

    def to_yaml(self) -> str:
        """Runs again to the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    def rule_for(self, path: str) -> Rule:
        """The overrides for a module path; of several matching globs the later one wins, key by key."""
        values: dict[str, Any] = {}
        for glob, rule in self.rules.items():
            if _matches(glob, path):
                values |= {key: getattr(rule, key) for key in rule.model_fields_set}
        return Rule(**values)

    def check_rules(self, paths: Sequence[str]) -> None:
        """Raises InputError for a rule that matches none of `paths`, with near misses."""
        import difflib

        for glob in self.rules:
            if any(_matches(glob, path) for path in paths):
                continue
            near = difflib.get_close_matches(glob.replace("*", ""), paths, n=3, cutoff=0.3) or list(paths[:3])
            raise InputError(f"rule '{glob}' matches no module that can be quantized; near misses: {', '.join(near)}")


def _matches(glob: str, path: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(path, glob)


def preset_folder() -> Any:
    """Where presets are: inside the wheel, or beside the package in a checkout."""
    packaged = resources.files("qtool") / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


@cache
def presets() -> dict[str, str]:
    """YAML text of each preset by name."""
    files = sorted(preset_folder().iterdir(), key=lambda file: str(file.name))
    return {f.name.removesuffix(".yaml"): f.read_text("utf-8") for f in files if f.name.endswith(".yaml")}


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
        if key in ("weights", "activations") and isinstance(old, str) and isinstance(value, Mapping):
            old = QuantSpec.parse(old).words()
        if key == "methods":
            value = _merge_methods(old, value)
        elif isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(_without_strategy(old, value), value)
        merged[key] = value
    return merged


def _without_strategy(old: Mapping[str, Any], new: Mapping[str, Any]) -> Mapping[str, Any]:
    """A new strategy or group size replaces the old block, not only half of it."""
    if {"strategy", "group_size", "block_structure"} & set(new):
        gone = {"strategy", "group_size", "block_structure", "dynamic"}
        return {key: value for key, value in old.items() if key not in gone}
    return old


def _merge_methods(old: Any, new: Any) -> Any:
    """`methods` as a list replaces; as a mapping `{name: options}` (from `--set`) it adds options."""
    if not isinstance(new, Mapping):
        return new
    known = [{"name": item} if isinstance(item, str) else dict(item) for item in old or ()]
    for name, options in new.items():
        found = next((item for item in known if item.get("name") == name), None)
        if found is None:
            raise InputError(f"methods.{name}: {one_of(name, [str(m.get('name')) for m in known], 'method')}")
        found.update(options)
    return known


def assignments(pairs: Iterable[str]) -> dict[str, Any]:
    """`--set a.b=value` pairs as a nested mapping; values are YAML scalars or lists."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not all(key.split(".")):
            raise UsageError(f"--set wants key=value, such as weights.group_size=64, not '{pair}'")
        value: Any = yaml.safe_load(text)
        for name in reversed(key.split(".")):
            value = {name: value}
        result = merge(result, value)
    return result


def build(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> Recipe:
    """A recipe from layers `(where it came from, values)`, weakest first. Raises InputError with where and what."""
    merged: dict[str, Any] = {}
    for where, values in layers:
        check_keys(values, where)
        merged = merge(merged, values)
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
    _known(values, list(Recipe.model_fields), where)
    for name, cls in _SECTIONS.items():
        section = values.get(name)
        if isinstance(section, Mapping):
            words = _SPEC_WORDS if issubclass(cls, SpecSection) else ()
            _known(section, [*cls.model_fields, *words], f"{where}: {name}")


def _known(values: Mapping[str, Any], names: list[str], where: str) -> None:
    for key in values:
        if re.fullmatch(r"trust_remote_code(_\w+)?", str(key)):
            raise InputError(f"{where}: {key} is not possible; qtool never runs code that comes with a model")
        if key not in names:
            raise InputError(f"{where}: {one_of(str(key), names, 'key')}")


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """The first complaint of pydantic in one line: where, and what is wrong."""
    problem = error.errors()[0]
    where = ".".join(str(step) for step in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return one_of(str(problem["loc"][-1]), list(model.model_fields), "option")
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{where}: {message[0].lower()}{message[1:]}" if where else message
