"""`qtool analyze heads`: which attention heads a model can do without."""

import re
from typing import TYPE_CHECKING, Any

import click

from qtool.cli.options import device_option, json_option, screen_of, verbosity
from qtool.cli.together import jobs_option
from qtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qtool.console import Screen


@click.command("heads")
@click.argument("model")
@click.option("--task", required=True, metavar="NAME", help="Task whose score heads are judged by.")
@click.option("--data", metavar="PATH", help="Folder with train/validation files, a file, or org/name:config.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where heads.json goes, and what is measured.")
@click.option(
    "--metric", type=click.Choice(["score", "agreement", "kl"]), default="score", show_default=True,
    help="What must stay: the score (labels), or equal answers or distributions of the whole model (no labels).",
)  # fmt: skip
@click.option(
    "--max-drop", type=click.FloatRange(0), help="Loss that is allowed [0.5 points, 2 % of answers, 0.02 nats]."
)
@click.option(
    "--search", type=click.Choice(["astar", "greedy", "gradient"]), default="astar", show_default=True,
    help="A* over sets, or one walk by the loss of each head alone or by its gradient.",
)  # fmt: skip
@click.option("--branching", type=click.IntRange(1), default=8, show_default=True, help="A*: heads tried from a set.")
@click.option(
    "--max-evaluations", type=click.IntRange(1), help="Sets that are measured at most [enough to remove every head]."
)
@click.option("--max-seconds", type=click.FloatRange(0), help="Stop after this time, whatever was found.")
@click.option("--target", type=click.IntRange(1), help="Stop when this many heads can go.")
@click.option("--keep", "kept", multiple=True, metavar="LAYER.HEAD", help="A head that stays, or LAYER for all of it.")
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True, help="Examples of the search.")
@click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), help="What is searched on [the training split]."
)
@click.option("--text-column", "text_columns", multiple=True, metavar="NAME", help="Text column; twice for pairs.")
@click.option("--label-column", metavar="NAME", help="Column with labels, tags, numbers or answers.")
@click.option("--batch-size", type=click.IntRange(1), help="Sequences in a batch [32, fewer long ones].")
@click.option("--max-length", type=click.IntRange(1), help="Tokens to which texts are cut [as qtool eval].")
@click.option("--revision", help="Branch, tag or commit of MODEL on the hub.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of torch [its own choice].")
@device_option
@jobs_option
@click.option("--resume", is_flag=True, help="Go on: sets that DIR knows are not measured again.")
@click.option("--overwrite", is_flag=True, help="Start again in a DIR that holds a search.")
@json_option
@verbosity
@click.pass_context
def heads(context: click.Context, /, model: str, **params: Any) -> None:
    """Find attention heads that MODEL can do without; `--method headprune` then removes them.

    The search reads one part of the data (--limit examples of the training split, or half of what there is); what is
    found is told on another that it never saw.

    \b
    qtool analyze heads model --task sst2 --data DATA/sst2 -o heads
    qtool quantize model --method headprune --method zeroquant --set methods.headprune.file=heads/heads.json
    """
    from qtool import api, console

    console.check_json_target(params["json_file"])
    request = _request(params)
    with screen_of(context) as screen:
        choices = {key: params[key] for key in ("resume", "overwrite")}
        found = api.analyze_heads(
            model,
            params["task"],
            params["output"],
            request,
            progress=lambda stage, done, total: screen.step(stage, "", done, total),
            **choices,
        )
        screen.close()
        if params["json_file"] != "-":
            _render(screen, found, params["output"])
        console.emit_json(found, params["json_file"])


def _request(params: "Mapping[str, Any]") -> Any:
    from qtool.api import HeadsRequest

    names = (
        "metric", "max_drop", "search", "branching", "max_evaluations", "max_seconds", "target", "data", "limit",
        "split", "text_columns", "label_column", "batch_size", "max_length", "revision", "threads", "device",
    )  # fmt: skip
    protected = [_place(text) for text in params["kept"]]
    return HeadsRequest(**{name: params[name] for name in names}, protected=protected)


def _place(text: str) -> tuple[int, int | None]:
    """`LAYER.HEAD`, or `LAYER` for all heads of it (None)."""
    found = re.fullmatch(r"(\d+)(?:\.(\d+))?", text)
    if found is None:
        raise UsageError(f"--keep takes LAYER.HEAD or LAYER, such as 0.3 or 5, not {text!r}")
    return int(found[1]), None if found[2] is None else int(found[2])


def _render(screen: "Screen", found: "Mapping[str, Any]", output: str) -> None:
    """The heads by layer, both parts of the data, and what may be said of it."""
    rows = [
        [layer, f"{len(found['heads'].get(layer, []))} of {count}", ", ".join(map(str, found["heads"].get(layer, [])))]
        for layer, count in ((str(layer), count) for layer, count in enumerate(found["layers"]))
    ]
    total, parameters = sum(found["layers"]), found["parameters"]
    screen.table(f"{found['removed']} of {total} heads can go", ["layer", "removed", "heads"], rows)
    parts = (("searched on", found["search_set"]), ("held out", found["held_out"]))
    columns = ["", "score", "whole", "pruned", "drop", "95 % interval", "agreement %", "KL", "n"]
    screen.table("Scores", columns, [[name, *_scores(part)] for name, part in parts])
    share = 100 * parameters["pruned"] / parameters["whole"]
    screen.line(f"{parameters['pruned']:,} of {parameters['whole']:,} weights stay ({share:.1f} %)")
    screen.line(
        f"{found['search']}: {found['evaluations']} sets measured, until {found['ended']}; {found['metric']} "
        f"{found['base']:.4g} → {found['value']:.4g}, at least {found['floor']:.4g} was asked for"
    )
    for note in (found["guarantee"], *found["notes"]):
        screen.line(note)
    screen.line(f"{output}/heads.json: use it with --set methods.headprune.file={output}/heads.json")


def _scores(part: "Mapping[str, Any]") -> "Sequence[str]":
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    low, high = part["interval"]["low"], part["interval"]["high"]
    between = "-" if low is None else f"[{low:+.2f}, {high:+.2f}]"
    numbers = [shown(part[key], form) for key, form in (("whole", ".2f"), ("pruned", ".2f"), ("drop", "+.2f"))]
    others = [shown(part[key], form) for key, form in (("agreement", ".2f"), ("kl", ".3g"))]
    return [part["score"], *numbers, between, *others, f"{part['n']} {part['unit']}"]
