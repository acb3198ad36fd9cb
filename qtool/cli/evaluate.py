"""`qtool eval` and `qtool run`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli.options import (
    device_option,
    drain,
    json_option,
    max_memory_option,
    model_of,
    run_options,
    screen_of,
    verbosity,
)
from qtool.cli.together import jobs_option
from qtool.errors import GateError, InputError, UsageError

if TYPE_CHECKING:
    from qtool.console import Screen
    from qtool.evaluation.gate import Gate
    from qtool.evaluation.result import Evaluation
    from qtool.recipe import Recipe

_PASSED_ON = (
    "split", "label_column", "limit", "batch_size", "max_length", "stride", "doc_stride", "n_best", "dtype", "revision",
    "threads", "device", "allow_weak_baseline",
)  # fmt: skip


@click.command("eval")
@click.argument("model", required=False)
@click.option("--task", "tasks", required=True, multiple=True, metavar="NAME", help="Task to score; several times too.")
@click.option(
    "--data",
    "places",
    multiple=True,
    metavar="PATH",
    help="Folder with train/validation files, a file, or ORG/NAME[:CONFIG] on the hub; TASK=PATH for one of several.",
)
@click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), help="Part of the data to score [the task's own]."
)
@click.option("--text-column", "text_columns", multiple=True, metavar="NAME", help="Column with text; twice for pairs.")
@click.option("--label-column", metavar="NAME", help="Column with labels, tags, numbers or answers.")
@click.option("--baseline", metavar="MODEL", help="Float model to compare with [the source recorded in the artifact].")
@click.option("--max-drop", type=click.FloatRange(0, 100), help="Gate: fail if the score drops by more points.")
@click.option("--min-score", type=click.FloatRange(0, 100), help="Gate: fail below this score.")
@click.option(
    "--min-agreement", type=click.FloatRange(0, 100), help="Gate: fail if fewer percent of predictions agree."
)
@click.option("--max-kl", type=click.FloatRange(0), help="Gate: fail if the mean KL divergence has more nats.")
@click.option("--allow-weak-baseline", is_flag=True, help="Go on with a baseline that is no better than guessing.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N examples; windows for perplexity.")
@click.option("--batch-size", type=click.IntRange(1), help="Sequences in a batch [32, fewer long ones].")
@click.option(
    "--max-length",
    "--window",
    "max_length",
    type=click.IntRange(1),
    help="Tokens of a text or window [128; squad 384; perplexity 1024].",
)
@click.option("--stride", type=click.IntRange(1), help="Perplexity: tokens by which the window moves [its length].")
@click.option(
    "--doc-stride", type=click.IntRange(0), help="squad: tokens that windows of a long context share; 0 cuts it [128]."
)
@click.option("--n-best", type=click.IntRange(1), help="squad: answers a question in the predictions [1].")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Type of float weights and results; integer codes stay.",
)
@click.option("--revision", help="Branch, tag or commit of MODEL on the hub.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of torch [its own choice].")
@device_option
@jobs_option
@click.option(
    "--predictions",
    metavar="FILE",
    help="Write every prediction to a .jsonl or .csv file; FILE-TASK of several tasks.",
)
@click.option("--resume", is_flag=True, help="Keep the results in the --json FILE that would be the same again.")
@json_option
@verbosity
@click.pass_context
def evaluate(context: click.Context, /, model: str | None, **params: Any) -> None:
    """Score MODEL (default: the newest artifact) and compare it with its float baseline on the same batches.

    \b
    qtool eval out --task sst2 --data DATA/sst2 --max-drop 0.5
    qtool eval out --task sst2 --task rte --json scores.json
    """
    from qtool import api, console
    from qtool.device import usable
    from qtool.evaluation.tasks import task

    usable(params["device"])
    gate = _gate_of(params)
    target_file, several = params["json_file"], len(params["tasks"]) > 1
    console.check_json_target(target_file)
    tasks = _distinct_tasks(params["tasks"])
    files = _prediction_files(params["predictions"], tasks)
    if params["resume"] and target_file in (None, "-"):
        raise UsageError("--resume keeps the results in a file; name it with --json FILE")
    gate.check([task(name) for name in tasks])
    with screen_of(context) as screen:
        target = model if model is not None else str(api.latest())
        screen.note(f"model: {target}")
        baseline = params["baseline"]
        if baseline is None:
            metrics = [task(name).metric for name in tasks]
            baseline, missing = api.baseline_for(target, required=any(map(gate.needs_baseline, metrics)))
            if missing:
                screen.note(missing)
        known = _known_results(target_file, files) if params["resume"] else []
        results: list[Evaluation] = []
        shown: list[tuple[str, Evaluation]] = []
        with _shown_if_interrupted(screen, shown):
            for result in api.evaluations(
                target,
                tasks,
                places_of(params["places"], tasks),
                baseline=baseline,
                known=known,
                marked=target_file not in (None, "-"),
                progress=_progress(screen),
                text_columns=list(params["text_columns"]) or None,
                **{name: params[name] for name in _PASSED_ON},
            ):
                results.append(result)
                shown.append(("", result))
                screen.close()
                _write_predictions(result, files.get(result.task))
                if several and target_file not in (None, "-"):
                    console.emit_json(_several(results, complete=len(results) == len(tasks)), target_file)
        failures = _failures(gate, results)
        verdict = {"gate": gate_json(gate, failures)}
        body = {**_several(results), **verdict} if several else {**results[0].to_json(), **verdict}
        console.emit_json(body, target_file)
        conclude(screen, shown, failures, target_file)


def _known_results(target: str | None, files: dict[str, Path]) -> list[dict[str, Any]]:
    """What an earlier run left in its JSON file, as far as it wrote the predictions that are wanted."""
    from qtool import api
    from qtool.ranks import current

    if not current().first:
        return list(current().told("earlier results", None))
    known = api.kept_results(target)
    if files:  # predictions are not among what was kept
        known = [body for body in known if body["task"] in files and files[body["task"]].is_file()]
    return list(current().told("earlier results", known))


def _gate_of(params: dict[str, Any]) -> "Gate":
    from qtool.evaluation.gate import Gate

    limits = [params[name] for name in ("max_drop", "min_score", "min_agreement", "max_kl")]
    if wrong := [limit for limit in limits if limit is not None and not math.isfinite(limit)]:
        raise UsageError(f"a gate's limit is a number, not {wrong[0]}")
    return Gate(*limits)


def _distinct_tasks(names: tuple[str, ...]) -> list[str]:
    """Their names as the table has them. Raises UsageError for an unknown one, or one that is named twice."""
    from qtool.evaluation.tasks import task

    tasks = [task(name).name for name in names]
    if len(set(tasks)) < len(tasks):
        raise UsageError(f"a task is named twice: {', '.join(tasks)}")
    return tasks


def places_of(given: tuple[str, ...], tasks: list[str]) -> dict[str, str]:
    """Where the data of each task are: `PATH` for all, `TASK=PATH` for one. Raises UsageError."""
    from qtool.evaluation.tasks import TASKS, canonical

    parted = [text.partition("=") for text in given]
    split = [(canonical(name) if equals else name, equals, path) for name, equals, path in parted]
    keyed = [(name, path) for name, equals, path in split if equals and name in {*TASKS, *tasks}]
    plain = [text for text, (name, _, _) in zip(given, split, strict=True) if name not in dict(keyed)]
    names = [name for name, _ in keyed]
    if foreign := [name for name in names if name not in tasks]:
        raise UsageError(f"--data {foreign[0]}=…: '{foreign[0]}' is not among the tasks ({', '.join(tasks)})")
    if len(plain) > 1 or len(set(names)) < len(names):
        raise UsageError("--data is one PATH for all tasks, and one TASK=PATH for single ones")
    if not all(path.strip() for path in (*plain, *dict(keyed).values())):
        raise UsageError("--data names no path: it is empty")
    return {**(dict.fromkeys(tasks, plain[0]) if plain else {}), **dict(keyed)}


def _progress(screen: "Screen") -> Any:
    return lambda stage, done, total: screen.step(stage, "", done, total)


def _prediction_files(name: str | None, tasks: list[str]) -> dict[str, Path]:
    """A file a task; refused before any work when it could not be written."""
    from qtool.evaluation.result import check_predictions_path

    if name is None:
        return {}
    path = Path(name)
    files = {task: path if len(tasks) == 1 else path.with_stem(f"{path.stem}-{task}") for task in tasks}
    for file in files.values():
        check_predictions_path(file)
    return files


def _write_predictions(result: "Evaluation", file: Path | None) -> None:
    from qtool.evaluation.result import write_predictions
    from qtool.ranks import current

    if file is not None and result.predictions and current().first:  # none of a kept result: its file is there already
        write_predictions(result, file)


def _several(results: "list[Evaluation]", complete: bool = True) -> dict[str, Any]:
    return {"schema_version": 1, "complete": complete, "results": [result.to_json() for result in results]}


@contextmanager
def _shown_if_interrupted(screen: "Screen", results: "list[tuple[str, Evaluation]]") -> Iterator[None]:
    """What is finished is printed, however the rest ends."""
    from qtool import console

    try:
        yield
    except BaseException:
        screen.close()
        if results:
            console.render_evaluations(screen, results)
        raise


def _failures(gate: "Gate", results: "list[Evaluation]", label: str = "") -> list[str]:
    """The lines of all gates that failed; with several tasks, which one."""
    several = len(results) > 1 or label
    return [
        f"{label}{result.task}: {line}" if several else line for result in results for line in gate.failures(result)
    ]


def gate_json(gate: Any, failures: list[str]) -> dict[str, Any]:
    """Limits, verdict and reasons."""
    return {**vars(gate), "passed": not failures, "failures": failures}


def conclude(
    screen: "Screen", results: "list[tuple[str, Evaluation]]", failures: list[str], json_file: str | None
) -> None:
    """Print the table and raise GateError when a gate failed."""
    from qtool import console

    if json_file != "-":
        console.render_evaluations(screen, results)
    if failures:
        raise GateError("; ".join(failures))


@click.command()
@click.argument("recipe_files", metavar="RECIPE...", nargs=-1, required=True)
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key of every recipe.")
@click.option("-o", "--output", metavar="DIR", help="Where the model goes; for one recipe only.")
@max_memory_option
@device_option
@jobs_option
@run_options
@json_option
@verbosity
@click.pass_context
def run(context: click.Context, /, recipe_files: tuple[str, ...], **params: Any) -> None:
    """Quantize, evaluate and gate from a RECIPE file: the form for CI. Exits with 5 when a gate fails.

    Several files, or a file that holds a list of recipes, run one after the other; with --resume, what is finished
    is kept.
    """
    from qtool import console
    from qtool.device import usable

    target_file = params["json_file"]
    console.check_json_target(target_file)
    usable(params["device"])
    jobs = _jobs(recipe_files, params)
    several = len(jobs) > 1
    bodies: list[dict[str, Any]] = []
    shown: list[tuple[str, Evaluation]] = []
    failures: list[str] = []
    with screen_of(context) as screen:
        with _shown_if_interrupted(screen, shown):
            for label, recipe, out in jobs:
                body, failed = _run_one(screen, recipe, out, params, label if several else "", shown)
                bodies.append({"recipe": label, **body})
                failures += failed
                if several:
                    verdict = {"passed": not failures, "failures": failures}
                    done = {"complete": len(bodies) == len(jobs), "runs": bodies, "gate": verdict}
                    if target_file != "-" or done["complete"]:
                        console.emit_json({"schema_version": 1, **done}, target_file)
        if not several:
            console.emit_json({"schema_version": 1, **bodies[0]}, target_file)
        conclude(screen, shown, failures, target_file)


def _jobs(files: tuple[str, ...], params: dict[str, Any]) -> "list[tuple[str, Recipe, Path]]":
    """A label, a recipe and an output folder each; what is wrong with any recipe is said before the first runs."""
    from qtool import api
    from qtool.evaluation.gate import Gate
    from qtool.evaluation.tasks import task

    jobs = []
    bound = [f"max_memory={params['max_memory']}"] if params["max_memory"] else []
    for label, recipe in api.recipe_list(files, sets=[*params["sets"], *bound]):
        name = model_of(None, recipe)
        if not recipe.evaluate.tasks:
            raise InputError(f"{label}: evaluate.task is missing; name the task to score, or use qtool quantize")
        api.recipe_task(recipe)
        try:
            Gate(**recipe.gate.model_dump()).check([task(name) for name in recipe.evaluate.tasks])
        except UsageError as error:
            raise InputError(f"{label}: gate: {error}") from error
        jobs.append((label, recipe, Path(params["output"] or recipe.output or api.default_output(name, recipe))))
    outs = [out for *_, out in jobs]
    if len(set(outs)) < len(outs):
        twice = next(out for out in outs if outs.count(out) > 1)
        raise InputError(f"several recipes write to {twice}; give each an output of its own")
    return jobs


def _run_one(
    screen: "Screen", recipe: "Recipe", out: Path, params: dict[str, Any], label: str, shown: "list[Any]"
) -> tuple[dict[str, Any], list[str]]:
    """Quantize, evaluate, record. Returns the JSON body and the gates that failed; results are appended to `shown`."""
    from qtool import api, console
    from qtool.evaluation.gate import Gate

    name, gate = model_of(None, recipe), Gate(**recipe.gate.model_dump())
    choices = {key: params[key] for key in ("resume", "overwrite", "device")}
    made = drain(screen, api.quantize_events(name, recipe, out, **choices))
    if params["json_file"] != "-":
        console.render_quantized(screen, made)
    results: list[Evaluation] = []
    again = {key: params[key] for key in ("resume", "device")}
    for result in api.evaluate_recipe(out, name, recipe, _progress(screen), **again):
        results.append(result)
        shown.append((label, result))
        screen.close()
        api.record_scores(out, results)
    failures = _failures(gate, results, f"{label}: " if label else "")
    scored = [result.to_json() for result in results]
    body = {
        "quantize": console.quantized_json(made),
        "evaluate": scored[0] if len(scored) == 1 else scored,
        "gate": gate_json(gate, failures),
    }
    return body, failures
