"""Options that several commands share, and what a command does with them: its recipe, its screen."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from qtool.cli.together import quiet
from qtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qtool.console import Screen
    from qtool.recipe import Recipe


Command = Callable[..., Any]


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
max_memory_option = click.option(
    "--max-memory", metavar="SIZE", help="Memory beside imports and mapped files that the run may take: 3GB, 512MiB."
)
device_option = click.option(
    "--device", metavar="DEVICE", default="cpu", show_default=True, help="Where models compute: cpu, cuda or cuda:N."
)
recipe_options = options(
    click.option("--method", "methods", multiple=True, metavar="NAME", help="Method; `qtool methods` lists them."),
    click.option("-c", "--config", metavar="RECIPE", help="Recipe file, or the name of a preset."),
    click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."),
    click.option("--task", metavar="NAME", help="Task whose training split calibrates; `qtool methods` lists them."),
    click.option("--data", metavar="PATH", help="Folder with train/validation files, a file, or org/name:config."),
    click.option("--text-column", "text_columns", multiple=True, metavar="NAME", help="Text column; twice for pairs."),
    click.option("--num-samples", type=click.IntRange(1), help="Calibration sentences [256]."),
    click.option("--max-length", type=click.IntRange(1), help="Tokens to which texts are cut [128]."),
    click.option("--batch-size", type=click.IntRange(1), help="Sequences in a batch [32]."),
    click.option("--revision", help="Branch, tag or commit of a model on the hub."),
    click.option("--seed", type=click.IntRange(0), help="Seed of everything random [0]."),
    click.option("--threads", type=click.IntRange(1, 1024), help="Threads of torch [its own choice]."),
    max_memory_option,
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

    screen = Screen(-1 if quiet(context.params) else int(bool(context.params.get("verbose"))))
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


def model_of(model: str | None, recipe: "Recipe") -> str:
    """The model that a command is about. Raises UsageError when nobody names one."""
    name = model or recipe.model.name
    if name is None:
        raise UsageError("which model? Pass a folder or a hub name, or set model.name in the recipe")
    return name
