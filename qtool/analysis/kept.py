"""Sets of heads that were measured, on disk, so that a search that was killed goes on where it was."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from qtool.analysis.search import Heads
from qtool.artifact import writing_failed
from qtool.errors import InputError
from qtool.rundir import claim


class Kept:
    """A metric whose values are kept in `file`, one JSON line a set, under the fingerprint of all they depend on.

    A search is a function of its metric alone, so that it takes the same way again through what is kept. Locked against
    other processes until `close`.
    """

    def __init__(
        self, file: Path, fingerprint: Mapping[str, Any], metric: Callable[[Heads], float], *, fresh: bool = False
    ) -> None:
        """With `fresh` what the file holds is dropped, once it is locked.

        Raises InputError when the file is of another fingerprint or another process has it open.
        """
        self._metric, self.found, self.fresh = metric, dict[Heads, float](), 0
        try:
            self._stream = file.open("a+", encoding="utf-8")
        except OSError as error:
            raise writing_failed(file, error) from error
        try:
            claim(self._stream, file)
            if fresh:
                self._stream.truncate(0)
            self._read(file, json.loads(json.dumps(fingerprint)))
        except BaseException:
            self.close()
            raise

    def _read(self, file: Path, fingerprint: Any) -> None:
        self._stream.seek(0)
        try:
            whole, _, torn = self._stream.read().rpartition("\n")
        except ValueError as error:
            raise InputError(f"{file} is damaged ({error}); start again with --overwrite") from error
        if torn:  # the process was killed while it wrote its last line
            self._stream.truncate(len(f"{whole}\n".encode()) if whole else 0)
        lines = whole.splitlines()
        if not lines:
            self._write({"fingerprint": fingerprint})
            return
        try:
            known = dict(json.loads(lines[0])["fingerprint"])
            for line in map(json.loads, lines[1:]):
                value = line["value"]
                self.found[frozenset(map(tuple, line["heads"]))] = math.nan if value is None else float(value)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} is damaged ({error}); start again with --overwrite") from error
        if known != fingerprint:
            different = [key for key in sorted({*known, *fingerprint}) if known.get(key) != fingerprint.get(key)]
            raise InputError(
                f"{file} was made with a different {', '.join(different)}; repeat the first command with --resume, or "
                "start again with --overwrite"
            )

    def __call__(self, heads: Heads) -> float:
        """The kept value, or a new one, which is kept."""
        if heads not in self.found:
            value = self._metric(heads)
            self._write({"heads": sorted(heads), "value": None if math.isnan(value) else value})
            self.found[heads] = value
            self.fresh += 1
        return self.found[heads]

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()
        except OSError as error:
            raise writing_failed(Path(self._name), error) from error

    @property
    def _name(self) -> str:
        stream: IO[str] = self._stream
        return stream.name

    def close(self) -> None:
        """Give the file free."""
        self._stream.close()
