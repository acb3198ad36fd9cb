"""One engine in a process of its own: `python -m qtool.bench.worker`, JSON lines in and out.

The first line is a `Request`. Then each line is a command and gets one line back: its result, or `{"error": …}`. The
process ends when its standard input does, so it never outlives its parent for longer than a turn.
"""

import json
import os
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from qtool.bench.batches import Outputs, comparable, read
from qtool.bench.clock import clock_for
from qtool.bench.engines import ENGINES, QTOOL
from qtool.bench.runtimes import Request, Runner
from qtool.bench.timing import timed_calls
from qtool.errors import QtoolError, UnavailableError


class Worker:
    """What the commands share: the engine's module, the model once it is loaded, its batches as the engine takes them.

    `runtime` replaces the engine's module in tests.
    """

    def __init__(self, request: Request, runtime: Any = None) -> None:
        self.request = request
        engine = {**ENGINES, QTOOL.name: QTOOL}[request.engine] if runtime is None else None
        self.runtime = import_module(f"qtool.bench.runtimes.{engine.runtime}") if engine else runtime
        self.clock = clock_for(request.device, request.cold)
        self.runner: Runner | None = None
        self.feeds: dict[str, list[Any]] = {}

    def prepare(self) -> dict[str, Any]:
        """Make the engine's files."""
        self.runtime.prepare(self.request)
        return {}

    def load(self) -> dict[str, Any]:
        """Load the model; memory before is that of the packages."""
        self.runtime.imports(self.request)
        before = peak_rss()
        self.runner = self.runtime.load(self.request)
        return {"imports_bytes": before, **vars(self.runner.facts)}

    def check(self, file: str) -> dict[str, Any]:
        """Compute a workload, and write what is compared of its outputs, `NUMBER.OUTPUT`, beside it."""
        from safetensors.numpy import save_file

        runner = self._loaded()
        found: Outputs = {}
        for number, batch in enumerate(read(Path(file)).batches):
            outputs = comparable(runner.arrays(runner.run(runner.feed(batch))), batch["attention_mask"])
            found |= {f"{number}.{name}": value for name, value in outputs.items()}
        path = self.request.scratch / f"outputs-{os.getpid()}.safetensors"
        save_file(found, path)
        return {"outputs": str(path)}

    def warm(self, file: str) -> dict[str, Any]:
        """Take a workload, and run all its batches twice: buffers are allocated, what compiles compiles."""
        runner, workload = self._loaded(), read(Path(file))
        self.feeds[workload.name] = feeds = [runner.feed(batch, workload.context) for batch in workload.batches]
        for feed in 2 * feeds:
            runner.ready(feed)
            runner.run(feed)
        return {}

    def measure(self, workload: str, seconds: float) -> dict[str, Any]:
        """A turn: milliseconds of each call."""
        runner = self._loaded()
        return {"ms": timed_calls(runner.run, self.feeds[workload], seconds, self.clock, runner.ready)}

    def memory(self) -> dict[str, Any]:
        """The largest resident set so far, and the most that torch held of a GPU."""
        return {"peak_bytes": peak_rss(), "gpu_bytes": gpu_bytes(self.request.device)}

    def peaks(self) -> dict[str, Any]:
        """What the GPU can do at most."""
        import torch

        from qtool.bench.peaks import measured

        return measured(torch.device(self.request.device), self.clock).to_json()

    def _loaded(self) -> Runner:
        assert self.runner is not None, "load comes first"
        return self.runner


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "prepare": Worker.prepare,
    "load": Worker.load,
    "check": Worker.check,
    "warm": Worker.warm,
    "measure": Worker.measure,
    "memory": Worker.memory,
    "peaks": Worker.peaks,
}
"""What a line may ask for, by the value of its key `do`; its other keys are the arguments."""


def peak_rss() -> int:
    """Bytes. The kernel's own mark of this program: `getrusage` starts with the memory of whoever started it."""
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"), re.M)
    except OSError:
        found = None
    kilobytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * kilobytes


def gpu_bytes(device: str) -> int | None:
    """The most that torch reserved on a GPU, graphs included; None on the CPU."""
    if device == "cpu":
        return None
    import torch

    return torch.cuda.max_memory_reserved(device)


def answer(worker: Worker, command: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a command; what goes wrong is a line too, with the exit code that fits it."""
    arguments = {key: value for key, value in command.items() if key != "do"}
    try:
        return COMMANDS[command["do"]](worker, **arguments)
    except QtoolError as error:
        return _failure(str(error), error.exit_code)
    except ImportError as error:
        return _failure(f"{error}; pip install 'qtool[bench]'", UnavailableError.exit_code)
    except Exception as error:  # an engine may raise anything, and must not take the others with it
        return _failure(f"{type(error).__name__}: {error}", UnavailableError.exit_code)


def _failure(message: str, code: int) -> dict[str, Any]:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return {"error": " ".join(lines[:2])[:500], "exit_code": code}


def serve(lines: TextIO, out: TextIO, make: Callable[[Request], Worker] = Worker) -> None:
    """Answer every line until there are no more."""

    def say(body: Mapping[str, Any]) -> None:
        out.write(json.dumps(body) + "\n")
        out.flush()

    first = lines.readline()
    if not first:
        return
    try:
        worker = make(Request.from_json(json.loads(first)))
    except Exception as error:  # a package that is damaged
        say(_failure(f"{type(error).__name__}: {error}", UnavailableError.exit_code))
        return
    say({})
    for line in lines:
        say(answer(worker, json.loads(line)))


def main() -> None:
    """Engines and exporters print: what they print goes to stderr, and stdout stays for the protocol."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    warnings.simplefilter("ignore")
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, channel)


if __name__ == "__main__":
    main()
