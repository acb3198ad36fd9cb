"""The run directory beside the output: what is finished of a run, so that a killed one resumes, and the final move.

`<out>.qtool-run/` holds `run.json` (the fingerprint), `lock`, one shard a finished unit and, at the end, the folder
that is published by renaming it. Each step leaves a state from which the next call knows how to go on.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from qtool.artifact import is_artifact, report, write_json, writing_failed
from qtool.errors import InputError, UnavailableError

_RECORD, _LOCK = "run.json", "lock"
_LOCK_TRIES = 100


def beside(out: Path, suffix: str) -> Path:
    """`<out>.qtool-<suffix>`."""
    return out.with_name(f"{out.name}.qtool-{suffix}")


def recorded(out: Path) -> dict[str, Any] | None:
    """The fingerprint of the unfinished run for `out`, if there is one."""
    fingerprint = _record(out).get("fingerprint")
    return fingerprint if isinstance(fingerprint, dict) else None


def _record(out: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((beside(out, "run") / _RECORD).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def published(out: Path) -> dict[str, Any] | None:
    """The fingerprint of the artifact at `out`, if it is one."""
    try:
        return dict(report(out)["fingerprint"])
    except InputError:
        return None


def check_output(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse what would be lost or cannot be written, before any work. Raises InputError or UnavailableError.

    Only an artifact is ever overwritten: `--overwrite` with the wrong folder must not cost anybody their files.
    With `resume` an artifact at `out` may be what the run left that was killed at its very end: `RunDirectory` decides.
    """
    if "\0" in str(out) or not str(out).isprintable():
        raise InputError(f"{str(out)!r} is no usable name for an output; choose another -o")
    if (out.exists() or out.is_symlink()) and not out.is_dir():
        raise InputError(f"{out} is not a folder; choose another -o")
    if overwrite and _occupied(out) and not (is_artifact(out) or published(out)):
        raise InputError(
            f"{out} holds something else than a model that qtool made; remove it yourself, or choose another -o"
        )
    if recorded(out) is not None and not (resume or overwrite):
        raise InputError(
            f"{beside(out, 'run')} holds an unfinished run; continue it with --resume or start again with --overwrite"
        )
    if _occupied(out) and not overwrite and recorded(out) is None and not (resume and published(out)):
        raise _not_empty(out)
    parent = next(folder for folder in (out.parent, *out.parent.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise InputError(f"{parent} is a file, not a folder; choose another -o")
    if not os.access(parent, os.W_OK):
        raise UnavailableError(f"no permission to write in {parent}; choose another -o")


def keep_apart(out: Path, *inputs: Path) -> None:
    """Raises InputError when writing `out` would replace one of `inputs`, or a folder that holds it."""
    for path in inputs:
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise InputError(f"{out} is, or holds, {path}, which the run reads; choose another -o")


def _occupied(out: Path) -> bool:
    return out.is_dir() and any(out.iterdir())


def _not_empty(out: Path) -> InputError:
    return InputError(f"{out} is not empty; choose another -o or pass --overwrite")


class RunDirectory:
    """An open run: locked against other processes until `close`."""

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Raises InputError when another process has it, when `resume` meets a run with another fingerprint, or when
        the output is taken by something else than this very run."""
        self.out, self.path = out, beside(out, "run")
        self.fingerprint = dict(fingerprint)
        self._lock = _lock(self.path / _LOCK)
        try:
            known = recorded(out)
            if known is not None and resume:
                _require_equal(known, self.fingerprint, self.path)
            elif known is not None or not resume:
                self._clear()
            self.overwrite = overwrite or _record(out).get("overwrite") is True
            self._moved = resume and self._was_moved()
            if not self._moved:
                self._start()
        except BaseException:
            if recorded(out) is None:  # nothing was begun, so nothing is left to resume
                self._remove()
            self.close()
            raise

    def _was_moved(self) -> bool:
        """Whether the process was killed after it had moved its result into place. The fingerprint alone would not do:
        the output that is being overwritten may be an older, damaged one of the same run."""
        record = _record(self.out)
        ended = record.get("publishing") is True and not self.staging.exists() if record else not self.overwrite
        return ended and published(self.out) == self.fingerprint

    def _start(self) -> None:
        if _occupied(self.out) and not self.overwrite:
            raise _not_empty(self.out)
        self._write_record(publishing=False)

    def _write_record(self, *, publishing: bool) -> None:
        record = {"fingerprint": self.fingerprint, "overwrite": self.overwrite, "publishing": publishing}
        write_json(self.path / _RECORD, record)

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
        return self._moved

    def publish(self) -> None:
        """Move the staged folder into place; an old output goes aside first and is deleted last."""
        old = beside(self.out, "old")
        self._write_record(publishing=True)
        try:
            if self.out.exists():
                if _occupied(self.out) and not self.overwrite:
                    raise _not_empty(self.out)
                shutil.rmtree(old, ignore_errors=True)
                os.rename(self.out, old)
            os.rename(self.staging, self.out)
        except OSError as error:
            raise writing_failed(self.out, error) from error

    def finish(self) -> None:
        """Remove the run directory and the old output. The record goes last, so that a kill here is resumable too."""
        shutil.rmtree(beside(self.out, "old"), ignore_errors=True)
        self._remove()

    def _remove(self) -> None:
        self._clear()
        (self.path / _RECORD).unlink(missing_ok=True)
        (self.path / _LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # another process may have opened its own lock in this moment
            self.path.rmdir()
        self.close()

    def _clear(self) -> None:
        for entry in self.path.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name not in (_RECORD, _LOCK):
                entry.unlink()

    def discard_if_empty(self) -> None:
        """Remove the run directory when no unit was finished: there is nothing to resume."""
        if not any(self.path.glob("*.safetensors")):
            self._remove()

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


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """While active, no other process has the folder of `file`, a lock that is removed at the end.

    A folder that is made for it and stays empty goes too. Raises InputError when another process has it.
    """
    made = not file.parent.exists()
    stream = _lock(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # something was written there
                file.parent.rmdir()
        stream.close()


def _lock(file: Path) -> IO[str]:
    """An exclusive lock that the system drops with the process. Raises InputError when it is taken."""
    folder = file.parent
    for _ in range(_LOCK_TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stream = file.open("w")
        except (FileNotFoundError, FileExistsError) as error:
            if folder.exists() and not folder.is_dir():
                raise writing_failed(folder, error) from error
            continue  # the other process finished, and removed its folder while this one made or opened it
        except OSError as error:
            raise writing_failed(folder, error) from error
        try:
            claim(stream, folder)
        except InputError:
            stream.close()
            raise
        if _same_file(file, stream):
            return stream
        stream.close()  # a lock on a file that its owner has just removed is no lock
    raise UnavailableError(f"cannot make {folder}; choose another place with -o")


def claim(stream: IO[str], what: Path) -> None:
    """Lock an open file until it is closed. Raises InputError, which names `what`, when another process has it."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another qtool process is writing {what}; wait for it to end") from None


def _same_file(path: Path, stream: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False
