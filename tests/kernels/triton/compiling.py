"""Compile every kernel that a set of calls launches, for GPUs that need not be here; run as a script.

Prints a JSON object: for each kernel and compute capability what kinds of instructions its PTX holds. Launches are
those of the product's own code, so that types, constants and None arguments are what a user's GPU is given.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qtool.kernels.triton import tuning

Launch = tuple[Any, dict[str, Any]]
TYPES = {
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
    torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "num_ctas", "maxnreg")
TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")
FLOATS = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z0-9_.]*\.(?:f16|f16x2|bf16|bf16x2|tf32|f32|f64)[a-z0-9_.]*)\s", re.M)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches are noted, and do nothing."""
    found: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = [param.name for param in self.params]
        found.append((self, {**dict(zip(names, args, strict=False)), **kwargs}))

    original = triton.runtime.JITFunction.run
    triton.runtime.JITFunction.run = run
    try:
        yield found
    finally:
        triton.runtime.JITFunction.run = original


class Form:
    """What a launch is compiled from: equal launches have one."""

    def __init__(self, launch: Launch) -> None:
        self.kernel, given = launch
        self.signature: dict[str, str] = {}
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}
        self.options = {name: given[name] for name in OPTIONS if name in given}
        for place, param in enumerate(self.kernel.params):
            self._take(place, param, given[param.name])
        self.key = repr((self.kernel.__name__, self.signature, self.constants, self.attributes, self.options))

    def _take(self, place: int, param: Any, value: Any) -> None:
        whole = type(value) is int and not param.do_not_specialize
        if param.is_constexpr or value is None or value is True or (whole and value == 1):
            self.signature[param.name], self.constants[(place,)] = "constexpr", value
            return
        if isinstance(value, torch.Tensor):
            self.signature[param.name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, float):
            self.signature[param.name] = "fp32"
        else:
            self.signature[param.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        if isinstance(value, torch.Tensor) or (whole and value % 16 == 0):
            self.attributes[(place,)] = [["tt.divisibility", 16]]

    def compiled(self, capability: int) -> str:
        """The PTX; ptxas has made machine code of it, too."""
        source = ASTSource(self.kernel, signature=self.signature, constexprs=self.constants, attrs=self.attributes)
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=self.options)
        assert result.asm["cubin"]
        ptx: str = result.asm["ptx"]
        return ptx


def look(ptx: str) -> dict[str, Any]:
    """What kinds of instructions there are."""
    return {"tensor_cores": bool(TENSOR_CORES.search(ptx)), "floats": sorted({*FLOATS.findall(ptx)})}


def report(calls: Callable[[], None], capabilities: dict[int, int]) -> dict[str, Any]:
    """By kernel, capability and form; `capabilities` map to the generation whose tiles they get."""
    found: dict[str, Any] = {}
    for capability, generation in capabilities.items():
        tuning.machine = lambda generation=generation: (generation, 108)
        with recording() as launches:
            calls()
        for form in {form.key: form for form in map(Form, launches)}.values():
            seen = look(form.compiled(capability))
            found.setdefault(form.kernel.__name__, {}).setdefault(str(capability), []).append(seen)
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    calls = __import__(sys.argv[1]).calls
    json.dump(report(calls, {int(name): int(name) // 10 for name in sys.argv[2:]}), sys.stdout)
