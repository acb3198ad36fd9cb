"""From arguments to a recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import recipe as recipes
from qtool.errors import InputError, UsageError
from qtool.recipe import Recipe

if TYPE_CHECKING:
    from qtool.evaluation.tasks import Task


def resolve_recipe(
    *,
    config: str | None = None,
    sets: Sequence[str] = (),
    methods: Sequence[str] = (),
    model: str | None = None,
    flags: Mapping[str, Any] | None = None,
    file: Mapping[str, Any] | None = None,
) -> Recipe:
    """Merge the layers; `flags` holds only what was given, by its name in `FLAG_KEYS`.

    `config` is a recipe file or a preset; with `file`, its content, only a label for messages.

    Raises UsageError for an unknown method or task among the arguments, or a method that is there twice, InputError for
    one in the recipe file.
    """
    from qtool.evaluation.tasks import task
    from qtool.methods import entry, preset_keys

    for name in methods:
        entry(name)
    if said := _twice(methods):
        raise UsageError(said)
    given = _recipe_keys(flags or {})
    if "evaluate.task" in given:
        task(given["evaluate.task"])
    if model is not None:
        given["model.name"] = model
    if file is None:
        file = recipes.read(config) if config else {}
    listed = recipes.method_list(file.get("methods"))
    for item in listed:
        try:
            entry(item["name"])
        except UsageError as error:
            raise InputError(f"{config}: {error}") from error
    if said := _twice([item["name"] for item in listed]):
        raise InputError(f"{config}: {said}")
    names = methods or [item["name"] for item in listed]
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if "weights" not in file and "activations" not in file:
        layers += [(f"preset of {name}", preset_keys(entry(name).preset)) for name in names]
    layers.append((config or "recipe", file))
    if methods:
        layers.append(("--method", {"methods": _chosen(methods, listed)}))
    layers.append(("--set", recipes.assignments(sets)))
    layers.append(("command line", recipes.nested(given)))
    built = _with_canonical_tasks(recipes.build(layers))
    if not built.methods:
        if config is None:
            raise UsageError("which method? Pass --method (`qtool methods` lists them) or a recipe with -c")
        raise InputError(f"{config} names no method; list one under methods, or pass --method")
    return built


def _with_canonical_tasks(recipe: Recipe) -> Recipe:
    """Tasks, and the keys of their data, as the table of tasks spells them; unknown ones are found out later."""
    from qtool.evaluation.tasks import canonical

    scored = recipe.evaluate
    task = canonical(scored.task) if isinstance(scored.task, str) else scored.task and [*map(canonical, scored.task)]
    data = {canonical(k): place for k, place in scored.data.items()} if isinstance(scored.data, dict) else scored.data
    return recipe.model_copy(update={"evaluate": scored.model_copy(update={"task": task, "data": data})})


FLAG_KEYS: dict[str, tuple[str, ...]] = {
    "task": ("evaluate.task",),
    "data": ("evaluate.data",),
    "text_columns": ("evaluate.text_columns",),
    "num_samples": ("calibration.num_samples",),
    "max_length": ("calibration.max_length", "evaluate.max_length"),
    "batch_size": ("calibration.batch_size", "evaluate.batch_size"),
    "revision": ("model.revision",),
    "seed": ("seed",),
    "threads": ("threads",),
    "max_memory": ("max_memory",),
}
"""Recipe keys that a flag of the command line, or the argument of `quantize` with its name, sets."""


def _recipe_keys(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted recipe keys for `flags`."""
    keys: dict[str, Any] = {}
    for name, value in flags.items():
        plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        keys |= dict.fromkeys(FLAG_KEYS[name], plain)
    return keys


def _twice(names: Sequence[str]) -> str | None:
    """What is wrong with a list that names a method twice; found here, for the options of both become those of one."""
    found = next((name for name in names if names.count(name) > 1), None)
    return found and f"method {found} is there twice; name it once, with all of its options"


def _chosen(methods: Sequence[str], known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`--method` picks; options that the file gives to the same method stay."""
    options = {item["name"]: item for item in known}
    return [options.get(name, {"name": name}) for name in methods]


def recipe_list(files: Sequence[str], sets: Sequence[str] = ()) -> list[tuple[str, Recipe]]:
    """The recipes of several files, each of which may hold a list, with labels. Errors of `resolve_recipe`."""
    return [
        (label, resolve_recipe(config=label, sets=sets, file=values))
        for name in files
        for label, values in recipes.read_list(name)
    ]


def recipe_task(recipe: Recipe) -> "Task":
    """The (first) task of the recipe. Raises InputError when one is unknown or none is given."""
    from qtool.evaluation.tasks import task

    if not recipe.evaluate.tasks:
        raise InputError("the recipe names no task; pass --task or set evaluate.task")
    try:
        chosen = [task(name) for name in recipe.evaluate.tasks]
    except UsageError as error:
        raise InputError(f"evaluate.task: {error}") from error
    return chosen[0]
