"""Temporary folders: gone at the end, and a full disk below TMPDIR is told apart from one below the output."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import largest_file

from qtool import aside
from qtool.artifact import write_tensors, write_text
from qtool.errors import UnavailableError
from qtool.spill import SpilledStates

Write = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_folders_go_with_their_contexts_or_all_at_once(place: Path) -> None:
    with aside.folder_aside() as one, aside.folder_aside() as other:
        assert {*place.iterdir()} == {one, other} and one != other
        (one / "folder").mkdir()
        (one / "folder" / "file").write_text("text")
        aside.clear()
        assert not [*place.iterdir()]
    with pytest.raises(ZeroDivisionError), aside.folder_aside() as one:
        (one / "file").write_text(f"{1 / 0}")
    assert not [*place.iterdir()]


def test_a_folder_whose_removal_is_cut_short_is_still_known(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that ends the process comes amid the removal."""
    known = []
    cleanup = tempfile.TemporaryDirectory.cleanup
    monkeypatch.setattr(
        tempfile.TemporaryDirectory, "cleanup", lambda self: (known.extend(aside._OPEN), cleanup(self))[1]
    )
    with aside.folder_aside() as folder:
        pass
    assert known == [folder] and aside._OPEN == []


def test_a_folder_that_cannot_be_made(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advice = "free some space there, or set TMPDIR to a folder on another disk"

    def refused(error: OSError) -> str:
        def mkdir(path: str, mode: int) -> None:
            error.filename = error.filename and path
            raise error

        with monkeypatch.context() as patch, pytest.raises(UnavailableError) as caught:
            patch.setattr(os, "mkdir", mkdir)
            with aside.folder_aside():
                pytest.fail("it was made")
        return str(caught.value)

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a path")
    assert refused(full) == f"cannot make a temporary folder in {place}: No space left on device; {advice}"
    nowhere = FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")
    assert refused(nowhere) == f"cannot make a temporary folder: {nowhere.strerror}; {advice}"


def spill(file: Path) -> None:
    SpilledStates(file.parent).append((torch.zeros(1 << 18), ()))


WRITES: dict[str, Write] = {
    "text": lambda file: write_text(file, "a" * 1000),
    "tensors": lambda file: write_tensors(file, {"x": torch.zeros(1000)}),
    "states": spill,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_full_disk_is_named_with_what_moves_the_folder(write: Write, place: Path) -> None:
    """Options of a command move its output; only TMPDIR moves what lies aside."""

    def refused(file: Path) -> str:
        with largest_file(100), pytest.raises(UnavailableError) as caught:
            write(file)
        return str(caught.value).partition(": File too large; ")[2]

    with aside.folder_aside() as folder:
        assert refused(folder / "file") == f"free some space in {place}, or set TMPDIR to a folder on another disk"
        assert refused(place / "file") == "free some space or choose another place with -o"
    assert refused(folder.with_name("file")) == "free some space or choose another place with -o"
