"""Folders for what only this process needs: below the system's temporary directory, gone at the end."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtool.errors import UnavailableError

_ELSEWHERE = "or set TMPDIR to a folder on another disk"
_OPEN: list[Path] = []


@contextmanager
def folder_aside() -> Iterator[Path]:
    """An empty folder, gone at the end, however the process ends short of a kill.

    Raises UnavailableError where none can be made.
    """
    with _made() as name:
        folder = Path(name)
        _OPEN.append(folder)
        try:
            yield folder
        finally:
            _OPEN.remove(folder)


def _made() -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory(prefix="qtool-")
    except OSError as error:
        where = f" in {Path(error.filename).parent}" if error.filename else ""  # else the reason names what was tried
        reason = f"cannot make a temporary folder{where}: {error.strerror}"
        raise UnavailableError(f"{reason}; free some space there, {_ELSEWHERE}") from error


def advice(path: Path) -> str | None:
    """What to do when `path` cannot be written, if it is or lies in a folder aside: nobody chose it with an option."""
    for folder in _OPEN:
        if path.is_relative_to(folder):
            return f"free some space in {folder.parent}, {_ELSEWHERE}"
    return None


def clear() -> None:
    """Remove all folders now: for a process that is about to end without leaving their contexts."""
    for folder in _OPEN:
        shutil.rmtree(folder, ignore_errors=True)
