"""The commands that look around: `inspect`, `methods`, `doctor`, `demo`."""

from pathlib import Path
from typing import Any

import click

from qtool.cli.options import json_option, screen_of, verbosity
from qtool.errors import InputError


@click.command()
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


@click.command()
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
    from qtool import console
    from qtool.demo.show import show

    console.check_json_target(json_file)
    with screen_of(context) as screen:
        table = show(Path(output), threads, screen)
        if json_file != "-":
            table.render(screen)
        console.emit_json(table.to_json(), json_file)
