"""One command on several ranks: who speaks, with how many threads, and what `--jobs` does."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import click

from qtool.errors import GateError, UsageError, said_by_parent, tells_failure

HELP = {"-h", "--help"}


def several() -> bool:
    """Whether somebody started this process as one of many: torchrun and its like, or `--jobs`.

    Raises UsageError for numbers that cannot be.
    """
    said = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") if os.environ.get(name)}
    if not {"RANK", "WORLD_SIZE"} <= said.keys() or said["WORLD_SIZE"] == "1":
        return False
    if wrong := [f"{name}={value}" for name, value in said.items() if not value.isdecimal()]:
        raise UsageError(f"the environment says {wrong[0]}, which is no number; unset it, or start ranks with torchrun")
    if int(said["RANK"]) >= int(said["WORLD_SIZE"]):
        raise UsageError(f"the environment says RANK={said['RANK']} of {said['WORLD_SIZE']}; ranks are counted from 0")
    return True


def speaks() -> bool:
    """Whether errors of this process are for people: others tell theirs to the first rank."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") in ("", "0")


@contextmanager
def meeting(group: click.Group) -> Iterator[None]:
    """The ranks of this command together; only the first one is heard. Commands that share nothing meet nobody."""
    if not several() or not shares(group, sys.argv[1:]) or HELP & {*sys.argv[1:]}:
        yield
        return
    from qtool import ranks

    _set_threads()
    with ranks.joined(lambda message, code: tell_in_json(message, code, sys.argv[1:])) as met:
        if met.first:
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
    """Where several ranks were to leave results by `--json`, leave there the exit code of a command that failed:
    launchers swallow it.

    The process that `--jobs` was asked of does so where it speaks for its ranks, and in a file alone: they may have
    written to stdout. A file with results of an earlier run stays, and so does what a failed gate has written there.
    """
    target, parent = _value(arguments, "--json"), "RANK" not in os.environ
    if target is None or not speaks() or said_by_parent(code) or (parent and _jobs(arguments) == 1):
        return
    text = json.dumps({"schema_version": 1, "error": message, "exit_code": code}, indent=2) + "\n"
    with suppress(OSError):  # the line on stderr is what counts
        if target != "-":
            if not Path(target).exists() or tells_failure(_read_json(Path(target))):
                Path(target).write_text(text, "utf-8")
        elif not parent and code != GateError.exit_code:
            sys.stdout.write(text)
            sys.stdout.flush()


def _read_json(file: Path) -> Any:
    """What a file holds; None where that is no JSON."""
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError:
        return None


def _value(arguments: Sequence[str], option: str) -> str | None:
    """What an option is given on a command line; the last time, as text."""
    found = None
    for number, word in enumerate(arguments):
        if word == option:
            found = next(iter(arguments[number + 1 :]), None)
        elif word.startswith(f"{option}="):
            found = word.removeprefix(f"{option}=")
    return found


jobs_option = click.option(
    "--jobs", metavar="N", type=click.IntRange(1, 1024), expose_value=False,
    help="Processes that share the work on this machine.",
)  # fmt: skip


def jobs_of(group: click.Group, arguments: Sequence[str]) -> int:
    """How many processes a command line asks for with `--jobs`; 1 where it is wrong, which click will say."""
    return 1 if several() or HELP & {*arguments} or not shares(group, arguments) else _jobs(arguments)


def _jobs(arguments: Sequence[str]) -> int:
    with suppress(ValueError):  # read as click reads it
        count = int(_value(arguments, "--jobs") or 1)
        return count if 1 <= count <= 1024 else 1
    return 1


def shares(group: click.Group, arguments: Sequence[str]) -> bool:
    """Whether a command line is of a command whose work ranks share."""
    command = group.commands.get(arguments[0]) if arguments else None
    if isinstance(command, click.Group):
        return shares(command, arguments[1:])
    return command is not None and any("--jobs" in option.opts for option in command.params)


def alone(what: str) -> None:
    """Raises UsageError on several ranks."""
    if several():
        raise UsageError(f"{what} runs in one process; leave out torchrun")


def quiet(params: dict[str, Any]) -> bool:
    """Whether a command is to show no progress: asked for, or not the rank that is heard."""
    return bool(params.get("quiet")) or not speaks()
