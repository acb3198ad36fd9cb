"""Recipe files and presets: YAML text to mappings."""

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from qtool.errors import InputError, one_of
from qtool.recipe.layers import merge


def preset_folder() -> Any:
    """Where presets are: inside the wheel, or beside the package in a checkout."""
    packaged = resources.files("qtool") / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "configs"


@cache
def presets() -> dict[str, str]:
    """YAML text of each preset by name."""
    files = {f.name.removesuffix(".yaml"): f for f in preset_folder().iterdir() if f.name.endswith(".yaml")}
    return {name: files[name].read_text("utf-8") for name in sorted(files)}


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """A YAML mapping. Raises InputError with the line for anything else."""
    return _mapping(load_yaml(text, where), where)


def load_yaml(text: str, where: str) -> Any:
    """What a YAML text says. Raises InputError with the line for anything that is not YAML."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    try:
        json.dumps(value, default=str)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: an alias contains itself") from error
    return value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: a recipe is a mapping of sections, not a {type(value).__name__}")
    return value


def read(name: str) -> dict[str, Any]:
    """A recipe file, or a preset by its name, merged with the preset that it names in `preset`."""
    recipes = read_list(name)
    if len(recipes) != 1:
        raise InputError(f"{name} holds {len(recipes)} recipes; `qtool run` takes such a list")
    return recipes[0][1]


def read_list(name: str) -> list[tuple[str, dict[str, Any]]]:
    """The recipes of a file, which may be a YAML list of them, each with a label for messages."""
    path = Path(name)
    if path.is_file():
        try:
            found = load_yaml(path.read_text("utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{name} cannot be read: {error}") from error
        if isinstance(found, list):
            return [(f"{name}#{number}", _whole(one, f"{name}#{number}")) for number, one in enumerate(found, start=1)]
        return [(name, _whole(found, name))]
    return [(name, _named(name))]


def _whole(value: Any, where: str) -> dict[str, Any]:
    """A recipe's mapping on the preset that it names."""
    own = dict(_mapping(value, where))
    base = own.pop("preset", None)
    return merge(preset(str(base)), own) if base is not None else own


def _named(name: str) -> dict[str, Any]:
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or "/" in name:
        raise InputError(f"no recipe at {name}")
    return preset(name)


def preset(name: str) -> dict[str, Any]:
    """Raises InputError for an unknown preset."""
    if name not in presets():
        raise InputError(one_of(name, list(presets()), "preset"))
    return parse_yaml(presets()[name], f"preset {name}")
