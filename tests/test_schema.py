"""`qtool schema` and qtool's own parser accept and refuse the same recipes."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qtool import methods, recipe
from qtool.errors import QtoolError
from qtool.recipe.schema import recipe_schema

Command = Callable[..., Any]
ROOT = Path(__file__).parents[1]
SCHEMA = recipe_schema(
    {name: (e.summary, methods.method_class(name).options_class) for name, e in methods.METHODS.items()}
)

TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}
TOLD = {"$schema", "$defs", "title", "description", "default", "examples"}
CHECKS: dict[str, Callable[[Any, Any, Any], bool]] = {
    "$ref": lambda value, name, whole: valid(value, SCHEMA["$defs"][name.removeprefix("#/$defs/")]),
    "anyOf": lambda value, options, whole: any(valid(value, option) for option in options),
    "type": lambda value, names, whole: any(TYPES[n](value) for n in ([names] if isinstance(names, str) else names)),
    "const": lambda value, wanted, whole: value == wanted,
    "enum": lambda value, known, whole: value in known,
    "required": lambda value, names, whole: not isinstance(value, dict) or set(names) <= set(value),
    "properties": lambda value, known, whole: not isinstance(value, dict) or all(
        valid(value[name], inner) for name, inner in known.items() if name in value
    ),
    "additionalProperties": lambda value, inner, whole: not isinstance(value, dict) or all(
        valid(item, inner) for name, item in value.items() if name not in whole.get("properties", {})
    ),
    "items": lambda value, inner, whole: not isinstance(value, list) or all(valid(item, inner) for item in value),
    "minItems": lambda value, count, whole: not isinstance(value, list) or len(value) >= count,
    "maxItems": lambda value, count, whole: not isinstance(value, list) or len(value) <= count,
    "pattern": lambda value, text, whole: not isinstance(value, str) or re.search(text, value) is not None,
    "exclusiveMinimum": lambda value, limit, whole: not TYPES["number"](value) or value > limit,
    "minimum": lambda value, limit, whole: not TYPES["number"](value) or value >= limit,
    "maximum": lambda value, limit, whole: not TYPES["number"](value) or value <= limit,
    "exclusiveMaximum": lambda value, limit, whole: not TYPES["number"](value) or value < limit,
}  # fmt: skip
"""The keywords of JSON Schema that occur in ours; an unknown one is a KeyError."""


def valid(value: Any, schema: Any) -> bool:
    if isinstance(schema, bool):
        return schema
    return all(CHECKS[key](value, word, schema) for key, word in schema.items() if key not in TOLD)


def accepted(file: dict[str, Any]) -> bool:
    """Whether qtool reads it, up to the options of its methods."""
    own = {key: value for key, value in file.items() if key != "preset"}
    try:
        base = [("preset", recipe.preset(file["preset"]))] if "preset" in file else []
        built = recipe.build([*base, ("file", own)])
        if built.methods:
            methods.build(built)
    except QtoolError:
        return False
    return True


def pages() -> list[Any]:
    """Every YAML block of the documentation that is a recipe, and every preset."""
    found = [yaml.safe_load(text) for text in recipe.presets().values()]
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
            read = yaml.safe_load(block)
            if isinstance(read, dict) and {"rules", "methods", "model", "calibration"} & set(read):
                found.append(read)
    return found


def test_presets_and_documented_recipes_are_valid() -> None:
    assert len(pages()) >= len(recipe.presets()) + 2
    for read in pages():
        assert valid(read, SCHEMA) and accepted(read), read


FULL: dict[str, Any] = {
    "preset": "zeroquant-w8a8",
    "model": {"name": "org/model", "revision": None},
    "calibration": {"source": "auto", "text_column": "text", "num_samples": 8, "batch_size": 2, "max_length": 16},
    "weights": {"num_bits": 8, "strategy": "group", "group_size": 64, "symmetric": True, "rounding": "nearest"},
    "activations": {"spec": "int8:token:sym"},
    "rules": {"*.layer.5.*": "float", "*.query": {"weights": "int8:rows:4:sym"}, "x": {"keep_float": True}},
    "methods": [{"name": "zeroquant", "word_embeddings": "float", "small_embeddings": {"num_bits": 16}}],
    "evaluate": {"task": "sst2", "limit": 10},
    "gate": {"max_drop": 0.5, "min_score": 90, "min_agreement": None, "max_kl": 0.01},
    "output": "out",
    "seed": 3,
    "threads": 2,
}
RIGHT: list[dict[str, Any]] = [
    {},
    FULL,
    {"weights": "int4:group:64:asym", "methods": "zeroquant"},
    {"weights": {"strategy": "block", "block_structure": [16, None]}, "methods": None},
    {"weights": {"block_structure": "16x*"}, "methods": []},
    {"methods": ["zeroquant"], "activations": "int8:tensor:sym:static"},
    {"methods": {"zeroquant": None}},
    {"methods": {"zeroquant": {"word_embeddings": "int8:channel:sym"}}},
    {"rules": {"*": {"activations": {"num_bits": 8, "strategy": "tensor"}, "weights": None}}},
]
WRONG: list[Any] = [
    {"weights": "int8"},
    {"weights": {"num_bits": 1}},
    {"weights": {"rounding": "up"}},
    {"activations": {"rounding": "nearest"}},
    {"weights": {"strategy": "rowwise"}},
    {"weights": 8},
    {"rules": {"*": "int8"}},
    {"rules": {"*": {"rounding": "nearest"}}},
    {"methods": ["zeroqant"]},
    {"methods": "zeroqant"},
    {"methods": [{"word_embeddings": "float"}]},
    {"methods": [{"name": "zeroquant", "word_embeddings": "none"}]},
    {"methods": {"zeroquant": {"bits": 8}}},
    {"methods": 3},
    {"preset": "zeroqant"},
    {"calibration": {"num_samples": 0}},
    {"gate": {"max_drop": 101}},
    {"gate": {"max_kl": -0.1}},
    {"seed": -1},
    {"seed": 2**63},
    {"threads": 0},
    {"model": "org/model"},
]


@pytest.mark.parametrize("file", RIGHT, ids=str)
def test_right_recipes(file: dict[str, Any]) -> None:
    assert accepted(file)
    assert valid(file, SCHEMA)


@pytest.mark.parametrize("file", WRONG, ids=str)
def test_wrong_recipes(file: dict[str, Any]) -> None:
    assert not accepted(file)
    assert not valid(file, SCHEMA)


PLACES: list[tuple[str | int, ...]] = [
    (), ("model",), ("calibration",), ("weights",), ("activations",), ("rules", "*.query"), ("methods", 0),
    ("methods", 0, "small_embeddings"), ("evaluate",), ("gate",),
]  # fmt: skip
KEYS = sorted({key for name in SCHEMA["$defs"] for key in SCHEMA["$defs"][name].get("properties", {})} | set(FULL))


@given(st.sampled_from(PLACES), st.one_of(st.sampled_from(KEYS), st.text(max_size=12)), st.sampled_from([None, 1, "x"]))
def test_a_further_key_is_judged_alike(place: tuple[str | int, ...], key: str, value: Any) -> None:
    """Keys of other sections among them: what one refuses for its key, the other refuses too."""
    file = json.loads(json.dumps(FULL))
    section: Any = file
    for step in place:
        section = section[step]
    if key in section or (value is not None and key in KEYS):
        return  # a known key: its values are judged above
    section[key] = value
    assert valid(file, SCHEMA) == accepted(file), (place, key)


def test_the_command_prints_it(desk: Path, qtool_command: Command) -> None:
    ended = qtool_command("schema")
    assert (ended.code, ended.err) == (0, "")
    printed = json.loads(ended.out)
    assert printed == json.loads(json.dumps(SCHEMA))
    assert printed["$schema"].startswith("https://json-schema.org/") and printed["title"] == "qtool recipe"
    assert qtool_command("schema", "-o", "recipe.schema.json").out == ""
    assert json.loads(Path("recipe.schema.json").read_text()) == printed
    ended = qtool_command("schema", "-o", "nowhere/x.json")
    assert (ended.code, len(ended.errors)) == (4, 1)


def test_every_key_is_in_the_schema() -> None:
    assert set(SCHEMA["properties"]) == {*recipe.Recipe.model_fields, "preset"}
    assert set(SCHEMA["$defs"]["Calibration"]["properties"]) == set(recipe.Calibration.model_fields)
