"""`qtool bench`."""

import math
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli.evaluate import places_of
from qtool.cli.options import drain, json_option, screen_of, verbosity
from qtool.cli.together import alone
from qtool.errors import InterruptedRun, QtoolError, UnavailableError, UsageError

if TYPE_CHECKING:
    from qtool.bench.report import Report
    from qtool.console import Screen


@click.command("bench")
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option(
    "--shapes",
    metavar="LIST",
    help="BATCHxTOKENS of random ids, TASK:BATCH of real texts, BATCH@CONTEXT of a token behind a cache "
    "[1x32,1x128,8x128,1x384].",
)
@click.option("--engines", metavar="LIST", help="What runs float models [torch and the peers that are installed].")
@click.option("--task", metavar="NAME", help="Also the texts of a task, 32 at a time: the shape NAME:32.")
@click.option("--data", "places", multiple=True, metavar="PATH", help="Data of the shapes with a task; TASK=PATH too.")
@click.option("--limit", type=click.IntRange(1), help="Only the first N texts of a task.")
@click.option("--max-length", type=click.IntRange(1), default=128, show_default=True, help="Tokens of a text.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns of each engine and shape.")
@click.option(
    "--seconds", type=click.FloatRange(0, 3600), default=0.5, show_default=True, help="Least length of a turn."
)
@click.option("--device", metavar="NAME", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--cold-l2", is_flag=True, help="Empty the L2 cache of the GPU before each timed call.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of every engine [torch's own choice].")
@click.option("--random-init", metavar="DIR", help="A model of random weights by the config.json in DIR.")
@click.option("--method", "methods", multiple=True, metavar="NAME", help="Quantize the random model with it, too.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a key of these methods' recipes.")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of random ids and weights."
)
@json_option
@verbosity
@click.pass_context
def bench(context: click.Context, /, models: tuple[str, ...], **params: Any) -> None:
    """Measure MODELs side by side: latency, throughput, size and memory, and whether they compute the same.

    Float models run on every engine, artifacts of qtool on its own. Each engine has a process of its own, and they
    take turns, so that all of them see the same machine.

    \b
    qtool bench model out --shapes 1x128,8x128
    qtool bench model out --shapes sst2:32 --data DATA/sst2 --engines torch,onnxruntime
    qtool bench --random-init CONFIG --method ibert --method zeroquant
    qtool bench model out --device cuda --shapes 1x128,32x128
    """
    alone("bench")
    from qtool import console

    console.check_json_target(params["json_file"])
    _check_random(models, params)
    with screen_of(context) as screen, tempfile.TemporaryDirectory(prefix="qtool-bench-") as scratch:
        try:
            report = _measured(screen, models, params, Path(scratch))
        except (KeyboardInterrupt, InterruptedRun) as error:
            code = error.exit_code if isinstance(error, InterruptedRun) else 128 + signal.SIGINT
            raise InterruptedRun("interrupted; a benchmark keeps nothing, start it again", code - 128) from None
        screen.close()
        console.emit_json(report.to_json(), params["json_file"])
        if params["json_file"] != "-":
            _render(screen, report)
    _conclude(report, params["engines"] is not None)


def _check_random(models: tuple[str, ...], params: dict[str, Any]) -> None:
    if params["random_init"] is None and (params["methods"] or params["sets"]):
        raise UsageError("--method and --set are for --random-init; quantize a model first with qtool quantize")
    if params["random_init"] is None and not models:
        raise UsageError("which models? Pass folders or hub names, or --random-init with a folder that holds a config")
    if math.isnan(params["seconds"]):
        raise UsageError("--seconds is not a number")
    if params["cold_l2"] and params["device"] == "cpu":
        raise UsageError("--cold-l2 is for a GPU; add --device cuda")


def _measured(screen: "Screen", models: tuple[str, ...], params: dict[str, Any], scratch: Path) -> "Report":
    from qtool import api
    from qtool.bench import machine
    from qtool.bench import shapes as forms
    from qtool.bench.engines import chosen as chosen_engines
    from qtool.device import usable

    load = machine.load_average()
    shapes = forms.DEFAULT if params["shapes"] is None else params["shapes"]
    shapes += f",{params['task']}:32" if params["task"] else ""
    tasks = [shape.task for shape in forms.parse(shapes) if isinstance(shape, forms.Ragged)]
    if params["places"] and not tasks:
        raise UsageError("--data is for the texts of a task; name one with --task, or a shape such as sst2:32")
    engines = None if params["engines"] is None else [name.strip() for name in params["engines"].split(",")]
    chosen_engines(engines, usable(params["device"]).type)  # what is not here is said before models are made
    made: list[Path] = []
    if params["random_init"] is not None:
        chosen = {name: params[name] for name in ("methods", "sets", "seed", "threads")}
        made = drain(screen, api.random_models(params["random_init"], scratch, **chosen))
    passed = {name: params[name] for name in ("rounds", "seconds", "threads", "seed", "limit", "max_length")}
    passed |= {name: params[name] for name in ("device", "cold_l2")}
    return api.bench(
        [*models, *made],
        shapes=shapes,
        engines=engines,
        data=places_of(params["places"], tasks),
        load=load,
        listener=screen,
        **passed,
    )


def _render(screen: "Screen", report: "Report") -> None:
    for line in report.header():
        screen.line(line)
    for table in report.tables():
        screen.line("")
        screen.table(*table)


def _conclude(report: "Report", named: bool) -> None:
    """Raises what failed where it was asked for: an engine by name, an artifact, or everything."""
    failed = [outcome for outcome in report.shown if outcome.error is not None]
    asked = [outcome for outcome in failed if named or outcome.entry.methods or len(failed) == len(report.shown)]
    if asked:
        lines = "; ".join(f"{outcome.entry.label}: {outcome.error}" for outcome in asked)
        raise _error_of(max(outcome.exit_code for outcome in asked))(lines)


def _error_of(code: int) -> type[QtoolError]:
    return next((kind for kind in QtoolError.__subclasses__() if kind.exit_code == code), UnavailableError)
