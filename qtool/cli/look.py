"""The commands that look around: `inspect`, `methods`, `schema`, `doctor`, `demo`."""

from pathlib import Path
from typing import Any

import click

from qtool.cli.options import json_option, screen_of, verbosity
from qtool.cli.together import alone
from qtool.errors import InputError


@click.command()
@click.argument("model")
@click.option("--verify", is_flag=True, help="Check SHA-256 of every file, digests of tensors, and the golden batch.")
@click.option("--prove-integer", is_flag=True, help="Run it with every operation watched; a float ends with exit 3.")
@json_option
@verbosity
@click.pass_context
def inspect(context: click.Context, /, model: str, **params: Any) -> None:
    """Show what is inside an artifact: bits, error of the weights, bytes; with --verify that it is intact."""
    from qtool import console
    from qtool.inspection import inspect as look

    with screen_of(context) as screen:
        found = look(model, verify=params["verify"], prove_integer=params["prove_integer"])
        if params["json_file"] != "-":
            console.render_inspection(screen, found)
        console.emit_json(found, params["json_file"])
        if found["damage"]:
            raise InputError(f"{model} is damaged: {'; '.join(found['damage'])}")


@click.command()
@json_option
@click.pass_context
def methods(context: click.Context, json_file: str | None) -> None:
    """List the methods, presets and tasks."""
    from qtool import console
    from qtool.evaluation import tasks
    from qtool.methods import known, plugged
    from qtool.recipe import presets

    entries, broken = known(), [*plugged().broken, *tasks.plugged().broken]
    from_others = {name: plugin.origin for name, plugin in tasks.plugged().good.items()}
    if json_file:
        listed = {
            name: {"summary": e.summary, "preset": e.preset, "execution": e.execution, "origin": e.origin}
            for name, e in entries.items()
        }
        body = {"schema_version": 1, "methods": listed, "presets": list(presets())}
        body["tasks"] = {
            name: {"summary": task.description, "metrics": task.metrics, "origin": from_others.get(name, "qtool")}
            for name, task in tasks.tasks().items()
        }
        console.emit_json({**body, "broken": [vars(plugin) for plugin in broken]}, json_file)
    if json_file != "-":
        with screen_of(context) as screen:
            rows = [[name, e.preset_name, e.execution, e.origin, e.summary] for name, e in entries.items()]
            rows += [[plugin.name, "-", "broken", plugin.origin, plugin.why] for plugin in plugged().broken]
            screen.table("Methods", ["method", "default preset", "execution", "from", "what it does"], rows)
            screen.line(f"Presets for -c: {', '.join(presets())}")
            screen.line("")
            rows = [
                [name, ", ".join(task.metrics), from_others.get(name, "qtool"), task.description]
                for name, task in tasks.tasks().items()
            ]
            rows += [[plugin.name, "broken", plugin.origin, plugin.why] for plugin in tasks.plugged().broken]
            screen.table("Tasks", ["task", "scores", "from", "what it asks"], rows)


@click.command()
@click.option("-o", "--output", metavar="FILE", default="-", help="Where it goes [stdout].")
def schema(output: str) -> None:
    """Print the JSON Schema of a recipe, with the options of all methods that are installed."""
    from qtool import console
    from qtool.methods import known, method_class
    from qtool.recipe.schema import recipe_schema

    described = {name: (entry.summary, method_class(name).options_class) for name, entry in known().items()}
    console.emit_json(recipe_schema(described), output)


@click.command()
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


@click.command()
@click.option("-o", "--output", metavar="DIR", default="qtool-demo", show_default=True, help="Where the models go.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of torch [its own choice].")
@json_option
@verbosity
@click.pass_context
def demo(context: click.Context, /, output: str, threads: int | None, json_file: str | None, **params: Any) -> None:
    """Quantize a real sentiment model with every method and compare them with float, in under three minutes."""
    alone("demo")
    from qtool import console
    from qtool.demo.show import show

    console.check_json_target(json_file)
    with screen_of(context) as screen:
        table = show(Path(output), threads, screen)
        if json_file != "-":
            table.render(screen)
        console.emit_json(table.to_json(), json_file)
