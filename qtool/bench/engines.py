"""The table of engines: what each one is, what it needs, and the file in `runtimes/` that runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from qtool.errors import UnavailableError, UsageError, one_of

_ONNX = ("onnxruntime", "onnx", "onnxscript")
_OPENVINO = ("openvino", "onnx", "onnxscript")


@dataclass(frozen=True)
class Engine:
    """`runtime` is a module of `qtool.bench.runtimes`; `packages` are those that qtool itself does not bring along."""

    name: str
    runtime: str
    summary: str
    packages: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [package for package in self.packages if find_spec(package) is None]


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("torch", "torch", "float32, eager, scaled dot product attention"),
        Engine("torch-compile", "torch", "float32, torch.compile"),
        Engine("torch-bf16", "torch", "bfloat16 weights and activations, eager"),
        Engine("torch-int8", "torch", "torch's dynamic INT8 linear layers, float32 around them"),
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

DEFAULT = ("torch", "torch-bf16", "torch-int8", "onnxruntime", "openvino")
REFERENCE = "torch"
"""The engine that outputs are compared with."""


def chosen(names: Sequence[str] | None) -> tuple[list[Engine], list[str]]:
    """The engines of these names (None: the default ones that are installed), and a line on each one left out.

    Raises UsageError for an unknown name, UnavailableError where a package is missing for one that was asked for.
    """
    unknown = [name for name in names or () if name not in ENGINES]
    if unknown:
        raise UsageError(one_of(unknown[0], list(ENGINES), "engine"))
    wanted = [ENGINES[name] for name in dict.fromkeys(DEFAULT if names is None else names)]
    lines = {engine.name: _lacks(engine, missing) for engine in wanted if (missing := engine.missing())}
    if lines and names is not None:
        raise UnavailableError("; ".join(lines.values()))
    return [engine for engine in wanted if engine.name not in lines], list(lines.values())


def _lacks(engine: Engine, missing: Sequence[str]) -> str:
    return f"engine {engine.name} needs {', '.join(missing)}: pip install 'qtool[bench]'"
