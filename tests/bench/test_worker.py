"""The protocol between parent and worker, with engines that are none."""

import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from qtool.bench import batches
from qtool.bench.batches import Workload
from qtool.bench.crew import EngineError, Peer
from qtool.bench.runtimes import Facts, Request
from qtool.bench.worker import Worker, peak_rss, serve
from qtool.errors import InputError


class Doubling:
    """Its outputs are twice the ids."""

    facts = Facts("fake 1.0", 3, 12, {"kind": "fake"})
    readied = 0

    def feed(self, batch: Any, context: int = 0) -> Any:
        return batch["input_ids"]

    def ready(self, feed: Any) -> None:
        self.readied += 1

    def run(self, feed: Any) -> Any:
        if feed.max() > 100:
            raise ValueError("an id\nthat is too large")
        return 2 * feed

    def arrays(self, result: Any) -> dict[str, Any]:
        return {"logits": result}


def refuse(request: Request) -> None:
    raise InputError("no such model")


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    return Request("torch", tmp_path, 1, tmp_path, ["input_ids"], tmp_path / "calibration", 40)


def conversation(request: Request, *commands: dict[str, Any], **functions: Any) -> list[dict[str, Any]]:
    runtime = SimpleNamespace(
        **{"imports": lambda r: None, "prepare": lambda r: None, "load": lambda r: Doubling(), **functions}
    )
    lines = "".join(json.dumps(line) + "\n" for line in (request.to_json(), *commands))
    out = io.StringIO()
    serve(io.StringIO(lines), out, lambda told: Worker(told, runtime))
    return [json.loads(line) for line in out.getvalue().splitlines()]


def workload(path: Path, *rows: list[int]) -> str:
    made = [{"input_ids": np.array([row]), "attention_mask": np.ones((1, len(row)), dtype=np.int64)} for row in rows]
    batches.write(Workload("two", made), path)
    return str(path)


def test_requests_survive_the_line(request_: Request) -> None:
    assert Request.from_json(json.loads(json.dumps(request_.to_json()))) == request_


def test_a_worker_loads_checks_and_measures(request_: Request, tmp_path: Path) -> None:
    file = workload(tmp_path / "file", [1, 2], [3, 4])
    ready, loaded, checked, warm, measured, memory = conversation(
        request_, {"do": "load"}, {"do": "check", "file": file}, {"do": "warm", "file": file},
        {"do": "measure", "workload": "two", "seconds": 0.0}, {"do": "memory"},
    )  # fmt: skip
    assert ready == warm == {}
    assert (loaded["version"], loaded["threads"], loaded["details"]) == ("fake 1.0", 3, {"kind": "fake"})
    outputs = load_file(checked["outputs"])
    assert {name: value.tolist() for name, value in outputs.items()} == {"0.logits": [[2, 4]], "1.logits": [[6, 8]]}
    assert len(measured["ms"]) == 2 and all(ms > 0 for ms in measured["ms"])
    assert memory["peak_bytes"] >= loaded["imports_bytes"] > 0 and memory["gpu_bytes"] is None


def test_every_call_of_a_worker_is_made_ready(request_: Request, tmp_path: Path) -> None:
    file, engine = workload(tmp_path / "file", [1, 2]), Doubling()
    measure = {"do": "measure", "workload": "two", "seconds": 0.0}
    *_, measured = conversation(request_, {"do": "load"}, {"do": "warm", "file": file}, measure, load=lambda r: engine)
    assert engine.readied == 2 + 1 + len(measured["ms"])  # warm, not counted, counted


def test_errors_are_lines_and_the_worker_goes_on(request_: Request, tmp_path: Path) -> None:
    file = workload(tmp_path / "file", [1000])
    _, refused, loaded, failed, memory = conversation(
        request_, {"do": "prepare"}, {"do": "load"}, {"do": "warm", "file": file}, {"do": "memory"}, prepare=refuse
    )
    assert refused == {"error": "no such model", "exit_code": 3}
    assert "error" not in loaded and "peak_bytes" in memory
    assert failed == {"error": "ValueError: an id that is too large", "exit_code": 4}


def test_peak_memory_grows_by_what_is_touched() -> None:
    before = peak_rss()
    block = np.ones(before // 8 + 4_000_000)  # more than the process ever had
    assert peak_rss() >= block.nbytes > before


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    started: list[Peer] = []
    yield started
    for peer in started:
        peer.kill()


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import os, sys, time\nsys.stdin.readline()\n{code}")


def test_a_worker_that_dies_is_an_error_with_its_last_words(request_: Request, peers: list[Peer]) -> None:
    with pytest.raises(EngineError, match="exit status 7: the end"):
        peers.append(Peer(request_, python("sys.exit(print('the end', file=sys.stderr) or 7)")))
    peers.append(Peer(request_, python("print('{}', flush=True)\nsys.stdin.readline()\nos.kill(os.getpid(), 9)")))
    with pytest.raises(EngineError, match="out of memory"):
        peers[-1].ask("load")


def test_an_error_of_a_worker_keeps_its_exit_code(request_: Request, peers: list[Peer]) -> None:
    code = "print('{}', flush=True)\nsys.stdin.readline()\n"
    peers.append(Peer(request_, python(code + """print('{"error": "bad", "exit_code": 3}', flush=True)""")))
    with pytest.raises(EngineError, match="bad") as caught:
        peers[-1].ask("load")
    assert caught.value.exit_code == 3


def test_killing_ends_what_the_worker_started(request_: Request, tmp_path: Path) -> None:
    note = tmp_path / "child"
    code = f"""import subprocess
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
open({str(note)!r}, 'w').write(str(child.pid))
print('{{}}', flush=True)
time.sleep(600)"""
    peer = Peer(request_, python(code))
    child = Path("/proc") / note.read_text()
    assert child.exists()
    peer.kill()
    for _ in range(100):
        if not child.exists() or "Z" in (child / "stat").read_text().split(")")[1].split()[0]:
            return
        time.sleep(0.05)
    raise AssertionError("it is still there")
