"""ONNX Runtime, called directly: dynamic INT8 with a scale per channel of the weights, or float32."""

from pathlib import Path
from typing import Any

import onnxruntime

from qtool.bench.batches import Batch
from qtool.bench.machine import has_vnni
from qtool.bench.runtimes import Facts, Request, Stateless

_LARGE = 1_500_000_000  # protobuf ends at 2 GB: larger weights go beside the graph


def imports(request: Request) -> None:
    """The package came with this module."""


def prepare(request: Request) -> None:
    """Export, and quantize where the engine is INT8."""
    from qtool.bench.runtimes.export import files_bytes, onnx_file

    path = onnx_file(request)
    if request.engine == "onnxruntime":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        large = files_bytes(path, _weights_of(path)) > _LARGE
        # 7 bits where sums of pairs would saturate: what its documentation asks for on CPUs without VNNI.
        quantize_dynamic(
            path, _int8_file(request), per_channel=True, weight_type=QuantType.QInt8, reduce_range=not has_vnni(),
            use_external_data_format=large,
        )  # fmt: skip


def load(request: Request) -> "OnnxRunner":
    """A session on the CPU; all other options are the package's own."""
    from onnxruntime import InferenceSession, SessionOptions

    int8 = request.engine == "onnxruntime"
    path = _int8_file(request) if int8 else request.scratch / "model.onnx"
    options = SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = request.threads, 1
    session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    size = sum(file.stat().st_size for file in (path, _weights_of(path)) if file.is_file())
    details = {"weights": f"{7 if int8 and not has_vnni() else 8} bits"} if int8 else {}
    return OnnxRunner(session, Facts(f"onnxruntime {onnxruntime.__version__}", request.threads, size, details))


def _int8_file(request: Request) -> Path:
    return request.scratch / "model-int8.onnx"


def _weights_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


class OnnxRunner(Stateless):
    """An inference session."""

    def __init__(self, session: Any, facts: Facts) -> None:
        self.session, self.facts = session, facts
        self.inputs = {item.name for item in session.get_inputs()}
        self.outputs = [item.name for item in session.get_outputs()]

    def feed(self, batch: Batch, context: int = 0) -> Batch:
        """Only what the graph still takes: an input that nothing reads is left out of it."""
        return {name: value for name, value in batch.items() if name in self.inputs}

    def run(self, feed: Batch) -> Any:
        """All outputs."""
        return self.session.run(None, feed)

    def arrays(self, result: Any) -> dict[str, Any]:
        """By the names of the export."""
        return dict(zip(self.outputs, result, strict=True))
