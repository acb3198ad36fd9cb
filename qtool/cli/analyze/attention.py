"""`qtool analyze attention`: what a model's attention tolerates."""

from typing import TYPE_CHECKING, Any

import click

from qtool.cli.options import device_option, json_option, screen_of, verbosity
from qtool.cli.together import jobs_option
from qtool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from qtool.console import Screen


@click.command("attention")
@click.argument("model")
@click.option("--task", required=True, metavar="NAME", help="Task whose score is measured; `qtool methods` lists them.")
@click.option("--data", metavar="PATH", help="Folder with train/validation files, a file, or org/name:config.")
@click.option("-o", "--output", required=True, metavar="DIR", help="Where attention.json and attention.html go.")
@click.option("--thresholds", metavar="LIST", help="Where sparsity is told and pruning is tried [0.0001 … 0.1].")
@click.option("--bits", metavar="LIST", help="Widths of codes, log and linear, pruned and not [2,3,4,5,6,7,8].")
@click.option("--bits-thresholds", metavar="LIST", help="Where pruned codes begin [0.001].")
@click.option("--no-sweep", is_flag=True, help="Look at the probabilities only; no scores.")
@click.option(
    "--artifact", "artifacts", multiple=True, metavar="DIR",
    help="An artifact of MODEL, such as logattn's, beside the plain forms; several times too.",
)  # fmt: skip
@click.option("--png", is_flag=True, help="Also every figure as a PNG file (pip install 'qtool[report]').")
@click.option("--limit", type=click.IntRange(1), help="Only the first N examples; windows for perplexity.")
@click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), help="Part of the data to score [the task's own]."
)
@click.option("--text-column", "text_columns", multiple=True, metavar="NAME", help="Text column; twice for pairs.")
@click.option("--label-column", metavar="NAME", help="Column with labels, tags, numbers or answers.")
@click.option("--batch-size", type=click.IntRange(1), help="Sequences in a batch [32, fewer long ones].")
@click.option("--max-length", "--window", "max_length", type=click.IntRange(1), help="Tokens of a text or window.")
@click.option("--stride", type=click.IntRange(1), help="Perplexity: tokens by which the window moves [its length].")
@click.option("--doc-stride", type=click.IntRange(0), help="squad: tokens that windows of a context share; 0 cuts it.")
@click.option("--allow-weak-baseline", is_flag=True, help="Go on with a model that is no better than guessing.")
@click.option("--revision", help="Branch, tag or commit of MODEL on the hub.")
@click.option("--threads", type=click.IntRange(1, 1024), help="Threads of torch [its own choice].")
@device_option
@jobs_option
@click.option("--resume", is_flag=True, help="Go on: what DIR has is not measured again.")
@click.option("--overwrite", is_flag=True, help="Start again in a DIR that holds a study.")
@json_option
@verbosity
@click.pass_context
def attention(context: click.Context, /, model: str, **params: Any) -> None:
    """Study the attention probabilities of MODEL: how they are distributed in each head, how many are next to nothing,
    and what the score does when they are pruned or cut into codes of a few bits.

    DIR gets attention.json and attention.html, one page to look at. Both grow with every point that is finished.

    \b
    qtool analyze attention model --task sst2 --data DATA/sst2 -o study
    qtool analyze attention model --task squad --limit 100 --thresholds 1e-3,1e-2 --bits 2,3,4 -o study --resume
    """
    from qtool import api, console

    console.check_json_target(params["json_file"])
    exam = ("data", "split", "limit", "label_column", "batch_size", "max_length", "stride", "doc_stride")
    request = api.AttentionRequest(
        thresholds=_numbers(params["thresholds"], float, "--thresholds"),
        bits=_numbers(params["bits"], int, "--bits"),
        bits_thresholds=_numbers(params["bits_thresholds"], float, "--bits-thresholds"),
        sweep=not params["no_sweep"],
        artifacts=params["artifacts"],
        exam={**{name: params[name] for name in exam}, "text_columns": list(params["text_columns"]) or None},
        revision=params["revision"],
        threads=params["threads"],
        device=params["device"],
        allow_weak_baseline=params["allow_weak_baseline"],
    )
    with screen_of(context) as screen:
        choices = {name: params[name] for name in ("resume", "overwrite", "png")}
        found = api.analyze_attention(
            model, params["task"], params["output"], request, progress=_progress(screen), **choices
        )
        screen.close()
        if params["json_file"] != "-":
            _render_attention(screen, found, params["output"])
        console.emit_json(found, params["json_file"])


def _numbers(text: str | None, kind: "Callable[[str], Any]", flag: str) -> tuple[Any, ...] | None:
    """`1e-3,1e-2`. Raises UsageError for anything else."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{flag} is a list such as {'2,3,4' if kind is int else '1e-3,1e-2'}, not {text!r}") from None


def _progress(screen: "Screen") -> "Callable[[str, int, int], None]":
    return lambda stage, done, total: screen.step(stage, "", done, total)


def _render_attention(screen: "Screen", found: "Mapping[str, Any]", out: str) -> None:
    """The finding, the table of scores, where the page is."""
    from qtool.analysis.attention_page import page_of

    page = page_of(found)
    for paragraph in page.finding:
        screen.line(paragraph)
    for section in page.sections:
        for table in section.tables if section.kicker.startswith(("Pruning", "Bits")) else ():
            screen.line("")
            screen.table(table.title, table.columns, table.rows)
    screen.line("")
    screen.line(f"{out}/attention.html shows it, {out}/attention.json has the numbers")
