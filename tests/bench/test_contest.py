"""Turns and results, with workers that are none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qtool.bench import contest
from qtool.bench.batches import Workload
from qtool.bench.contest import Entry, Outcome, Samples, Settings, hold, without_reference
from qtool.bench.crew import EngineError
from qtool.bench.report import Report
from qtool.bench.runtimes import Request

MACHINE = {"cpu": "a CPU", "cores": 2, "flags": ["avx2"], "load_average": 0.1}
MS = {"torch": 8.0, "torch-int8": 4.0, "torch-bf16": 2.0, "qtool": 1.0}


class FakePeer:
    """Answers at once; `log` is what all of them were asked, in order."""

    def __init__(self, request: Request, log: list[tuple[str, str, str]], bad: dict[str, Any]) -> None:
        self.request, self.log, self.bad = request, log, bad

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        engine = self.request.engine
        self.log.append((engine, do, arguments.get("workload", "")))
        if self.bad.get(engine) == do:
            raise EngineError("it broke", 4)
        if do == "check":
            path = self.request.scratch / f"{engine}.safetensors"
            logits = np.array([[1.0, 2.0], [4.0, 3.0]], dtype=np.float32)
            save_file({"0.logits": self.bad.get(f"{engine} outputs", logits)}, path)
            return {"outputs": str(path)}
        facts = {"imports_bytes": 10, "version": "v", "threads": 1, "size_bytes": 5, "details": {}}
        return {"load": facts, "measure": {"ms": [MS[engine]] * 2}, "memory": {"peak_bytes": 110}}.get(do, {})

    def kill(self) -> None:
        self.log.append((self.request.engine, "kill", ""))


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Outcome], list[Any]]]:
    def run(entries: list[Entry], rounds: int = 3, **bad: Any) -> tuple[list[Outcome], list[Any]]:
        log: list[tuple[str, str, str]] = []

        @contextmanager
        def crew() -> Iterator[Callable[[Request], Any]]:
            yield lambda request: FakePeer(request, log, bad)

        monkeypatch.setattr(contest, "crew", crew)
        samples = Samples(WORK[0], WORK[0])
        outcomes = hold(entries, WORK, samples, Settings(rounds), tmp_path, None, contest.Silent())
        return outcomes, log

    return run


def work(name: str, tokens: int) -> Workload:
    ids = np.ones((2, tokens), dtype=np.int64)
    return Workload(name, [{"input_ids": ids, "attention_mask": ids}])


WORK = [work("2x4", 4), work("2x8", 8)]
MODEL = Path("model")


def entries(*engines: str, **more: Any) -> list[Entry]:
    return [Entry("model", MODEL, engine, reference=MODEL, **more) for engine in engines]


def report(outcomes: list[Outcome], **more: Any) -> Report:
    return Report(MACHINE, Settings(3), 0, WORK, outcomes, **more)


def test_turns_are_interleaved_and_rotate(play: Any) -> None:
    _, log = play(entries("torch", "torch-int8", "torch-bf16"))
    turns = [(engine, shape) for engine, do, shape in log if do == "measure"]
    a, b, c = "torch", "torch-int8", "torch-bf16"
    orders = [(a, b, c), (b, c, a), (c, a, b)]
    assert turns == [(engine, shape) for order in orders for shape in ("2x4", "2x8") for engine in order]
    first = log.index(("torch", "measure", "2x4"))
    assert not any(do in ("load", "check", "warm") for _, do, _ in log[first:])


def test_ratios_rates_and_memory(play: Any) -> None:
    outcomes, _ = play(entries("torch-int8", "torch"))
    body = report(outcomes).to_json()
    assert body["schema_version"] == 1 and body["baseline"] == {"model": "model", "engine": "torch"}
    quick, base = body["entries"]
    assert [timing["ratio"] for timing in quick["timings"]] == [2.0, 2.0]
    assert [timing["ratio"] for timing in base["timings"]] == [1.0, 1.0]
    assert quick["timings"][1]["sequences_per_second"] == pytest.approx(2 / 0.004)
    assert quick["timings"][1]["tokens_per_second"] == pytest.approx(16 / 0.004)
    assert quick["above_imports_bytes"] == 100
    assert quick["agreement"]["top1"] == 100 and base["agreement"] is None


@pytest.mark.parametrize("step", ["load", "check", "warm", "measure", "memory"])
def test_an_engine_that_fails_stops_nobody(play: Any, step: str) -> None:
    outcomes, log = play(entries("torch", "torch-int8"), **{"torch-int8": step})
    good, bad = outcomes
    assert good.error is None and len(good.timings["2x8"].rounds) == 3
    assert (bad.error, bad.exit_code, bad.timings) == ("it broke", 4, {})
    assert log.count(("torch-int8", "measure", "2x4")) <= (1 if step == "measure" else 3)
    shown = report(outcomes)
    assert shown.to_json()["entries"][1]["error"] == "it broke"
    assert shown.tables()[-1] == ("Failed", ["model", "engine", "why"], [["model", "torch-int8", "it broke"]])


def test_the_ratio_comes_first(play: Any) -> None:
    outcomes, _ = play(entries("torch", "torch-bf16"))
    title, columns, rows = report(outcomes).tables()[0]
    assert (title, columns[0]) == ("2x4", "ratio")
    assert [row[0] for row in rows] == ["1.00x", "4.00x"]


def test_garbage_has_no_ratio(play: Any) -> None:
    wrong = np.array([[9.0, -9.0], [-9.0, 9.0]], dtype=np.float32)
    outcomes, _ = play(entries("torch", "torch-bf16"), **{"torch-bf16 outputs": 100 * wrong})
    found = report(outcomes)
    assert found.to_json()["entries"][1]["timings"][0]["ratio"] is None
    assert found.tables()[0][2][1][0] == "wrong outputs"


def test_what_is_simulated_has_no_ratio(play: Any) -> None:
    fake = Entry("out", Path("out"), "qtool", ("m",), MODEL, simulated=True)
    outcomes, _ = play([*entries("torch"), fake])
    found = report(outcomes)
    assert found.to_json()["entries"][1]["timings"][0]["ratio"] is None
    assert found.tables()[0][2][1][:3] == ["simulated", "-", "qtool m"]


def test_a_reference_that_nobody_asked_for_is_not_timed(play: Any) -> None:
    own = Entry("out", Path("out"), "qtool", ("m",), MODEL)
    everybody = without_reference([own])
    assert [(entry.engine, entry.folder, entry.timed) for entry in everybody] == [
        ("torch", MODEL, False), ("qtool", Path("out"), True),
    ]  # fmt: skip
    outcomes, log = play(everybody)
    assert not [line for line in log if line[0] == "torch" and line[1] in ("warm", "measure")]
    assert log.index(("torch", "kill", "")) < log.index(("qtool", "measure", "2x4"))
    (entry,) = report(outcomes).to_json()["entries"]
    assert entry["agreement"]["top1"] == 100
    assert without_reference(everybody[1:] + entries("torch")) == everybody[1:] + entries("torch")
