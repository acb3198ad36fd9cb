"""The JSON Schema of a recipe file, for editors: the keys and values that qtool accepts, in every spelling."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from qtool.numerics.spec import _EXTENT, _SPELLING, STRATEGIES
from qtool.recipe.files import presets
from qtool.recipe.sections import Recipe

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_WORDS: dict[str, Any] = {
    "num_bits": {"type": "integer", "minimum": 2, "maximum": 32},
    "type": {"const": "int"},
    "symmetric": {"type": "boolean"},
    "minimum": {"type": "boolean", "description": "Asymmetric, with a float minimum instead of an integer zero point."},
    "dynamic": {"type": "boolean", "description": "Scales are computed from each input at run time."},
    "strategy": {"enum": list(STRATEGIES), "description": "Which values share a scale."},
    "group_size": {"type": "integer", "minimum": 1, "description": "Columns of a group, or rows of rows."},
    "block_structure": {
        "anyOf": [
            {"type": "string", "pattern": f"^{_EXTENT}$"},
            {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": ["integer", "null"], "minimum": 1}},
        ]
    },
}
_SHORT = {
    "type": "string",
    "pattern": f"^\\s*{re.sub(r'[?]P<[a-z]+>', '', _SPELLING.pattern)}\\s*$",
    "examples": ["int8:channel:sym", "int8:token:sym", "int4:group:64:sym", "int4:group:32:min", "int8:tensor:asym"],
}
_QUANTIZED = {"$ref": "#/$defs/QuantSpec"}
_SPEC = {
    "title": "QuantSpec",
    "description": "How a tensor becomes integers: a short spelling, or words of compressed-tensors.",
    "anyOf": [_SHORT, {"type": "object", "properties": _WORDS, "additionalProperties": False}],
}


def recipe_schema(methods: Mapping[str, tuple[str, type[BaseModel]]]) -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file; `methods` are those known here: name → summary and options class."""
    schema = Recipe.model_json_schema()
    shared = schema["$defs"]
    choices = {name: _method(name, *described, shared) for name, described in methods.items()}
    shared["Weights"] = _spec_section(shared["Weights"], _QUANTIZED)
    shared["Activations"] = _spec_section(shared["Activations"], {"anyOf": [_QUANTIZED, {"const": "float"}]})
    shared["Activations"]["anyOf"].append({"const": "float"})
    shared["Rule"] = {**shared["Rule"], "anyOf": [{"const": "float"}, _object(shared["Rule"])]}
    for key in ("type", "properties", "additionalProperties"):
        shared["Rule"].pop(key)
    shared |= {"QuantSpec": _SPEC, "MethodChoice": _choice(choices)}
    mapping = {name: _options(choice) for name, choice in choices.items()}
    schema["properties"]["methods"] = _method_list(mapping)
    schema["properties"] |= {
        "preset": {"enum": list(presets()), "description": "The preset that the file starts from."}
    }
    title = {"$schema": _DIALECT, "title": "qtool recipe", "description": "What `qtool quantize` and `qtool run` do."}
    return {**schema, **title}


def _object(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: section[key] for key in ("type", "properties", "additionalProperties")}


def _spec_section(section: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    """A section that is a spec: a short spelling, or its words beside the section's own keys."""
    keys = {**section["properties"], **_WORDS, "spec": spec}
    told = {"title": section["title"], "description": section["description"]}
    return {**told, "anyOf": [_SHORT, {"type": "object", "properties": keys, "additionalProperties": False}]}


def _method(name: str, summary: str, options: type[BaseModel], shared: dict[str, Any]) -> dict[str, Any]:
    """`{name: …}` with the method's own options."""
    own = options.model_json_schema()
    shared |= own.pop("$defs", {})
    properties = {"name": {"const": name}, **own.get("properties", {})}
    return {
        "title": name,
        "description": summary,
        "type": "object",
        "properties": properties,
        "required": ["name", *own.get("required", [])],
        "additionalProperties": False,
    }


def _choice(choices: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "description": "A method's name and its own options.",
        "anyOf": [{"enum": list(choices)}, *choices.values()],
    }


def _options(choice: Mapping[str, Any]) -> dict[str, Any]:
    """The same options where the name stands before them."""
    inner = {**choice, "required": [name for name in choice["required"] if name != "name"]}
    inner["properties"] = {key: value for key, value in choice["properties"].items() if key != "name"}
    return {"anyOf": [inner, {"type": "null"}]}


def _method_list(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "description": "Methods by name, or with their own options.",
        "anyOf": [
            {"type": "array", "items": {"$ref": "#/$defs/MethodChoice"}},
            {"enum": list(mapping)},
            {"type": "object", "properties": dict(mapping), "additionalProperties": False},
            {"type": "null"},
        ],
    }
