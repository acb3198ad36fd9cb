"""What is said of a GPU, with a torch and an nvidia-smi that know one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtool.bench import gpu

PROPERTIES = SimpleNamespace(
    name="A GPU", major=9, minor=0, total_memory=80 * 2**30, L2_cache_size=50 * 2**20, multi_processor_count=132,
    uuid="1234-5678",
)  # fmt: skip
ANSWER = "570.1, 1200, 1980, 2619, 2619, 700.00, 34, 0"


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a program on the path that notes its arguments and prints an answer."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def make(answer: str, status: int = 0) -> Path:
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\necho '{answer}'\nexit {status}\n", "utf-8")
        program.chmod(0o755)
        return tmp_path / "asked"

    return make


def test_driver_clocks_and_power_are_asked_of_this_card_and_never_set(smi: Any) -> None:
    asked = smi(ANSWER)
    found = gpu.describe(torch.device("cuda"))
    assert found == {
        "name": "A GPU", "compute_capability": "9.0", "memory_bytes": 80 * 2**30, "l2_bytes": 50 * 2**20,
        "multiprocessors": 132, "cuda": torch.version.cuda, "driver": "570.1", "sm_mhz": 1200.0, "max_sm_mhz": 1980.0,
        "memory_mhz": 2619.0, "max_memory_mhz": 2619.0, "power_limit_watts": 700.0, "temperature_celsius": 34.0,
        "utilization_percent": 0.0,
    }  # fmt: skip
    words = asked.read_text("utf-8").split()
    assert [word.partition("=")[0] for word in words] == ["--id", "--query-gpu", "--format"]
    assert words[0] == "--id=GPU-1234-5678"


def test_what_it_does_not_know_is_none(smi: Any) -> None:
    smi("570.1, [N/A], 1980, 2619, 2619, [Not Supported], 34, [N/A]")
    found = gpu.describe(torch.device("cuda"))
    assert (found["sm_mhz"], found["power_limit_watts"], found["max_sm_mhz"]) == (None, None, 1980.0)
    assert "SM clock unknown, memory clock 2619 of 2619 MHz; power limit unknown" in gpu.lines(found, False)[1]


@pytest.mark.parametrize(("answer", "status"), [("No devices were found", 6), (ANSWER, 9), ("a, b", 0)])
def test_an_nvidia_smi_that_fails_says_nothing(smi: Any, answer: str, status: int) -> None:
    smi(answer, status)
    assert {gpu.describe(torch.device("cuda"))[name] for name in gpu._FIELDS} == {None}


def test_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpu.describe(torch.device("cuda"))
    assert found["name"] == "A GPU" and found["driver"] is None
    assert "driver unknown" in gpu.lines(found, False)[0]


def test_lines_state_the_cache(smi: Any) -> None:
    smi(ANSWER)
    found = {**gpu.describe(torch.device("cuda")), "cuda": "12.9"}
    first, second, third = gpu.lines(found, cold=False)
    assert first == "A GPU, compute capability 9.0, 132 multiprocessors, 80 GiB, driver 570.1, CUDA 12.9"
    assert second == (
        "SM clock 1200 of 1980 MHz, memory clock 2619 of 2619 MHz; power limit 700 W (before anything ran; nothing was "
        "set)"
    )
    assert "CUDA events" in third and "L2 of 50 MiB warm" in third
    assert "L2 of 50 MiB cold: overwritten before each call" in gpu.lines(found, cold=True)[2]
