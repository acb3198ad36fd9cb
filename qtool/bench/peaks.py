"""What a GPU can do at most, measured: INT8 products that are large, and a copy that no cache holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from qtool.bench.clock import Clock

SIDE = 8192
"""Of the square matrices whose product is the peak of INT8."""

COPY_BYTES = 1 << 30
"""Copied at once, or a quarter of the memory that is free where that is less."""

CALLS = 20
"""Of each; the best one counts."""

SETTLING = 0.5
"""Seconds of the same work before, in which kernels load and the clocks of an idle GPU rise."""


@dataclass(frozen=True)
class Peaks:
    """`int8_ops`: operations a second, an addition and a multiplication are two. `copy_bytes`: bytes a second, read
    and written ones together. `side` and `copied` are the sizes that were measured."""

    int8_ops: float
    copy_bytes: float
    side: int
    copied: int

    def to_json(self) -> dict[str, Any]:
        """Units are in the names."""
        return {
            "int8_tops": self.int8_ops / 1e12, "int8_side": self.side, "copy_gb_per_second": self.copy_bytes / 1e9,
            "copy_size_bytes": self.copied, "calls": CALLS,
        }  # fmt: skip

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Peaks":
        """What `to_json` gave."""
        ops, copy = 1e12 * body["int8_tops"], 1e9 * body["copy_gb_per_second"]
        return cls(ops, copy, body["int8_side"], body["copy_size_bytes"])

    @property
    def line(self) -> str:
        """For the head of a report."""
        return (
            f"measured peaks, best of {CALLS}: INT8 {self.int8_ops / 1e12:,.1f} TOP/s (torch._int_mm, {self.side} "
            f"cubed), copy {self.copy_bytes / 1e9:,.1f} GB/s ({self.copied / 2**20:,.0f} MiB, read and written)"
        )


def measured(device: torch.device, clock: Clock) -> Peaks:
    """The peaks of a GPU. Raises torch's OutOfMemoryError where others hold its memory."""
    free, _ = torch.cuda.mem_get_info(device)
    copied = min(COPY_BYTES, free // 4)
    return Peaks(int8_peak(device, SIDE, clock), copy_peak(device, copied, clock), SIDE, copied)


def int8_peak(device: torch.device, side: int, clock: Clock) -> float:
    """Operations a second of the product of two int8 matrices `[side, side]` with int32 sums.

    Random codes, since a GPU draws less power and clocks higher on zeros; the second matrix is column by column, which
    is what the tensor cores of all generations take.
    """
    made = torch.Generator(device).manual_seed(0)
    a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8, device=device, generator=made) for _ in range(2))
    return 2 * side**3 / _best(clock, lambda: torch._int_mm(a, b.t()))


def copy_peak(device: torch.device, size: int, clock: Clock) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes."""
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / _best(clock, lambda: target.copy_(source))


def _best(clock: Clock, call: Callable[[], Any]) -> float:
    """Seconds of the fastest call, once the GPU has settled."""
    began = clock.now()
    clock.took(call)
    while clock.now() - began < SETTLING:
        clock.took(call)
    return min(clock.took(call) for _ in range(CALLS)) / 1000
