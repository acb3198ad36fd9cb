"""`evaluate`: a model, its recorded float source, and where scores are kept."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.api.jobs import latest
from qtool.api.recipes import recipe_task
from qtool.errors import InputError, QtoolError
from qtool.recipe import Recipe

if TYPE_CHECKING:
    from qtool.evaluation.result import Evaluation


def evaluate(model: str | Path | None, task: str, **options: Any) -> "Evaluation":
    """Score `model` (None: the newest artifact) on `task`; options as `qtool.evaluation.runner.evaluate`.

    Without `baseline`, an artifact is compared with the float model that it was made from, if that is still there.
    """
    from qtool.evaluation import runner, tasks

    chosen = tasks.task(task)
    target = model or latest()
    if options.get("baseline") is None:
        options["baseline"] = recorded_source(target)
    return runner.evaluate(target, chosen, **options)


def recorded_source(model: str | Path) -> str | None:
    """The float model that the artifact `model` was made from; None for a float model.

    Raises InputError when it is gone or is no longer the model that was quantized.
    """
    from qtool.artifact import is_artifact, report
    from qtool.checkpoint import Checkpoint, load_config, locate, skeleton

    folder = locate(model)
    if not is_artifact(folder):
        return None
    source = report(folder)["source"]
    if not {"name", "sha256"} <= source.keys():
        raise InputError(f"{model} does not record its float model (qtool.json is damaged); pass --baseline")
    try:
        path = locate(source["name"], source.get("revision"))
    except QtoolError as error:
        raise InputError(f"the float model that {model} was made from is gone ({error}); pass --baseline") from error
    if Checkpoint(path, skeleton(load_config(path))).digest() != source["sha256"]:
        raise InputError(f"{source['name']} has changed since {model} was made from it; pass --baseline")
    return str(path)


def baseline_for(model: str | Path, *, required: bool) -> tuple[str | None, str | None]:
    """The recorded source, or None with the reason (if any) when there is none and no gate needs it."""
    try:
        source = recorded_source(model)
    except InputError as error:
        if required:
            raise
        return None, f"no baseline: {error}"
    if source is None and required:
        raise InputError(f"a gate compares with a float baseline, and {model} is a float model itself; pass --baseline")
    return source, None


def evaluate_recipe(out: Path, source: str, recipe: Recipe, progress: Any = None) -> "Evaluation":
    """What the recipe's `evaluate` section asks for, against the float model it names, or `source`."""
    from qtool.checkpoint import locate
    from qtool.evaluation import runner

    wanted = recipe.evaluate.model_dump(exclude={"task", "baseline"})
    baseline = recipe.evaluate.baseline or locate(source, recipe.model.revision)
    return runner.evaluate(out, recipe_task(recipe), baseline=baseline, progress=progress, **wanted)


def record_scores(out: Path, result: "Evaluation") -> None:
    """Keep the scores of `qtool run` in the artifact's report."""
    from qtool.artifact import REPORT, report, write_json

    write_json(out / REPORT, {**report(out), "scores": [result.to_json()]}, sort=False)
