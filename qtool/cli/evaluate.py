"""`qtool eval` and `qtool run`."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli.options import drain, json_option, model_of, run_options, screen_of, verbosity
from qtool.errors import GateError, InputError, UsageError

if TYPE_CHECKING:
    from qtool.console import Screen
    from qtool.evaluation.result import Evaluation


@click.command("eval")
@click.argument("model", required=False)
@click.option("--task", required=True, metavar="NAME", help="Task to score (sst2, classification).")
@click.option("--data", metavar="PATH", help="Folder with train/validation files, or one file, instead of the hub.")
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="validation",
    show_default=True,
    help="Part of the data to score.",
)
@click.option("--text-column", "text_columns", multiple=True, metavar="NAME", help="Column with text; twice for pairs.")
@click.option("--label-column", metavar="NAME", help="Column with labels.")
@click.option("--baseline", metavar="MODEL", help="Float model to compare with [the source recorded in the artifact].")
@click.option("--max-drop", type=click.FloatRange(0, 100), help="Gate: fail if the score drops by more points.")
@click.option("--min-score", type=click.FloatRange(0, 100), help="Gate: fail below this score.")
@click.option(
    "--min-agreement", type=click.FloatRange(0, 100), help="Gate: fail if fewer percent of predictions agree."
)
@click.option("--allow-weak-baseline", is_flag=True, help="Go on with a baseline that is no better than guessing.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N examples.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Sequences in a batch.")
@click.option(
    "--max-length", type=click.IntRange(1), default=128, show_default=True, help="Tokens to which texts are cut."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Type of float weights and results; integer codes stay.",
)
@click.option("--revision", help="Branch, tag or commit of MODEL on the hub.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of torch [its own choice].")
@click.option("--predictions", metavar="FILE", help="Write every prediction to a .jsonl or .csv file.")
@json_option
@verbosity
@click.pass_context
def evaluate(context: click.Context, /, model: str | None, **params: Any) -> None:
    """Score MODEL (default: the newest artifact) and compare it with its float baseline on the same batches.

    \b
    qtool eval out --task sst2 --data DATA/sst2 --max-drop 0.5
    """
    from qtool import api, console
    from qtool.evaluation import runner, tasks
    from qtool.evaluation.gate import Gate
    from qtool.evaluation.result import check_predictions_path, write_predictions

    limits = [params[name] for name in ("max_drop", "min_score", "min_agreement")]
    if any(limit is not None and math.isnan(limit) for limit in limits):
        raise UsageError("a gate's limit is a number between 0 and 100, not nan")
    gate = Gate(*limits)
    console.check_json_target(params["json_file"])
    if params["predictions"]:
        check_predictions_path(Path(params["predictions"]))
    with screen_of(context) as screen:
        target = model if model is not None else str(api.latest())
        screen.note(f"model: {target}")
        names = (
            "data", "split", "label_column", "limit", "batch_size", "max_length", "dtype", "revision", "threads",
            "allow_weak_baseline",
        )  # fmt: skip
        chosen = tasks.task(params["task"])
        baseline, missing = params["baseline"], None
        if baseline is None:
            baseline, missing = api.baseline_for(target, required=gate.needs_baseline)
        if missing:
            screen.note(missing)
        result = runner.evaluate(
            target,
            chosen,
            baseline=baseline,
            text_columns=list(params["text_columns"]) or None,
            progress=lambda stage, done, total: screen.step(stage, "", done, total),
            **{name: params[name] for name in names},
        )
        screen.close()
        if params["predictions"]:
            write_predictions(result, Path(params["predictions"]))
        failures = gate.failures(result)
        console.emit_json({**result.to_json(), "gate": gate_json(gate, failures)}, params["json_file"])
        conclude(screen, result, failures, params["json_file"])


def gate_json(gate: Any, failures: list[str]) -> dict[str, Any]:
    """Limits, verdict and reasons."""
    return {**vars(gate), "passed": not failures, "failures": failures}


def conclude(screen: "Screen", result: "Evaluation", failures: list[str], json_file: str | None) -> None:
    """Print the table and raise GateError when a gate failed."""
    from qtool import console

    if json_file != "-":
        console.render_evaluation(screen, result)
    if failures:
        raise GateError("; ".join(failures))


@click.command()
@click.argument("recipe_file", metavar="RECIPE")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
@click.option("-o", "--output", metavar="DIR", help="Where the model goes.")
@run_options
@json_option
@verbosity
@click.pass_context
def run(context: click.Context, /, recipe_file: str, **params: Any) -> None:
    """Quantize, evaluate and gate from one RECIPE file: the form for CI. Exits with 5 when a gate fails."""
    from qtool import api, console
    from qtool.evaluation.gate import Gate

    console.check_json_target(params["json_file"])
    recipe = api.resolve_recipe(config=recipe_file, sets=params["sets"])
    name = model_of(None, recipe)
    if recipe.evaluate.task is None:
        raise InputError(f"{recipe_file}: evaluate.task is missing; name the task to score, or use qtool quantize")
    api.recipe_task(recipe)
    out = Path(params["output"] or recipe.output or api.default_output(name, recipe))
    gate = Gate(**recipe.gate.model_dump())
    with screen_of(context) as screen:
        choices = {key: params[key] for key in ("resume", "overwrite")}
        made = drain(screen, api.quantize_events(name, recipe, out, **choices))
        result = api.evaluate_recipe(
            out, name, recipe, progress=lambda stage, done, total: screen.step(stage, "", done, total)
        )
        screen.close()
        failures = gate.failures(result)
        body = {"schema_version": 1, "quantize": console.quantized_json(made), "evaluate": result.to_json()}
        api.record_scores(out, result)
        console.emit_json({**body, "gate": gate_json(gate, failures)}, params["json_file"])
        if params["json_file"] != "-":
            console.render_quantized(screen, made)
        conclude(screen, result, failures, params["json_file"])
