"""The option `--device` of every command, what refuses it, and what `qtool doctor` says of GPUs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda import GPU, emulated_cuda

from qtool.device import usable
from qtool.doctor import diagnose
from qtool.errors import UnavailableError, UsageError
from qtool.kernels import triton

COMMANDS = {
    "quantize": ("quantize", "M", "--method", "ibert"),
    "dry-run": ("quantize", "M", "--method", "ibert", "--dry-run"),
    "calibrate": ("calibrate", "M", "--method", "ibert", "-o", "statistics.safetensors"),
    "run": ("run", "recipe.yaml"),
    "eval": ("eval", "M", "--task", "sst2", "--data", "D"),
    "attention": ("analyze", "attention", "M", "--task", "sst2", "--data", "D", "-o", "study"),
    "heads": ("analyze", "heads", "M", "--task", "sst2", "--data", "D", "-o", "heads"),
}


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a GPU, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton.reason.cache_clear()
    yield
    triton.reason.cache_clear()


@pytest.fixture
def recipe(tiny: Any, desk: Path) -> Path:
    """A recipe for `qtool run`, in the working directory."""
    file = desk / "recipe.yaml"
    file.write_text(
        f"model: {{name: {tiny.model}}}\nmethods: [ibert]\nevaluate: {{task: sst2, data: {tiny.data}}}\n"
        "calibration: {num_samples: 8}\noutput: out\n"
    )
    return file


def test_devices_by_name() -> None:
    assert usable("cpu") == torch.device("cpu") == usable()
    for wrong in ("gpu", "cuda:", "cuda:x", "CUDA", "cpu:0", "mps", ""):
        with pytest.raises(UsageError, match=r"unknown device .*; models compute on cpu, cuda or cuda:N"):
            usable(wrong)
    with emulated_cuda():
        assert usable("cuda") == usable("cuda:0") == GPU
        with pytest.raises(UnavailableError, match="--device cuda:1: there are only cuda:0 to cuda:0 here"):
            usable("cuda:1")
    with emulated_cuda("native"), pytest.raises(UnavailableError, match="QTOOL_BACKEND=native computes on the CPU"):
        usable("cuda")


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_a_device_before_they_work(
    name: str, tiny: Any, recipe: Path, qtool_command: Any, without_gpu: None
) -> None:
    places = {"M": tiny.model, "D": tiny.data}
    command = [places.get(word, word) for word in COMMANDS[name]]
    ended = qtool_command(*command, "--device", "cuda")
    assert ended.code == 4 and len(ended.errors) == 1
    assert ended.errors[0].startswith("--device cuda: torch ") and "leave it out" in ended.errors[0]
    ended = qtool_command(*command, "--device", "gpu")
    assert ended.code == 2 and ended.errors == ["unknown device 'gpu'; models compute on cpu, cuda or cuda:N"]
    assert list(recipe.parent.iterdir()) == [recipe]


def test_run_quantizes_and_scores_on_the_gpu(recipe: Path, qtool_command: Any) -> None:
    with emulated_cuda() as gpu:
        ended = qtool_command("run", recipe, "--device", "cuda", "--json", "-", "-q")
        assert gpu.operations > 1000 and gpu.waits > 0
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["evaluate"]["settings"]["device"] == "cuda:0 (Emulated GPU)"
    report = json.loads((recipe.parent / "out" / "qtool.json").read_text())
    assert "Emulated GPU" in report["fingerprint"]["instruction set"]
    assert "cuda" not in json.dumps(report["recipe"])  # a device is nothing that a recipe says


def test_scores_of_another_device_are_not_kept(tiny: Any, desk: Path, qtool_command: Any) -> None:
    command = ("eval", tiny.model, "--task", "sst2", "--data", tiny.data, "--json", "scores.json", "--resume", "-q")
    devices = []
    for device in ("cpu", "cuda", "cuda"):
        with emulated_cuda() as gpu:
            assert qtool_command(*command, "--device", device).code == 0
            ran = gpu.operations > 0
        devices.append((json.loads((desk / "scores.json").read_text())["settings"]["device"], ran))
    gpu_name = "cuda:0 (Emulated GPU)"
    assert devices == [("cpu", False), (gpu_name, True), (gpu_name, False)]  # the third was known


def test_an_interpreter_of_kernels_is_no_gpu(without_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UnavailableError, match="--device cuda: there is no GPU, and TRITON_INTERPRET=1 interprets"):
        usable("cuda")


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    with emulated_cuda(), pytest.raises(UnavailableError, match="--device cuda: the package triton is not installed"):
        usable("cuda")


def test_the_cpu_side_of_a_run_needs_a_backend_too(tiny: Any, desk: Path, qtool_command: Any) -> None:
    with emulated_cuda("triton"):
        ended = qtool_command("quantize", tiny.model, "--method", "ibert", "--device", "cuda")
    assert ended.code == 4 and ended.errors[0].startswith("QTOOL_BACKEND=triton: a part of this runs on the CPU")


def test_doctor_shows_the_gpu() -> None:
    with emulated_cuda(None):
        found = diagnose()
    assert found["GPU cuda:0"] == "Emulated GPU, compute capability 9.0, 6.4 GB free of 8.6 GB"
    assert found["CUDA"].startswith("torch was built for CUDA 13.0") and found["backend on a GPU"] == "triton"
    assert not found["backend"].startswith("triton")


def test_doctor_says_that_there_is_none(without_gpu: None) -> None:
    found = diagnose()
    assert found["GPU"].startswith("none (torch was built ") and found["backend on a GPU"].startswith("torch ")


def test_a_full_gpu_is_no_bug(tiny: Any, desk: Path, qtool_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("qtool.stream.fill", full)
    ended = qtool_command("quantize", tiny.model, "--method", "ibert", "--set", "calibration.source=random")
    assert ended.code == 4 and ended.errors == [
        "the GPU has not enough memory: take a smaller --batch-size or --max-length, or leave out --device"
    ]
