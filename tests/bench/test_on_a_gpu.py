"""A benchmark of a GPU from its command to its tables, with workers and a GPU that are none."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import qtool.device
from qtool.bench import contest, gpu
from qtool.bench.crew import EngineError
from qtool.bench.peaks import Peaks
from qtool.bench.products import products_of
from qtool.bench.runtimes import Request

GPU = {
    "name": "A GPU", "compute_capability": "9.0", "memory_bytes": 80 << 30, "l2_bytes": 50 << 20,
    "multiprocessors": 132, "cuda": "12.9", "driver": "570.1", "sm_mhz": 1980.0, "max_sm_mhz": 1980.0,
    "memory_mhz": 2619.0, "max_memory_mhz": 2619.0, "power_limit_watts": 700.0, "temperature_celsius": 34.0,
    "utilization_percent": 0.0,
}  # fmt: skip
PEAKS = Peaks(2e12, 1e12, 8192, 1 << 30)
MS = {"torch": 4.0, "torch-bf16": 2.0, "qtool": 1.0}
READ = {"torch": 4_000_000, "torch-bf16": 2_000_000, "qtool": 500_000}


class FakePeer:
    """A worker on a GPU; `requests` is what all of them were told first."""

    def __init__(self, request: Request, peaks: Peaks | None) -> None:
        self.request, self.peaks = request, peaks

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        engine = self.request.engine
        if do == "peaks":
            if self.peaks is None:
                raise EngineError("OutOfMemoryError: none is left")
            return self.peaks.to_json()
        if do == "check":
            path = self.request.scratch / f"{engine}.safetensors"
            save_file({"0.logits": np.array([[1.0, 2.0]], dtype=np.float32)}, path)
            return {"outputs": str(path)}
        facts = {"imports_bytes": 10, "version": "v", "threads": 1, "size_bytes": 5, "details": {"tuned": "yes"}}
        facts["read_bytes"] = READ[engine]
        memory = {"peak_bytes": 110, "gpu_bytes": 3_000_000}
        return {"load": facts, "measure": {"ms": [MS[engine]] * 3}, "memory": memory}.get(do, {})

    def kill(self) -> None:
        """Nothing runs."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Request]]:
    """Makes the GPU, which has these peaks, and gives what its workers are told."""

    def make(peaks: Peaks | None = PEAKS, **more: Any) -> list[Request]:
        requests: list[Request] = []

        @contextmanager
        def crew() -> Iterator[Callable[[Request], Any]]:
            def start(request: Request) -> FakePeer:
                requests.append(request)
                return FakePeer(request, peaks)

            yield start

        monkeypatch.setattr(contest, "crew", crew)
        monkeypatch.setattr(qtool.device, "usable", torch.device)
        monkeypatch.setattr(gpu, "describe", lambda device: {**GPU, **more})
        return requests

    return make


def run(qtool_command: Any, *words: Any) -> Any:
    shared = ("--shapes", "2x8", "--engines", "torch,torch-bf16", "--rounds", 2, "--threads", 1, "--device", "cuda:1")
    return qtool_command("bench", *words, *shared)


def test_rates_beside_the_peaks(tiny: Any, desk: Path, qtool_command: Any, machine: Any) -> None:
    requests = machine()
    ended = run(qtool_command, tiny.model, "--cold-l2", "--json", "-")
    assert ended.code == 0, ended.err
    assert [(request.engine, request.device, request.cold) for request in requests] == [
        ("torch", "cuda:1", False), ("torch", "cuda:1", True), ("torch-bf16", "cuda:1", True),
    ]  # fmt: skip
    body = json.loads(ended.out)
    assert body["machine"]["gpu"] == GPU and body["peaks"] == PEAKS.to_json()
    assert body["settings"]["device"] == "cuda:1" and body["settings"]["cold_l2"] is True
    operations = 2 * products_of(tiny.model).operations(8)
    for entry, seconds, read in zip(body["entries"], (0.004, 0.002), (4e6, 2e6), strict=True):
        assert entry["peak_gpu_bytes"] == 3_000_000
        assert entry["timings"][0]["rates"] == pytest.approx({
            "operations": operations, "tops": operations / seconds / 1e12,
            "tops_of_int8_peak": operations / seconds / 2e12, "weights_gb_per_second": read / seconds / 1e9,
            "weights_of_copy": read / seconds / 1e12,
        })  # fmt: skip
    assert [entry["timings"][0]["ratio"] for entry in body["entries"]] == [1.0, 2.0]


def test_the_table_has_the_ratio_first_and_the_shares_last(
    tiny: Any, desk: Path, qtool_command: Any, machine: Any
) -> None:
    machine()
    ended = run(qtool_command, tiny.model)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    assert any(line.startswith("A GPU, compute capability 9.0, 132 multiprocessors, 80 GiB") for line in lines)
    assert any(line.startswith("measured peaks, best of 20: INT8 2.0 TOP/s") for line in lines)
    head = next(line for line in lines if line.startswith("ratio "))
    assert head.split()[:2] == ["ratio", "rounds"] and head.endswith("TOP/s  of INT8 peak  weights GB/s  of copy")
    row = next(line for line in lines if line.startswith("2.00x"))
    tops = 2 * products_of(tiny.model).operations(8) / 0.002 / 1e12
    assert row.split()[-4:] == [f"{tops:,.2f}", f"{tops / 2:.1%}", "1.0", "0.1%"]
    assert "GPU memory" in ended.out and "3.0 MB" in ended.out and "L2 of 50 MiB warm" in ended.out


def test_without_peaks_there_are_no_shares(tiny: Any, desk: Path, qtool_command: Any, machine: Any) -> None:
    machine(peaks=None, utilization_percent=60.0)
    ended = run(qtool_command, tiny.model)
    assert ended.code == 0
    assert "the peaks of the GPU were not measured: OutOfMemoryError: none is left" in ended.err
    assert "this GPU is busy (60 % used by others)" in ended.err
    row = next(line for line in ended.out.splitlines() if line.startswith("2.00x"))
    assert row.split()[-3:] == ["-", "1.0", "-"]
    assert "the peaks of the GPU were not measured" in ended.out


def test_what_cannot_be_counted_is_said(
    tiny: Any, desk: Path, qtool_command: Any, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise RuntimeError("a forward that looks at values")

    machine()
    monkeypatch.setattr("qtool.bench.products.products_of", fail)
    ended = run(qtool_command, tiny.model)
    assert ended.code == 0 and "are not counted: a forward that looks at values" in ended.err
    row = next(line for line in ended.out.splitlines() if line.startswith("2.00x"))
    assert row.split()[-4:] == ["-", "-", "1.0", "0.1%"]


def test_engines_of_the_cpu_are_refused(tiny: Any, desk: Path, qtool_command: Any, machine: Any) -> None:
    machine()
    ended = qtool_command("bench", tiny.model, "--device", "cuda", "--engines", "onnxruntime")
    assert ended.code == 2 and "engine onnxruntime does not run on cuda" in ended.err
