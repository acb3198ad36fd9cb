"""What a time amounts to beside what a GPU can do: operations and bytes of weights a second."""

from dataclasses import dataclass
from typing import Any

from qtool.bench.batches import Workload
from qtool.bench.peaks import Peaks
from qtool.bench.products import Products
from qtool.bench.timing import Timing, percentile

COLUMNS = ["TOP/s", "of INT8 peak", "weights GB/s", "of copy"]


@dataclass(frozen=True)
class Rates:
    """Of a model on a shape: of its matrix products, and of the weights that each call reads. None is not known."""

    operations: int | None
    operations_per_second: float | None
    bytes_per_second: float | None
    peaks: Peaks | None

    @property
    def of_peak(self) -> float | None:
        """Operations a second as a share of the peak of INT8, whatever the model computes in."""
        return _share(self.operations_per_second, self.peaks.int8_ops if self.peaks else None)

    @property
    def of_copy(self) -> float | None:
        """Bytes a second as a share of what a copy reads and writes: of weights alone, which are only read."""
        return _share(self.bytes_per_second, self.peaks.copy_bytes if self.peaks else None)

    def to_json(self) -> dict[str, Any]:
        """Units are in the names."""
        return {
            "operations": self.operations, "tops": _scaled(self.operations_per_second, 1e12),
            "tops_of_int8_peak": self.of_peak, "weights_gb_per_second": _scaled(self.bytes_per_second, 1e9),
            "weights_of_copy": self.of_copy,
        }  # fmt: skip

    def cells(self) -> list[str]:
        """Under COLUMNS."""
        return [
            _cell(_scaled(self.operations_per_second, 1e12), "{:,.2f}"), _cell(self.of_peak, "{:.1%}"),
            _cell(_scaled(self.bytes_per_second, 1e9), "{:,.1f}"), _cell(self.of_copy, "{:.1%}"),
        ]  # fmt: skip


def rates(
    timing: Timing, workload: Workload, products: Products | None, read_bytes: int | None, peaks: Peaks | None
) -> Rates:
    """By the middle round's time of a pass; operations of padding are nobody's, and count nothing."""
    seconds = percentile(timing.pass_ms, 50) / 1000
    operations = None if products is None else products.of(workload)
    read = None if read_bytes is None else read_bytes * len(workload.batches)
    return Rates(
        operations,
        None if operations is None else operations / seconds,
        None if read is None else read / seconds,
        peaks,
    )


def _share(value: float | None, limit: float | None) -> float | None:
    return None if value is None or limit is None else value / limit


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
