"""How near the kernels come to what the machine can do.

    python benchmarks/kernels.py [--rows 32,128,512] [--json FILE]

For each instruction set of this CPU: the int8 product at the sizes of RoBERTa-base on one thread, timed inside the
library, against a loop of the same multiply-adds that never leaves the registers, in interleaved rounds; then the
product of one row with INT4 weights that lie in memory, in GB/s of weights, against a copy of as many bytes.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qtool.kernels import native
from qtool.kernels.integer import Native
from qtool.numerics import QTensor, QuantSpec

SIZES = ((768, 768), (768, 3072), (3072, 768))  # inputs, outputs
ROUNDS = 7
TABLE_BYTES = 256 << 20  # of INT4 weights and of the copy: more than any cache


def peak(loaded: Any, isa: int) -> float:
    """GOP/s of multiply-adds in registers; an addition and a multiplication are two."""
    products = ctypes.c_int64()
    nanoseconds = loaded.qtool_time_peak(isa, ctypes.c_int64(2_000_000), ctypes.byref(products))
    return 2 * products.value / nanoseconds


def product(loaded: Any, isa: int, rows: int, inputs: int, outputs: int) -> float:
    """GOP/s of the product alone."""
    a = torch.randint(0, 255, (rows, inputs), dtype=torch.uint8)
    w = torch.randint(-127, 128, (outputs * inputs,), dtype=torch.int8)
    out = torch.empty(rows * outputs, dtype=torch.int32)
    repeats = max(3, int(2e9 / (rows * inputs * outputs)))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, w, out)]
    nanoseconds = loaded.qtool_time_product(isa, *pointers[:2], rows, inputs, outputs, pointers[2], repeats)
    return 2 * rows * inputs * outputs * repeats / nanoseconds


def int8_table(loaded: Any, names: tuple[str, ...], rows: list[int]) -> list[dict[str, Any]]:
    """A row for each instruction set, number of rows and size: medians of rounds that alternate with the peak's."""
    table = []
    for name in names:
        isa = native.ISAS.index(name)
        for count in rows:
            for inputs, outputs in SIZES:
                pairs = [(product(loaded, isa, count, inputs, outputs), peak(loaded, isa)) for _ in range(ROUNDS)]
                table.append({
                    "isa": name, "rows": count, "inputs": inputs, "outputs": outputs,
                    "of_peak": statistics.median(found / limit for found, limit in pairs),
                    "gops": statistics.median(found for found, _ in pairs),
                    "peak_gops": statistics.median(limit for _, limit in pairs),
                })  # fmt: skip
    return table


def int4_row() -> dict[str, float]:
    """One token through INT4 weights of groups of 64, out of memory, against a copy; all threads."""
    inputs = outputs = 4096
    count = TABLE_BYTES // (inputs * outputs // 2)
    spec = QuantSpec.parse("int4:group:64:sym")
    first = QTensor.quantize(torch.randn(outputs, inputs), spec, layout="tiled")
    layers = [(Native().prepare(first.codes.clone(), (outputs, inputs), 64)) for _ in range(count)]
    scale = first.params.scale
    x = torch.randn(1, inputs)
    source, target = (torch.ones(TABLE_BYTES, dtype=torch.uint8) for _ in range(2))

    def run() -> None:
        for layer in layers:
            Native().int8_linear(x, layer, scale, None, None)

    seconds = [(_seconds(run), _seconds(lambda: target.copy_(source))) for _ in range(ROUNDS)]
    return {
        "of_copy": statistics.median(copy / found for found, copy in seconds),
        "gb_per_s": statistics.median(TABLE_BYTES / found / 1e9 for found, _ in seconds),
        "copy_gb_per_s": statistics.median(TABLE_BYTES / copy / 1e9 for _, copy in seconds),
    }


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="32,128,512", help="rows of activations [%(default)s]")
    parser.add_argument("--json", type=Path, help="also write the numbers")
    options = parser.parse_args()
    loaded = native.library()
    if loaded is None:
        raise SystemExit(str(native.reason()))
    for name in ("qtool_time_peak", "qtool_time_product"):
        getattr(loaded, name).restype = ctypes.c_int64
    print("CPU:", " ".join(native.cpu_features()))
    table = int8_table(loaded, native.isas(), [int(rows) for rows in options.rows.split(",")])
    print("of peak    GOP/s     peak  instruction set  rows  inputs  outputs")
    for row in table:
        print(
            f"{row['of_peak']:7.1%} {row['gops']:8.1f} {row['peak_gops']:8.1f}  {row['isa']:15s} {row['rows']:5d} "
            f"{row['inputs']:7d} {row['outputs']:8d}"
        )
    int4 = int4_row()
    print(
        f"INT4, one row: {int4['of_copy']:.2f} of a copy's speed, {int4['gb_per_s']:.1f} GB/s of weights "
        f"(copy: {int4['copy_gb_per_s']:.1f} GB/s read)"
    )
    if options.json:
        options.json.write_text(json.dumps({"int8": table, "int4": int4}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
