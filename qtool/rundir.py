"""The run directory beside the output: what is finished of a run, so that a killed one resumes, and the final move.

`<out>.qtool-run/` holds `run.json` (the fingerprint), `lock`, one shard a finished unit and, at the end, the folder
that is published by renaming it. Each step leaves a state from which the next call knows how to go on.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from qtool.artifact import report, write_json, writing_failed
from qtool.errors import InputError, UnavailableError

_RECORD, _LOCK = "run.json", "lock"


def beside(out: Path, suffix: str) -> Path:
    """`<out>.qtool-<suffix>`."""
    return out.with_name(f"{out.name}.qtool-{suffix}")


def recorded(out: Path) -> dict[str, Any] | None:
    """The fingerprint of the unfinished run for `out`, if there is one."""
    try:
        return dict(json.loads((beside(out, "run") / _RECORD).read_text("utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError):
        return None


def check_output(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse what would be lost or cannot be written, before any work. Raises InputError or UnavailableError."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another -o")
    if recorded(out) is not None and not (resume or overwrite):
        raise InputError(
            f"{beside(out, 'run')} holds an unfinished run; continue it with --resume or start again with --overwrite"
        )
    if out.is_dir() and any(out.iterdir()) and not overwrite and recorded(out) is None:
        raise InputError(f"{out} is not empty; choose another -o or pass --overwrite")
    parent = next(folder for folder in (out.parent, *out.parent.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise UnavailableError(f"no permission to write in {parent}; choose another -o")


class RunDirectory:
    """An open run: locked against other processes until `close`."""

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Raises InputError when another process has it, or when `resume` meets a run with another fingerprint."""
        self.out, self.path = out, beside(out, "run")
        self.fingerprint = dict(fingerprint)
        self._lock = _lock(self.path)
        try:
            known = recorded(out)
            if known is not None and resume:
                _require_equal(known, self.fingerprint, self.path)
            elif known is not None or not resume:
                self._clear()
            self.overwrite = overwrite or self._recorded_overwrite()
            write_json(self.path / _RECORD, {"fingerprint": self.fingerprint, "overwrite": self.overwrite})
        except BaseException:
            self.close()
            raise

    def _recorded_overwrite(self) -> bool:
        try:
            return bool(json.loads((self.path / _RECORD).read_text("utf-8"))["overwrite"])
        except (OSError, ValueError, KeyError):
            return False

    def shard(self, unit: str) -> Path:
        """The file of a finished unit."""
        return self.path / f"{unit}.safetensors"

    @property
    def staging(self) -> Path:
        """The folder that becomes the output."""
        return self.path / "publish"

    def fresh_staging(self) -> Path:
        """An empty staging folder."""
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir()
        return self.staging

    def already_published(self) -> bool:
        """Whether the output is this very run's: the process was killed between the move and the cleaning up."""
        try:
            return report(self.out).get("fingerprint") == self.fingerprint
        except InputError:
            return False

    def publish(self) -> None:
        """Move the staged folder into place; an old output goes aside first and is deleted last."""
        old = beside(self.out, "old")
        try:
            if self.out.exists():
                if any(self.out.iterdir()) and not self.overwrite:
                    raise InputError(f"{self.out} is not empty; choose another -o or pass --overwrite")
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.out, old)
            os.rename(self.staging, self.out)
        except OSError as error:
            raise writing_failed(self.out, error) from error

    def finish(self) -> None:
        """Remove the run directory and the old output. The record goes last, so that a kill here is resumable too."""
        shutil.rmtree(beside(self.out, "old"), ignore_errors=True)
        self._clear()
        (self.path / _RECORD).unlink(missing_ok=True)
        (self.path / _LOCK).unlink(missing_ok=True)
        self.path.rmdir()
        self.close()

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in (_RECORD, _LOCK):
                entry.unlink()

    def close(self) -> None:
        """Release the lock; what is finished stays."""
        self._lock.close()


def _require_equal(known: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    different = [key for key in sorted({*known, *wanted}) if known.get(key) != wanted.get(key)]
    if different:
        raise InputError(
            f"{where} was started with a different {', '.join(different)}; "
            "repeat the first command with --resume, or start again with --overwrite"
        )


def _lock(folder: Path) -> IO[str]:
    """An exclusive lock inside `folder` that the system drops with the process. Raises InputError when it is taken."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stream = (folder / _LOCK).open("w")
        except FileNotFoundError:  # the other process finished and removed its folder in between
            continue
        except OSError as error:
            raise writing_failed(folder, error) from error
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise InputError(f"another qtool process is writing {folder}; wait for it to end") from None
        if _same_file(folder / _LOCK, stream):
            return stream
        stream.close()  # a lock on a file that its owner has just removed is no lock


def _same_file(path: Path, stream: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False
