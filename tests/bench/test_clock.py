"""Clocks: what they call and in which order, with a GPU that only keeps a list."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qtool.bench.clock import CudaClock, HostClock, clock_for
from qtool.bench.timing import timed_calls


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a GPU was told. Its own time passes by 2.5 ms with each forward, whatever the host's clock says."""
    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("record")
            self.at = 2.5 * told.count("forward")

        def elapsed_time(self, end: Any) -> float:
            assert told[-1] == "synchronize", "a time is read before the GPU is done"
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: told.append(f"set {device}"))
    size = SimpleNamespace(L2_cache_size=512)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: size)
    return told


ORDER = ["synchronize", "record", "forward", "record", "synchronize"]


def test_events_lie_around_the_forward_on_an_idle_gpu(queue: list[str]) -> None:
    assert CudaClock(torch.device("cpu")).took(lambda: queue.append("forward")) == 2.5
    assert queue == ORDER


def test_every_call_of_a_turn_has_its_own_events(queue: list[str]) -> None:
    clock = CudaClock(torch.device("cpu"))
    found = timed_calls(lambda feed: queue.append("forward"), ["a"], 0.0, clock, lambda feed: queue.append("ready"))
    assert found == [2.5, 2.5]
    assert queue == 3 * ["ready", *ORDER]


def test_a_cold_cache_is_emptied_before_the_first_event(queue: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = CudaClock(torch.device("cpu"), cold=True)
    scrap = clock._scrap
    assert scrap is not None and scrap.nbytes == 1024
    scrap.fill_(7)

    def forward() -> None:
        queue.append("forward")
        assert not scrap.any()

    assert clock.took(forward) == 2.5 and queue == ORDER


def test_the_device_decides(queue: list[str]) -> None:
    assert isinstance(clock_for("cpu"), HostClock) and not queue
    clock = clock_for("cuda:1")
    assert isinstance(clock, CudaClock) and clock.device == torch.device("cuda", 1) and queue == ["set cuda:1"]


def test_the_host_measures_what_passes_in_the_call() -> None:
    times = iter([10.0, 10.25])
    assert HostClock(lambda: next(times)).took(lambda: None) == 250.0
