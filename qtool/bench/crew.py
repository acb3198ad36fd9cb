"""The parent's end of a worker: start it, ask it, end it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qtool.bench.runtimes import Request
from qtool.errors import UnavailableError

COMMAND = (sys.executable, "-m", "qtool.bench.worker")


class EngineError(Exception):
    """An engine failed; `exit_code` says whose fault it is."""

    def __init__(self, message: str, exit_code: int = UnavailableError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Peer:
    """A worker process. Only the one that was asked last computes; the others wait for their next line."""

    def __init__(self, request: Request, command: Sequence[str] = COMMAND) -> None:
        self._log = request.scratch / f"{request.engine}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, encoding="utf-8",
                cwd=request.scratch, env=_environment(request.threads), start_new_session=True,
            )  # fmt: skip
        try:
            self._exchange(request.to_json())
        except BaseException:
            self.kill()
            raise

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The result of a command. Raises EngineError, also when the process is gone."""
        return self._exchange({"do": do, **arguments})

    def _exchange(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(body) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise EngineError(self._epitaph())
        result: dict[str, Any] = json.loads(line)
        if "error" in result:
            raise EngineError(result["error"], result["exit_code"])
        return result

    def _epitaph(self) -> str:
        """How a process ended that did not answer."""
        status = self._process.wait()
        if status == -signal.SIGKILL:
            return "its process was killed (out of memory?)"
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        said = self._log.read_text("utf-8", errors="replace").strip().splitlines()
        return f"its process ended with {how}" + (f": {said[-1].strip()}" if said else "")

    def kill(self) -> None:
        """End the process and whatever it started, such as compilers."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(BrokenPipeError):  # a line that it no longer read
                if pipe is not None:
                    pipe.close()


def _environment(threads: int) -> dict[str, str]:
    """Of a worker: its threads, no hub, no colour, no module of the user's working directory."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONSAFEPATH": "1",
        "NO_COLOR": "1",
        "CI": "true",  # OpenVINO's packages then send nothing about their use
    }


@contextmanager
def crew() -> Iterator[Callable[[Request], Peer]]:
    """A function that starts workers; all of them are gone when the block is left, however it is left."""
    started: list[Peer] = []

    def start(request: Request) -> Peer:
        peer = Peer(request)
        started.append(peer)
        return peer

    try:
        yield start
    finally:
        for peer in started:
            peer.kill()


def prepare(request: Request, start: Callable[[Request], Peer]) -> None:
    """Let a worker of its own make the engine's files, and end it: what that took of memory is not the engine's."""
    Path(request.scratch).mkdir(exist_ok=True)
    peer = start(request)
    try:
        peer.ask("prepare")
    finally:
        peer.kill()
