"""How ranks end together: signs of life, and what ended one of them, where a thread looks beside the work.

The main thread may be waiting for a rank that died, where no exception reaches it.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from qtool import aside
from qtool.errors import (
    RESUMABLE,
    QtoolError,
    UnavailableError,
    environment_problem,
    said_by_parent,
    stopped,
)

BEAT = 1.0
"""Seconds between two signs of life."""
LOST = 30.0
"""Seconds without one after which a rank is taken for dead: also the longest that a call may hold Python's lock."""
COMING = 1800.0
"""Seconds in which all ranks must have come: a launcher may start them minutes apart."""
ASKED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
"""Signals that ask a process to end; Windows has no SIGHUP."""
_ENDED = "error"


class OtherRankError(QtoolError):
    """What ended another rank, with its exit code."""

    def __init__(self, rank: int, message: str, code: int) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.exit_code = code


class Life:
    """Of one of several ranks. `store` is shared memory of all, for what is not work: signs of life, and errors.

    When this ends the first rank, it first calls `farewell` with the line and the exit code.
    """

    def __init__(self, rank: int, size: int, store: Any, farewell: Callable[[str, int], None] | None = None) -> None:
        self._rank, self._size, self._store, self._farewell = rank, size, store, farewell
        self._stop, self._over = threading.Event(), threading.Event()
        self._signals, pen = socket.socketpair()
        self._signals.setblocking(False)
        pen.setblocking(False)
        self._pen = pen  # a signal's number is written there also while torch waits and handlers do not run
        self._pen_before = signal.set_wakeup_fd(pen.fileno(), warn_on_full_buffer=False)
        self._missed = 0
        """Beats since the watch was last heard of."""
        self._give_sign(store)
        self._watch = threading.Thread(target=self._watching, args=(store.clone(),), daemon=True)
        self._watch.start()
        threading.Thread(target=self._guarding, daemon=True).start()

    def _give_sign(self, store: Any) -> None:
        store.set(_beat(self._rank), repr(time.monotonic()))

    def await_all(self) -> None:
        """Wait until every rank has given a sign of life. Raises UnavailableError for one that does not come."""
        keys = [_beat(rank) for rank in range(self._size)]
        deadline = time.monotonic() + COMING
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                missing = next(rank for rank, key in enumerate(keys) if not self._store.check([key]))
                raise UnavailableError(f"rank {missing} has not come within {COMING / 60:.0f} minutes")
            time.sleep(BEAT / 10)

    def end(self) -> None:
        """After all have said goodbye: look no more."""
        self._stop.set()
        self._watch.join(LOST)
        self._put_down()

    def check(self) -> None:
        """Raises what ended another rank, as far as the store, which may be gone, still tells."""
        try:
            note = self._others(self._store)
        except RuntimeError:
            return
        if note:
            raise OtherRankError(note["rank"], note["message"], note["code"])

    def tell(self, error: BaseException) -> None:
        """Let the other ranks end with this error, unless one has ended before."""
        self._stop.set()
        code, message = ending(error)
        self._note(self._store, self._rank, code, message)
        self._put_down()

    def _put_down(self) -> None:
        """Signals are no more written here: the number of a closed socket will be another file's."""
        self._over.set()
        signal.set_wakeup_fd(self._pen_before)
        self._signals.close()
        self._pen.close()

    def _note(self, store: Any, rank: int, code: int, message: str) -> None:
        """Say what ended a rank, unless one has ended before, and give the others time to read it."""
        note = json.dumps({"rank": rank, "code": code, "message": message, "by": self._rank})
        try:
            store.compare_set(_ENDED, "", note)
            time.sleep(2 * BEAT)  # the store may be this process's
        except RuntimeError:  # whoever kept the store is gone, and with it all ranks that could be told
            return

    def _others(self, store: Any) -> dict[str, Any] | None:
        """What ended another rank, or this one as another saw it, which took it for dead."""
        found = store.get(_ENDED) if store.check([_ENDED]) else b""
        note = dict(json.loads(found)) if found else None
        return note if note and note["by"] != self._rank else None

    def _watching(self, store: Any) -> None:
        """Give signs of life, and end this process when another rank has failed or gives none."""
        seen: dict[int, tuple[bytes, int]] = {}
        while not self._stop.wait(BEAT):
            try:
                note = self._others(store)
                self._give_sign(store)
                silent, gone = self._silent(store, seen), False
            except RuntimeError:
                note, silent, gone = None, [], True
            if self._stop.is_set():
                return
            self._missed = 0
            if number := self._signalled():
                self._end_by_signal(store, number)
            if note is not None:
                self._end_by_note(note)
            elif gone:
                self._end_by_loss()
            elif silent:
                self._end_by_silence(store, silent[0])

    def _guarding(self) -> None:
        """End this process when one waits for a store that is frozen or cut off: no call to it ever returns.

        Beats are counted, so that the time in which this process itself was stopped is none.
        """
        while not self._over.wait(BEAT):
            self._missed += 1
            if self._missed * BEAT > LOST + 2 * BEAT:  # it may be waiting for the main thread to end in order
                self._end_by_loss()

    def _end_by_signal(self, store: Any, number: int) -> None:
        time.sleep(2 * BEAT)  # the main thread may end in order
        if not self._stop.is_set():
            code = 128 + number
            self._note(store, self._rank, code, stopped(code))
            self._exit(stopped(code), code, -1)

    def _end_by_note(self, note: dict[str, Any]) -> None:
        time.sleep(BEAT)  # the main thread may notice by itself, and end in order
        if not self._stop.is_set():
            itself = note["rank"] == note["by"] == 0  # then it says so
            self._exit(f"rank {note['rank']}: {note['message']}", note["code"], -1 if itself else note["rank"])

    def _end_by_silence(self, store: Any, rank: int) -> None:
        code, message = UnavailableError.exit_code, f"it is gone; {RESUMABLE}"
        self._note(store, rank, code, message)
        self._exit(f"rank {rank}: {message}", code, rank)

    def _end_by_loss(self) -> None:
        """Of the store, and with it of the first rank, unless others keep it."""
        self._exit(f"the process in which ranks meet is gone; {RESUMABLE}", UnavailableError.exit_code, 0)

    def _signalled(self) -> int:
        """The number of a signal that came since the last look; 0 for none."""
        try:
            found = self._signals.recv(64)
        except BlockingIOError:
            return 0
        return next((number for number in found if number in ASKED), 0)

    def _silent(self, store: Any, seen: dict[int, tuple[bytes, int]]) -> list[int]:
        """Ranks that came and give no sign of life for too long. The first one looks at all, the others at the first.

        Looks are counted, as in `_guarding`.
        """
        for rank in range(self._size) if self._rank == 0 else (0,):
            if store.check([_beat(rank)]):
                beat = store.get(_beat(rank))
                known, looks = seen.get(rank, (b"", 0))
                seen[rank] = beat, looks + 1 if beat == known else 0
        return [rank for rank, (_, looks) in seen.items() if looks * BEAT > LOST]

    def _exit(self, message: str, code: int, culprit: int) -> None:
        """The first rank that is left speaks."""
        speaker = next(rank for rank in range(self._size) if rank != culprit)
        if self._rank == speaker and not said_by_parent(code):
            with suppress(OSError):  # not to sys.stderr, which ranks of a command have turned off but for the first
                os.write(2, f"qtool: {message}\n".encode())
        if self._rank == 0 and self._farewell is not None:
            self._farewell(message, code)
        aside.clear()
        os._exit(code)


def _beat(rank: int) -> str:
    return f"beat {rank}"


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the line of an error."""
    if isinstance(error, OSError):
        error = environment_problem(error) or error
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", None)
    if isinstance(error, KeyboardInterrupt):
        return 130, stopped(130)
    if not isinstance(code, int):
        code = 1
    said = " ".join(str(error).split()) or type(error).__name__
    return code, said if code != 1 else f"{type(error).__name__}: {said}"
