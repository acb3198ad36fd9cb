"""The table of engines: what each one is, what it needs, and the file in `runtimes/` that runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from qtool.errors import UnavailableError, UsageError, one_of

_ONNX = ("onnxruntime", "onnx", "onnxscript")
_BOTH = ("cpu", "cuda")
_OPENVINO = ("openvino", "onnx", "onnxscript")


@dataclass(frozen=True)
class Engine:
    """`runtime` is a module of `qtool.bench.runtimes`; `packages` are those that qtool itself does not bring along.

    `devices` are the types of device that it runs on.
    """

    name: str
    runtime: str
    summary: str
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("torch", "torch", "float32 (no TF32), eager, scaled dot product attention", devices=_BOTH),
        Engine("torch-compile", "torch", "float32 (no TF32), torch.compile", devices=_BOTH),
        Engine("torch-bf16", "torch", "bfloat16; eager on the CPU, compiled on a GPU", devices=_BOTH),
        Engine("torch-int8", "torch", "torch's dynamic INT8 linear layers, float32 around them"),
        Engine("torchao", "torch", "torchao's dynamic INT8 linear layers, bfloat16, compiled", ("torchao",), ("cuda",)),
        Engine("onnxruntime", "onnxruntime", "dynamic INT8 per channel", _ONNX),
        Engine("onnxruntime-fp32", "onnxruntime", "float32", _ONNX),
        Engine("openvino", "openvino", "INT8 by NNCF, calibrated; the rest as OpenVINO chooses", (*_OPENVINO, "nncf")),
        Engine("openvino-fp32", "openvino", "float32", _OPENVINO),
        Engine("openvino-bf16", "openvino", "bfloat16 arithmetic", _OPENVINO),
    )
}
"""The engines that run float models."""

QTOOL = Engine("qtool", "torch", "an artifact of qtool on its own kernels")
"""What runs an artifact."""

DEFAULTS = {
    "cpu": ("torch", "torch-bf16", "torch-int8", "onnxruntime", "openvino"),
    "cuda": ("torch", "torch-bf16", "torchao"),
}
"""What runs without a word of the user, by the type of the device."""

REFERENCE = "torch"
"""The engine that outputs are compared with."""


def chosen(names: Sequence[str] | None, device: str = "cpu") -> tuple[list[Engine], list[str]]:
    """The engines of these names (None: the default ones that are installed), and a line on each one left out.

    `device` is a type of device. Raises UsageError for an unknown name and for an engine that does not run there,
    UnavailableError where a package is missing for one that was asked for.
    """
    unknown = [name for name in names or () if name not in ENGINES]
    if unknown:
        raise UsageError(one_of(unknown[0], list(ENGINES), "engine"))
    wanted = [ENGINES[name] for name in dict.fromkeys(DEFAULTS[device] if names is None else names)]
    for engine in wanted:
        if device not in engine.devices:
            able = ", ".join(name for name, other in ENGINES.items() if device in other.devices)
            raise UsageError(f"engine {engine.name} does not run on {device}; those that do: {able}")
    lines = {engine.name: _lacks(engine, missing) for engine in wanted if (missing := engine.missing())}
    if lines and names is not None:
        raise UnavailableError("; ".join(lines.values()))
    return [engine for engine in wanted if engine.name not in lines], list(lines.values())


def with_cache(engines: Sequence[Engine], shape: str, named: bool) -> tuple[list[Engine], list[str]]:
    """Those that can decode behind a cache, and a line on each other one.

    Raises UsageError for one that cannot where the user named the engines.
    """
    lines = [
        f"engine {engine.name} keeps no cache, which shape {shape} takes"
        for engine in engines
        if engine.runtime != QTOOL.runtime
    ]
    if lines and named:
        raise UsageError(f"{lines[0]}; leave out the engine or the shape")
    return [engine for engine in engines if engine.runtime == QTOOL.runtime], lines


def _lacks(engine: Engine, missing: Sequence[str]) -> str:
    return f"engine {engine.name} needs {', '.join(missing)}: pip install 'qtool[bench]'"
