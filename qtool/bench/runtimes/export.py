"""A float model as an ONNX file, once for all engines that read it."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from qtool.bench.batches import OUTPUTS
from qtool.bench.runtimes import Request
from qtool.bench.runtimes.torch import load_model


class _Plain(torch.nn.Module):
    """Takes tensors in a fixed order and gives the outputs that are compared."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs in the order of OUTPUTS."""
        found = self.model(**dict(zip(self.names, values, strict=True)), return_dict=True)
        return tuple(found[name] for name in OUTPUTS if found.get(name) is not None)


def onnx_file(request: Request) -> Path:
    """The exported model in `request.scratch`; batch and tokens stay free."""
    path = request.scratch / "model.onnx"
    if not path.is_file():
        unfinished = path.with_name("export") / path.name
        unfinished.parent.mkdir(exist_ok=True)
        _export(request, unfinished)
        for file in unfinished.parent.iterdir():  # weights lie beside the graph: the graph goes last
            if file != unfinished:
                os.replace(file, request.scratch / file.name)
        os.replace(unfinished, path)
    return path


def _export(request: Request, path: Path) -> None:
    model = load_model(request.model)
    # Spelled out, attention takes fewer nodes than what the fused operator is exported as, and runs faster.
    model.set_attn_implementation("eager")
    ids = torch.full((2, 16), 3)
    known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    example = tuple(known[name] for name in request.inputs)
    plain = _Plain(model, request.inputs)
    with torch.inference_mode():
        found = model(**dict(zip(request.inputs, example, strict=True)), return_dict=True)
    outputs = [name for name in OUTPUTS if found.get(name) is not None]
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=request.max_tokens)}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            plain, example, path, dynamo=True, verbose=False, input_names=request.inputs, output_names=outputs,
            dynamic_shapes=((axes,) * len(example),),
        )  # fmt: skip


def files_bytes(*files: Path) -> int:
    """Their size together; those that are not there count nothing."""
    return sum(file.stat().st_size for file in files if file.is_file())
