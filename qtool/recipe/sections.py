"""The sections of a recipe as data classes: which keys exist, what values they take, and what follows from them."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from qtool.errors import InputError, QtoolError
from qtool.numerics import QuantSpec
from qtool.rows import hub_name


def _spec(value: Any) -> QuantSpec:
    try:
        return QuantSpec.parse(value)
    except QtoolError as error:
        raise ValueError(str(error)) from error


def _activation_spec(value: Any) -> QuantSpec | Literal["float"]:
    if value == FLOAT:
        return "float"
    try:
        return QuantSpec.parse(value)
    except QtoolError as error:
        raise ValueError(f"{error}, or float") from error


def merge_specs(old: Any, new: Any) -> dict[str, Any]:
    """The words of both. A new strategy or group size replaces the old block, not only half of it.

    The word `float` and a spec replace each other.
    """
    if _is_float(new):
        return {"spec": FLOAT}
    kept, words = {} if _is_float(old) else _worded(old), _worded(new)
    if {"strategy", "group_size", "block_structure"} & set(words):
        gone = {"strategy", "group_size", "block_structure", "dynamic"}
        kept = {key: value for key, value in kept.items() if key not in gone}
    if "symmetric" in words or "minimum" in words:  # one answers what the other asks
        kept = {key: value for key, value in kept.items() if key not in ("symmetric", "minimum")}
    return {**kept, **words}


def _is_float(spec: Any) -> bool:
    """Whether a section says `float`, alone. Raises InputError where it says something else too."""
    said = spec.get("spec") if isinstance(spec, Mapping) else spec
    if said == FLOAT and isinstance(spec, Mapping) and len(spec) > 1:
        raise InputError(
            f"float has no {', '.join(key for key in spec if key != 'spec')}; write float alone, or a spec"
        )
    return isinstance(said, str) and said == FLOAT


def _worded(spec: Any) -> dict[str, Any]:
    """A spec in words, with the other keys of its section beside them. Raises InputError."""
    if not isinstance(spec, Mapping):
        return QuantSpec.parse(spec).words()
    words = {key: value for key, value in spec.items() if key != "spec"}
    return merge_specs(spec["spec"], words) if "spec" in spec else words


def parse_size(value: Any) -> int:
    """Bytes of a size such as `3GB`, `512MiB` or a whole number. Raises ValueError."""
    found = re.fullmatch(_SIZE, str(value).strip(), re.IGNORECASE) if not isinstance(value, bool) else None
    size = int(float(found["number"]) * _UNITS[(found["unit"] or "").upper()]) if found else 0
    if size < 1:
        raise ValueError(f"'{value}' is no size; write one such as 3GB or 512MiB")
    return size


_SIZE = r"(?P<number>\d+(\.\d+)?) ?(?P<unit>([KMGT]i?)?B)?"
_UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
FLOAT = "float"
"""What is not quantized."""

PART = "part:"
"""How a rule begins that names parts of blocks, the same in every architecture, instead of modules."""

Spec = Annotated[QuantSpec, BeforeValidator(_spec), PlainSerializer(str)]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "examples": ["3GB", "512MiB"]}]}),
]
ActivationSpec = Annotated[QuantSpec | Literal["float"], BeforeValidator(_activation_spec), PlainSerializer(str)]
Percent = Annotated[float, Field(ge=0, le=100)]
Nats = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are an error, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class SpecSection(Section):
    """A section that is a `QuantSpec`, written as words or in the short spelling, with further keys beside it."""

    spec: Any

    @model_validator(mode="before")
    @classmethod
    def _gather_words(cls, value: Any) -> Any:
        if isinstance(value, str | QuantSpec):
            return {"spec": value}
        if isinstance(value, Mapping) and not isinstance(value.get("spec"), QuantSpec) and not _is_float(value):
            words = _worded(value)
            own = {key: words.pop(key) for key in cls.model_fields if key in words}
            return {**own, "spec": words} if words else own
        return value


class Model(Section):
    """The float model: a folder or a hub name."""

    name: str | None = None
    revision: str | None = None


class Calibration(Section):
    """Where calibration text comes from. `auto` is the task's training split if one is given, else our sentences;
    `self` is text that the model writes."""

    source: str = "auto"
    text_column: str | None = None
    num_samples: Count = 256
    batch_size: Count = 32
    max_length: Count = 128


class Weights(SpecSection):
    """How weight matrices of the blocks are stored, and how their scales and codes are chosen."""

    spec: Spec = QuantSpec.parse("int8:channel:sym")
    rounding: Literal["nearest", "mse", "gptq", "gpfq"] = "nearest"
    scale_rule: Literal["absmax", "zeroquant"] = "absmax"

    @model_validator(mode="after")
    def _one_choice_of_scales(self) -> "Weights":
        if self.scale_rule != "absmax" and self.rounding != "nearest":
            raise ValueError(f"scale_rule {self.scale_rule} needs rounding nearest; {self.rounding} chooses the scales")
        return self


class Activations(SpecSection):
    """How the inputs of quantized layers are quantized, or `float`: only weights are."""

    spec: ActivationSpec = QuantSpec.parse("int8:token:sym")


class Rule(Section):
    """An override for the modules that a glob matches: other specs, or `float` to leave them alone."""

    weights: Spec | None = None
    activations: ActivationSpec | None = None
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
    """What `qtool run` evaluates, and where the data is: one task, or a list; one place for all, or one a task."""

    task: str | list[str] | None = None
    data: str | dict[str, str] | None = None
    split: Literal["train", "validation", "test"] | None = None
    baseline: str | None = None
    text_columns: list[str] | None = None
    label_column: str | None = None
    batch_size: Count | None = None
    max_length: Count | None = None
    stride: Count | None = None
    doc_stride: Annotated[int, Field(ge=0)] | None = None
    n_best: Count | None = None
    limit: Count | None = None
    allow_weak_baseline: bool = False

    @property
    def tasks(self) -> list[str]:
        """The names of all tasks."""
        return [self.task] if isinstance(self.task, str) else list(self.task or ())

    def data_of(self, task: str) -> str | None:
        """Where the data of a task is; None: its own on the hub."""
        return self.data.get(task) if isinstance(self.data, dict) else self.data


class GateSection(Section):
    """Limits in points of a 0–100 score, and nats; a measured value on the wrong side fails the run (exit code 5)."""

    max_drop: Percent | None = None
    min_score: Percent | None = None
    min_agreement: Percent | None = None
    max_kl: Nats | None = None


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
    max_memory: Size | None = None

    def quantization_part(self) -> dict[str, Any]:
        """What decides the bytes of the artifact; JSON-clean. Rules are a list: their order counts."""
        part = self.model_dump(mode="json", exclude={"model", "evaluate", "gate", "output", "threads", "max_memory"})
        return {**part, "rules": list(part["rules"].items())}

    def to_yaml(self) -> str:
        """Runs again to the same recipe."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)

    def without_paths(self) -> "Recipe":
        """For publication: no name of a folder or file of this machine."""
        calibration = self.calibration
        if calibration.source not in ("auto", "task", "builtin", "random", "self") and not hub_name(calibration.source):
            calibration = calibration.model_copy(update={"source": Path(calibration.source).name})
        model = self.model.model_copy(update={"name": Path(self.model.name).name if self.model.name else None})
        evaluate = self.evaluate.model_copy(update={"data": None, "baseline": None})
        changes = {"calibration": calibration, "model": model, "evaluate": evaluate, "output": None, "max_memory": None}
        return self.model_copy(update=changes)

    def with_options(self, method: str, options: Mapping[str, Any]) -> "Recipe":
        """The recipe with these options of a method, and no others."""
        changed = (MethodChoice(name=method, **options) if one.name == method else one for one in self.methods)
        return self.model_copy(update={"methods": tuple(changed)})

    def for_parts(self, parts: Mapping[str, Sequence[str]]) -> "Recipe":
        """The recipe with rules that name parts (`part:ffn.*`) written out for the modules that these are in a model.

        `parts` gives the names of each module's parts. Raises InputError for a rule that no part matches, and for one
        that matches some parts of a module whose matrix others share.
        """
        named = {glob: _modules_of(glob, parts) for glob in self.rules if glob.startswith(PART)}
        rules = {glob: rule for glob, rule in self.rules.items() if glob not in named}
        for path in dict.fromkeys(path for paths in named.values() for path in paths):
            rules.pop(path, None)  # what a module gets stands last, whole
            rules[path] = _merged(
                rule for glob, rule in self.rules.items() if path in named.get(glob, ()) or _matches(glob, path)
            )
        return self.model_copy(update={"rules": rules})

    def rule_for(self, path: str) -> Rule:
        """The overrides for a module path; of several matching globs the later one wins, key by key."""
        return _merged(rule for glob, rule in self.rules.items() if _matches(glob, path))

    def check_rules(self, paths: Sequence[str], without: Mapping[str, Collection[str]] = MappingProxyType({})) -> None:
        """Raises InputError for a rule that matches none of `paths`, with near misses, or that does nothing.

        `without` names for `weights` and `activations` the paths that have none: a rule must match another.
        """
        for glob, rule in self.rules.items():
            matching = [path for path in paths if _matches(glob, path)]
            if not matching:
                near = ", ".join(_nearest(glob.replace("*", ""), paths))
                raise InputError(f"rule '{glob}' matches no module that can be quantized; near misses: {near}")
            for key in sorted(rule.model_fields_set & set(without)):
                if set(matching) <= set(without[key]):
                    raise InputError(f"rule '{glob}' gives {key} to {matching[0]}, which has none")


