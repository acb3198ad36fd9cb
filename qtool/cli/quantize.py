"""`qtool quantize` and `qtool calibrate`."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli.options import (
    device_option,
    drain,
    json_option,
    model_of,
    recipe_of,
    recipe_options,
    run_options,
    screen_of,
    verbosity,
)
from qtool.cli.together import jobs_option

if TYPE_CHECKING:
    from qtool.calibrate.sources import Batches
    from qtool.estimate import Estimate
    from qtool.pipeline import Job
    from qtool.recipe import Recipe


@click.command()
@click.argument("model", required=False)
@recipe_options
@click.option("-o", "--output", metavar="DIR", help="Where the model goes [qtool-out/<model>-<method>].")
@click.option("--statistics", metavar="FILE", help="Statistics from `qtool calibrate` instead of a pass over the data.")
@device_option
@jobs_option
@run_options
@click.option(
    "--dry-run", is_flag=True, help="Say what would become of the model, in what time and memory; write nothing."
)
@json_option
@verbosity
@click.pass_context
def quantize(context: click.Context, /, model: str | None, **params: Any) -> None:
    """Quantize MODEL (a folder or a hub name): calibrate, lower, check against a golden batch, put in place.

    \b
    qtool quantize M/minilm-sst2 --method zeroquant --task sst2 --data DATA/sst2 -o out
    """
    started = time.perf_counter()
    from qtool import api, console

    console.check_json_target(params["json_file"])
    recipe = recipe_of(context, model)
    name = model_of(model, recipe)
    out = Path(params["output"] or recipe.output or api.default_output(name, recipe))
    with screen_of(context) as screen:
        if params["dry_run"]:
            calibrates = not params["statistics"]
            job, batches, expected = _rehearse(name, recipe, started, calibrates=calibrates, device=params["device"])
            if params["json_file"] != "-":
                console.render_plan(screen, job, batches, expected)
            console.emit_json(console.plan_json(job, batches, expected), params["json_file"])
            return
        choices = {key: params[key] for key in ("resume", "overwrite", "statistics", "device")}
        result = drain(screen, api.quantize_events(name, recipe, out, **choices))
        if params["json_file"] != "-":
            console.render_quantized(screen, result)
        console.emit_json(console.quantized_json(result), params["json_file"])


def _rehearse(
    name: str, recipe: "Recipe", started: float, *, calibrates: bool, device: str
) -> "tuple[Job, Batches, Estimate]":
    """The job, its calibration data, and what it will take; `started` is when the command began."""
    from qtool import api
    from qtool.estimate import estimate

    api.set_threads(recipe)
    job = api.open_job(name, recipe, device)
    startup = time.perf_counter() - started
    batches, budget = api.divided_batches(job, calibrates=calibrates)
    reading = time.perf_counter() - started - startup
    times = {"startup": startup, "reading": reading}
    return job, batches, estimate(job, batches, **times, calibrates=calibrates, spill=budget.spill)


@click.command()
@click.argument("model", required=False)
@recipe_options
@click.option("-o", "--output", required=True, metavar="FILE", help="Statistics file to write.")
@device_option
@jobs_option
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@verbosity
@click.pass_context
def calibrate(context: click.Context, /, model: str | None, **params: Any) -> None:
    """Collect statistics of MODEL alone, for `quantize --statistics`."""
    from qtool import api

    recipe = recipe_of(context, model)
    with screen_of(context) as screen:
        choices = {key: params[key] for key in ("overwrite", "device")}
        events = api.calibrate_events(model_of(model, recipe), recipe, Path(params["output"]), **choices)
        count = drain(screen, events)
        screen.line(f"{params['output']}: statistics of {count} activations")
