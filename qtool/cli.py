"""The command line: parses, calls `qtool.api`, prints. Everything heavy is imported inside the commands."""

import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool import __version__
from qtool.errors import GateError, InputError, InterruptedRun, QtoolError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qtool.console import Screen
    from qtool.evaluation.result import Evaluation
    from qtool.recipe import Recipe

CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "token_normalize_func": lambda token: token.replace("_", "-"),
}
Command = Callable[..., Any]


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="qtool")
def cli() -> None:
    """Post-training quantization of Transformer models: calibrate, quantize, evaluate.

    Exit codes: 0 fine, 1 a bug in qtool, 2 usage, 3 bad input, 4 the environment cannot do it, 5 a quality gate failed,
    130 and 143 interrupted (continue with --resume).
    """


def options(*decorators: Command) -> Command:
    """Several click decorators as one; the first is shown first in the help."""

    def apply(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


verbosity = options(
    click.option("-v", "--verbose", is_flag=True, help="A line for every step, instead of bars."),
    click.option("-q", "--quiet", is_flag=True, help="Only results and errors."),
)
json_option = click.option("--json", "json_file", metavar="FILE", help="Write the result as JSON; - is stdout.")
recipe_options = options(
    click.option("--method", "methods", multiple=True, metavar="NAME", help="Method; `qtool methods` lists them."),
    click.option("-c", "--config", metavar="RECIPE", help="Recipe file, or the name of a preset."),
    click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."),
    click.option("--task", metavar="NAME", help="Task whose training split calibrates (sst2, classification)."),
    click.option("--data", metavar="PATH", help="Folder with train/validation files, or a file, not the hub."),
    click.option("--text-column", "text_columns", multiple=True, metavar="NAME", help="Text column; twice for pairs."),
    click.option("--num-samples", type=click.IntRange(1), help="Calibration sentences [256]."),
    click.option("--max-length", type=click.IntRange(1), help="Tokens to which texts are cut [128]."),
    click.option("--batch-size", type=click.IntRange(1), help="Sequences in a batch [32]."),
    click.option("--revision", help="Branch, tag or commit of a model on the hub."),
    click.option("--seed", type=click.IntRange(0), help="Seed of everything random [0]."),
    click.option("--threads", type=click.IntRange(1, 1024), help="Threads of torch [its own choice]."),
)  # fmt: skip
run_options = options(
    click.option("--resume", is_flag=True, help="Continue an interrupted run; without one, start."),
    click.option("--overwrite", is_flag=True, help="Replace an existing output."),
)


def recipe_of(context: click.Context, model: str | None = None) -> "Recipe":
    """The recipe that a command's options amount to. A flag that was not typed never overrides a recipe."""
    from qtool import api

    params, typed = context.params, click.core.ParameterSource.COMMANDLINE
    flags = {
        name: params[name]
        for name in api.FLAG_KEYS
        if name in params and context.get_parameter_source(name) is typed
    }  # fmt: skip
    config, methods = params.get("config"), params.get("methods", ())
    return api.resolve_recipe(config=config, sets=params["sets"], methods=methods, model=model, flags=flags)


@contextmanager
def screen_of(context: click.Context) -> "Iterator[Screen]":
    """The screen of a command; its bars end with the command, however it ends."""
    from qtool.console import Screen

    screen = Screen(-1 if context.params.get("quiet") else int(bool(context.params.get("verbose"))))
    try:
        yield screen
    finally:
        screen.close()


def drain(screen: "Screen", events: Any) -> Any:
    """Render a generator's events and return its result."""
    from qtool.console import render_event

    while True:
        try:
            render_event(screen, next(events))
        except StopIteration as done:
            screen.close()
            return done.value


def _model_of(model: str | None, recipe: "Recipe") -> str:
    name = model or recipe.model.name
    if name is None:
        raise UsageError("which model? Pass a folder or a hub name, or set model.name in the recipe")
    return name


@cli.command()
@click.argument("model", required=False)
@recipe_options
@click.option("-o", "--output", metavar="DIR", help="Where the model goes [qtool-out/<model>-<method>].")
@click.option("--statistics", metavar="FILE", help="Statistics from `qtool calibrate` instead of a pass over the data.")
@run_options
@click.option("--dry-run", is_flag=True, help="Say what would be quantized and how large it becomes; write nothing.")
@json_option
@verbosity
@click.pass_context
def quantize(context: click.Context, /, model: str | None, **params: Any) -> None:
    """Quantize MODEL (a folder or a hub name): calibrate, lower, check against a golden batch, put in place.

    \b
    qtool quantize M/minilm-sst2 --method zeroquant --task sst2 --data DATA/sst2 -o out
    """
    from qtool import api, console

    console.check_json_target(params["json_file"])
    recipe = recipe_of(context, model)
    name = _model_of(model, recipe)
    out = Path(params["output"] or recipe.output or api.default_output(name, recipe))
    with screen_of(context) as screen:
        if params["dry_run"]:
            job = api.open_job(name, recipe)
            if params["json_file"] != "-":
                console.render_plan(screen, job)
            console.emit_json(console.plan_json(job), params["json_file"])
            return
        choices = {key: params[key] for key in ("resume", "overwrite", "statistics")}
        result = drain(screen, api.quantize_events(name, recipe, out, **choices))
        if params["json_file"] != "-":
            console.render_quantized(screen, result)
        console.emit_json(console.quantized_json(result), params["json_file"])


@cli.command()
@click.argument("model", required=False)
@recipe_options
@click.option("-o", "--output", required=True, metavar="FILE", help="Statistics file to write.")
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@verbosity
@click.pass_context
def calibrate(context: click.Context, /, model: str | None, **params: Any) -> None:
    """Collect statistics of MODEL alone, for `quantize --statistics`."""
    from qtool import api

    recipe = recipe_of(context, model)
    with screen_of(context) as screen:
        events = api.calibrate_events(
            _model_of(model, recipe), recipe, Path(params["output"]), overwrite=params["overwrite"]
        )
        count = drain(screen, events)
        screen.line(f"{params['output']}: statistics of {count} activations")


@cli.command("eval")
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


@cli.command()
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
    name = _model_of(None, recipe)
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


@cli.command()
@click.argument("model")
@click.option("--verify", is_flag=True, help="Check SHA-256 of every file, digests of tensors, and the golden batch.")
@json_option
@verbosity
@click.pass_context
def inspect(context: click.Context, /, model: str, **params: Any) -> None:
    """Show what is inside an artifact: bits, error of the weights, bytes; with --verify that it is intact."""
    from qtool import console
    from qtool.inspection import inspect as look

    with screen_of(context) as screen:
        found = look(model, verify=params["verify"])
        if params["json_file"] != "-":
            console.render_inspection(screen, found)
        console.emit_json(found, params["json_file"])
        if found["damage"]:
            raise InputError(f"{model} is damaged: {'; '.join(found['damage'])}")


@cli.command()
@json_option
@click.pass_context
def methods(context: click.Context, json_file: str | None) -> None:
    """List the methods and presets."""
    from qtool import console
    from qtool.methods import METHODS
    from qtool.recipe import presets

    if json_file:
        known = {
            name: {"summary": e.summary, "preset": e.preset, "execution": e.execution} for name, e in METHODS.items()
        }
        console.emit_json({"schema_version": 1, "methods": known, "presets": list(presets())}, json_file)
    if json_file != "-":
        with screen_of(context) as screen:
            rows = [[name, e.preset, e.execution, e.summary] for name, e in METHODS.items()]
            screen.table("Methods", ["method", "default preset", "execution", "what it does"], rows)
            screen.line(f"Presets for -c: {', '.join(presets())}")


@cli.command()
@json_option
@click.pass_context
def doctor(context: click.Context, json_file: str | None) -> None:
    """Say what this machine and this installation can do."""
    from qtool import console
    from qtool.doctor import diagnose

    found = diagnose()
    console.emit_json({"schema_version": 1, **found}, json_file)
    if json_file != "-":
        with screen_of(context) as screen:
            screen.table("qtool doctor", ["", "found"], [[name, str(value)] for name, value in found.items()])


@cli.command()
@click.option("-o", "--output", metavar="DIR", default="qtool-demo", show_default=True, help="Where the models go.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of torch [its own choice].")
@json_option
@verbosity
@click.pass_context
def demo(context: click.Context, /, output: str, threads: int | None, json_file: str | None, **params: Any) -> None:
    """Quantize a real sentiment model with every method and compare them with float, in under three minutes."""
    from qtool import console
    from qtool.demo.show import show

    console.check_json_target(json_file)
    with screen_of(context) as screen:
        table = show(Path(output), threads, screen)
        if json_file != "-":
            table.render(screen)
        console.emit_json(table.to_json(), json_file)


def _on_sigterm(number: int, frame: Any) -> None:
    raise InterruptedRun("terminated; continue with the same command and --resume", number)


def main() -> None:
    """Run a command and exit with the code that says how it ended."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(_status())


def _status() -> int:
    try:
        cli.main(prog_name="qtool", standalone_mode=False)
    except (QtoolError, InterruptedRun) as error:
        return _fail(str(error), error.exit_code)
    except click.exceptions.Exit as error:
        return int(error.exit_code)
    except click.ClickException as error:
        error.show()
        return UsageError.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted; continue with the same command and --resume", 128 + signal.SIGINT)
    except (BrokenPipeError, SystemExit) as error:  # click and rich exit when the reader of stdout is gone: no verdict
        if isinstance(error, SystemExit) and isinstance(error.code, str):
            return _fail(error.code, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        return 128 + signal.SIGPIPE
    except OSError as error:
        from qtool.errors import environment_problem

        problem = environment_problem(error)
        return _fail(str(problem), problem.exit_code) if problem else _crash()
    except Exception:
        return _crash()
    return 0


def _fail(message: str, code: int) -> int:
    """One line on stderr."""
    print(f"qtool: {' '.join(message.split())}", file=sys.stderr)
    return code


def _crash() -> int:
    import traceback

    traceback.print_exc()
    print(f"qtool {__version__}: this is a bug in qtool; please report it with the lines above", file=sys.stderr)
    return 1