def _merged(rules: Iterable[Rule]) -> Rule:
    """One rule of several; later ones win, key by key."""
    values: dict[str, Any] = {}
    for rule in rules:
        values |= {key: getattr(rule, key) for key in rule.model_fields_set}
    return Rule(**values)


def _modules_of(rule: str, parts: Mapping[str, Sequence[str]]) -> list[str]:
    """Paths of the modules whose parts a rule names."""
    glob, found = rule.removeprefix(PART), []
    for path, names in parts.items():
        matching = [name for name in names if _matches(glob, name)]
        if matching and len(matching) < len(names):
            raise InputError(f"rule '{rule}' names {matching[0]}, but {path} is {', '.join(names)} in one matrix")
        found += [path] if matching else []
    if not found:
        known = ", ".join(dict.fromkeys(name for names in parts.values() for name in names))
        raise InputError(f"rule '{rule}' matches no part of this model; it has {known}")
    return found


def _matches(glob: str, path: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(path, glob)


def _nearest(text: str, paths: Sequence[str]) -> list[str]:
    """The three paths most like `text`, as a whole or at their ends: a glob often names the end alone."""
    from difflib import SequenceMatcher

    def likeness(path: str) -> float:
        return max(SequenceMatcher(None, text, part).ratio() for part in (path, path[-len(text) :]))

    return sorted(paths, key=likeness, reverse=True)[:3]
