"""One command on several ranks: who speaks, with how many threads, and what `--jobs` does."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import click

from qtool.errors import UsageError


def several() -> bool:
    """Whether somebody started this process as one of many: torchrun and its like, or `--jobs`."""
    size = os.environ.get("WORLD_SIZE", "")
    return size.isdecimal() and int(size) > 1 and "RANK" in os.environ


def speaks() -> bool:
    """Whether errors of this process are for people: others tell theirs to the first rank."""
    return not several() or os.environ["RANK"] == "0"


@contextmanager
def meeting() -> Iterator[None]:
    """The ranks of this command together; only the first one is heard. Help needs nobody else."""
    if not several() or not sys.argv[1:] or {"-h", "--help", "--version"} & {*sys.argv[1:]}:
        yield
        return
    from qtool import ranks

    _set_threads()
    with ranks.joined() as group:
        if group.first:
            yield
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


def _set_threads() -> None:
    """The cores of a host divided among its ranks, unless OMP_NUM_THREADS says something else.

    torchrun sets that to 1 where nobody has, which is no choice of anybody's.
    """
    import torch

    from qtool import ranks

    said = os.environ.get("OMP_NUM_THREADS")
    if said is None or (said == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(ranks.threads_for(cores))


def tell_in_json(message: str, code: int, arguments: Sequence[str]) -> None:
    """Where `--json` was asked for, leave the exit code of a failed command there: launchers swallow it.

    A file that exists holds results of an earlier run, and stays.
    """
    target = _target(arguments)
    if target is None or not several() or not speaks():
        return
    text = json.dumps({"schema_version": 1, "error": message, "exit_code": code}, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
    elif not Path(target).exists() and Path(target).absolute().parent.is_dir():
        Path(target).write_text(text, "utf-8")


def _target(arguments: Sequence[str]) -> str | None:
    return _value(arguments, "--json")


def _value(arguments: Sequence[str], option: str) -> str | None:
    """What an option is given on a command line; the first time, as text."""
    for number, word in enumerate(arguments):
        if word == option:
            return next(iter(arguments[number + 1 :]), None)
        if word.startswith(f"{option}="):
            return word.removeprefix(f"{option}=")
    return None


jobs_option = click.option(
    "--jobs", metavar="N", type=click.IntRange(1, 1024), expose_value=False,
    help="Processes that share the work on this machine.",
)  # fmt: skip


def jobs_of(group: click.Group, arguments: Sequence[str]) -> int:
    """How many processes a command line asks for with `--jobs`; 1 where it is wrong, which click will say."""
    command = group.commands.get(arguments[0]) if arguments else None
    if isinstance(command, click.Group):
        return jobs_of(command, arguments[1:])
    count = _value(arguments, "--jobs")
    if several() or count is None or not count.isdecimal() or not 1 <= int(count) <= 1024:
        return 1
    known = command is not None and any("--jobs" in option.opts for option in command.params)
    return int(count) if known else 1


def alone(what: str) -> None:
    """Raises UsageError on several ranks."""
    if several():
        raise UsageError(f"{what} runs in one process; leave out torchrun")


def quiet(params: dict[str, Any]) -> bool:
    """Whether a command is to show no progress: asked for, or not the rank that is heard."""
    return bool(params.get("quiet")) or not speaks()
