"""Peaks by arithmetic, from times that are given; the work itself is real and small."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qtool.bench import peaks
from qtool.bench.peaks import Peaks

CPU = torch.device("cpu")


class Given:
    """Every call is made, and takes the next of these milliseconds; for the host it is a fifth of a second."""

    cold = False

    def __init__(self, *ms: float) -> None:
        self.ms, self.results = iter(ms), list[Any]()

    def now(self) -> float:
        return 0.2 * len(self.results)

    def took(self, call: Callable[[], Any]) -> float:
        self.results.append(call())
        return next(self.ms)


def test_the_best_product_counts_once_the_gpu_has_settled() -> None:
    clock = Given(*[0.001] * 3, *[8.0] * 10, 4.0, *[8.0] * 9)
    assert peaks.int8_peak(CPU, 64, clock) == pytest.approx(2 * 64**3 / 0.004)
    assert len(clock.results) == 3 + peaks.CALLS
    made = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-127, 128, (64, 64), dtype=torch.int8, generator=made) for _ in range(2))
    assert clock.results[-1].dtype == torch.int32 and torch.equal(clock.results[-1].long(), a.long() @ b.long().T)


def test_a_copy_counts_what_it_reads_and_what_it_writes() -> None:
    clock = Given(*[9.0] * 3, *[2.0] * 20)
    assert peaks.copy_peak(CPU, 1000, clock) == pytest.approx(2 * 1000 / 0.002)
    assert all(len(result) == 1000 and bool((result == 1).all()) for result in clock.results)


def test_a_copy_takes_a_quarter_of_what_is_free_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "SIDE", 32)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4096, 10000))
    found = peaks.measured(CPU, Given(*[1.0] * 46))
    assert (found.side, found.copied) == (32, 1024)
    assert (found.int8_ops, found.copy_bytes) == (2 * 32**3 / 0.001, 2 * 1024 / 0.001)
    monkeypatch.setattr(peaks, "COPY_BYTES", 100)
    assert peaks.measured(CPU, Given(*[1.0] * 46)).copied == 100


def test_peaks_are_written_and_read_in_their_units() -> None:
    body = Peaks(1.5e15, 2.5e12, 8192, 1 << 30).to_json()
    assert (body["int8_tops"], body["copy_gb_per_second"]) == (1500.0, 2500.0)
    again = Peaks.from_json(body)
    assert again == Peaks(1.5e15, 2.5e12, 8192, 1 << 30)
    assert again.line == (
        "measured peaks, best of 20: INT8 1,500.0 TOP/s (torch._int_mm, 8192 cubed), copy 2,500.0 GB/s "
        "(1,024 MiB, read and written)"
    )
