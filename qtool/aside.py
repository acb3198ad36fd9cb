"""Folders for what only this process needs: below the system's temporary directory, gone at the end."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtool.errors import UnavailableError

_ELSEWHERE = "or set TMPDIR to a folder on another disk"
_OPEN: list[Path] = []
_TRIES = 5  # another thread may still write there


@contextmanager
def folder_aside() -> Iterator[Path]:
    """An empty folder, gone at the end, however the process ends short of a kill.

    Raises UnavailableError where none can be made.
    """
    made = _made()
    folder = Path(made.name)
    _OPEN.append(folder)
    try:
        yield folder
    finally:
        try:
            made.cleanup()
        finally:  # not before: `clear` may have to finish it
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
    for folder in [*_OPEN]:
        for _ in range(_TRIES):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                break
