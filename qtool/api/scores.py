"""`evaluate`: a model, its recorded float source, and where scores are kept."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.api.jobs import latest
from qtool.errors import InputError, QtoolError, tells_failure
from qtool.recipe import Recipe

if TYPE_CHECKING:
    from qtool.evaluation.result import Evaluation
    from qtool.evaluation.tasks import Task


def evaluate(model: str | Path | None, task: str, **options: Any) -> "Evaluation":
    """Score `model` (None: the newest artifact) on `task`; options as `qtool.evaluation.runner.evaluate`.

    Without `baseline`, an artifact is compared with the float model that it was made from, if that is still there.
    """
    from qtool.device import usable
    from qtool.evaluation import runner, tasks

    usable(options.get("device", "cpu"))
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
    from qtool.checkpoint import locate

    locate(model)  # what is wrong with the model itself is no matter of its baseline
    try:
        source = recorded_source(model)
    except InputError as error:
        if required:
            raise
        return None, f"no baseline: {error}"
    if source is None and required:
        raise InputError(f"a gate compares with a float baseline, and {model} is a float model itself; pass --baseline")
    return source, None


def evaluations(
    model: str | Path,
    tasks: Sequence[str],
    data: Mapping[str, str] | str | None = None,
    *,
    baseline: str | Path | None = None,
    known: Sequence[Mapping[str, Any]] = (),
    marked: bool = True,
    progress: Any = None,
    **options: Any,
) -> Iterator["Evaluation"]:
    """One task after the other; `known` results (JSON) that would be the same again are not computed again.

    `data` is one place for all tasks or one a task. Without `marked`, which reads all weights once more, a result
    cannot be known later; neither can one on data of the hub, which may change. Unknown tasks and options without a
    meaning are errors before the first is scored.
    """
    from qtool.artifact import CARD, REPORT
    from qtool.checkpoint import locate
    from qtool.device import usable
    from qtool.evaluation import runner
    from qtool.evaluation.result import Evaluation
    from qtool.evaluation.tasks import task
    from qtool.ranks import current

    usable(options.get("device", "cpu"))
    chosen = [task(name) for name in tasks]
    folders = [locate(model, options.get("revision")), *([locate(baseline)] if baseline else [])]
    models = [_digests(folder, lambda file: file.name not in (CARD, REPORT)) for folder in folders] if marked else None
    for item, own in zip(chosen, runner.options_for(chosen, options), strict=True):
        source = data.get(item.name) if isinstance(data, Mapping) else data
        mark = _fingerprint(models, item, source, own) if models else None
        old = next((body for body in known if mark and body.get("fingerprint") == mark), None)
        old = current().told("earlier score", old)  # what another machine would keep does not matter
        if old is not None and old["candidate"]["score"] is not None:
            yield Evaluation.from_json(old)
        else:
            report = _named(progress, item.name) if len(chosen) > 1 else progress
            found = runner.evaluate(model, item, data=source, baseline=baseline, progress=report, **own)
            yield replace(found, fingerprint=mark)


def _named(progress: Any, task: str) -> Any:
    """Progress that says which task it is about."""
    return progress and (lambda stage, done, total: progress(f"{task}: {stage}", done, total))


def _fingerprint(models: Any, task: "Task", data: str | None, options: Mapping[str, Any]) -> str | None:
    """Digest of everything that an evaluation depends on; None where that cannot be known."""
    import torch

    from qtool.device import usable
    from qtool.evaluation.result import Evaluation
    from qtool.job import instruction_set, versions
    from qtool.rows import READERS

    place = Path(data).expanduser() if data else None
    if place is None or not place.exists():
        return None
    facts = {
        "models": models,
        "task": repr(task),
        "data": [data, _digests(place, lambda file: file.suffix in READERS)],
        "measured": sorted(Evaluation.__dataclass_fields__),  # a result that lacks one is made again
        "options": {name: str(value) for name, value in options.items() if name != "device"},
        "machine": [
            instruction_set(usable(options.get("device", "cpu"))),
            options.get("threads") or torch.get_num_threads(),
            versions(),
        ],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _digests(place: Path, counts: Callable[[Path], bool]) -> dict[str, str]:
    """SHA-256 of a file, or of each file of a folder that counts."""
    from qtool.checkpoint import sha256

    files = [file for file in sorted(place.iterdir()) if counts(file)] if place.is_dir() else [place]
    return {file.name: sha256(file) for file in files if file.is_file()}


def kept_results(file: str | Path | None) -> list[dict[str, Any]]:
    """The results in a JSON file of an earlier `qtool eval`, finished or not; none when there is no such file.

    Raises InputError for a file that is something else.
    """
    if file is None or not Path(file).is_file():
        return []
    try:
        body = json.loads(Path(file).read_text("utf-8"))
    except ValueError:
        body = None
    if tells_failure(body):
        return []
    results = body.get("results", [body]) if isinstance(body, dict) else None
    known = isinstance(results, list) and all(isinstance(r, dict) and {"task", "candidate"} <= set(r) for r in results)
    if not isinstance(results, list) or not known:
        raise InputError(f"{file} holds no results of qtool; choose another --json, or leave out --resume")
    return results


def evaluate_recipe(
    out: Path, source: str, recipe: Recipe, progress: Any = None, *, resume: bool = False, device: str = "cpu"
) -> Iterator["Evaluation"]:
    """What the recipe's `evaluate` section asks for, against the float model it names, or `source`.

    With `resume`, scores that the artifact records and that would be the same again are taken over.
    """
    from qtool.artifact import report
    from qtool.checkpoint import locate
    from qtool.ranks import current

    wanted = recipe.evaluate
    options = {**wanted.model_dump(exclude={"task", "data", "baseline"}), "device": device}
    baseline = wanted.baseline or locate(source, recipe.model.revision)
    recorded = report(out).get("scores", []) if resume and current().first else []
    known = current().told("recorded scores", recorded)
    places = wanted.data if isinstance(wanted.data, str | None) else dict(wanted.data)
    yield from evaluations(
        out, wanted.tasks, places, baseline=baseline, known=known, progress=progress, threads=recipe.threads, **options
    )


def record_scores(out: Path, results: Sequence["Evaluation"]) -> None:
    """Keep the scores of `qtool run` in the artifact's report and on its card."""
    from qtool import card
    from qtool.artifact import REPORT, report, write_json
    from qtool.ranks import current

    if not current().first:
        return
    write_json(out / REPORT, {**report(out), "scores": [result.to_json() for result in results]}, sort=False)
    card.write(out)
