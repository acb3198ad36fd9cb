"""OpenVINO, called directly: INT8 by NNCF's post-training quantization, float32, or bfloat16."""

from pathlib import Path
from typing import Any

import openvino

from qtool.bench.batches import Batch, read
from qtool.bench.runtimes import Facts, Request, Stateless

_PRECISION = {
    "openvino-fp32": {"INFERENCE_PRECISION_HINT": "f32"},
    "openvino-bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
}


def imports(request: Request) -> None:
    """The package came with this module."""


def prepare(request: Request) -> None:
    """Export, convert, and quantize where the engine is INT8."""
    from qtool.bench.runtimes.export import onnx_file

    model = openvino.convert_model(onnx_file(request))
    if request.engine == "openvino":
        model = _quantized(model, request)
    openvino.save_model(model, _file(request), compress_to_fp16=False)


def _quantized(model: Any, request: Request) -> Any:
    import nncf

    inputs = {item.any_name for item in model.inputs}
    samples = [
        {name: value for name, value in batch.items() if name in inputs} for batch in read(request.calibration).batches
    ]
    return nncf.quantize(
        model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
    )  # fmt: skip


def load(request: Request) -> "OpenVinoRunner":
    """Compiled for the latency of one request; what the precision is in the end is among the details."""
    path = _file(request)
    choices = {"INFERENCE_NUM_THREADS": request.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", {**choices, **_PRECISION.get(request.engine, {})})
    size = sum(file.stat().st_size for file in (path, path.with_suffix(".bin")))
    threads = int(compiled.get_property("INFERENCE_NUM_THREADS"))
    precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    version = f"openvino {openvino.__version__.split('-')[0]}"
    return OpenVinoRunner(compiled, Facts(version, threads, size, {"float part": precision}))


def _file(request: Request) -> Path:
    name = "model-int8.xml" if request.engine == "openvino" else "model-float.xml"
    return request.scratch / name


class OpenVinoRunner(Stateless):
    """A compiled model and one request."""

    def __init__(self, compiled: Any, facts: Facts) -> None:
        self.request, self.facts = compiled.create_infer_request(), facts
        self.inputs = {item.any_name for item in compiled.inputs}
        self.outputs = [item.any_name for item in compiled.outputs]

    def feed(self, batch: Batch, context: int = 0) -> Batch:
        """Only what the graph still takes."""
        return {name: value for name, value in batch.items() if name in self.inputs}

    def run(self, feed: Batch) -> Any:
        """All outputs; inputs are not copied."""
        return self.request.infer(feed, share_inputs=True)

    def arrays(self, result: Any) -> dict[str, Any]:
        """By the names of the export, copied: the request writes over its own memory."""
        return {name: result[name].copy() for name in self.outputs}
