"""Float models by torch, and artifacts of qtool: both load with plain transformers."""

from pathlib import Path
from typing import Any

import torch
import transformers

import qtool.hf  # artifacts load as ordinary models from here on
from qtool.bench.batches import OUTPUTS, Batch
from qtool.bench.runtimes import Facts, Request
from qtool.checkpoint import load_config
from qtool.errors import InputError
from qtool.evaluation.models import Subject, load_for
from qtool.kernels import backend


def imports(request: Request) -> None:
    """The model's class; packages came with this module."""
    _class_name(request.model)


def prepare(request: Request) -> None:
    """Nothing to make."""


def load(request: Request) -> "TorchRunner":
    """Raises InputError for a model that transformers cannot load."""
    torch.set_num_threads(request.threads)
    dtype = "bfloat16" if request.engine == "torch-bf16" else "float32"
    model = load_model(request.model, dtype)
    facts = Facts(f"torch {torch.__version__}", torch.get_num_threads(), weight_bytes(request.model))
    if request.engine == "qtool":
        facts.version = f"qtool {qtool.__version__}"
        facts.details["backend"] = backend().name
    elif request.engine == "torch-int8":
        model = _dynamic_int8(model)
        facts.details["kernels"] = str(torch.backends.quantized.engine)
        facts.size_bytes = _state_bytes(model)
    elif request.engine == "torch-compile":
        model = torch.compile(model)
    return TorchRunner(model, facts)


def load_model(folder: Path, dtype: str = "float32") -> Any:
    """The model by the class in its config, in eval mode, without a cache for tokens to come."""
    model = load_for(Subject(folder.name, folder, load_config(folder), _class_name(folder)), dtype)
    model.config.use_cache = False
    if getattr(model.config, "pad_token_id", None) is None:  # a decoder's classifier looks for the last other token
        model.config.pad_token_id = 0
    return model


def weight_bytes(folder: Path) -> int:
    """Of the files that hold the weights."""
    from qtool.artifact import size_on_disk

    return size_on_disk(folder)


def _class_name(folder: Path) -> str:
    name = str(load_config(folder).architectures[0])
    if getattr(transformers, name, None) is None:
        raise InputError(f"transformers has no class {name}, which {folder / 'config.json'} names in `architectures`")
    return name


def _dynamic_int8(model: Any) -> Any:
    """Every linear layer with INT8 weights, activations quantized at run time, as torch itself offers it."""
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def _state_bytes(model: Any) -> int:
    """Bytes that the weights of a dynamically quantized model take when saved; packed layers give them up as pairs."""
    found = 0
    stack = list(model.state_dict().values())
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            found += value.numel() * value.element_size()
        elif isinstance(value, tuple):
            stack += value
    return found


class TorchRunner:
    """A model of transformers."""

    def __init__(self, model: Any, facts: Facts) -> None:
        self.model, self.facts = model, facts

    def feed(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Tensors on the same memory."""
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def run(self, feed: dict[str, torch.Tensor]) -> Any:
        """The forward."""
        with torch.inference_mode():
            return self.model(**feed, return_dict=True)

    def arrays(self, result: Any) -> dict[str, Any]:
        """Float32."""
        return {name: result[name].float().numpy() for name in OUTPUTS if result.get(name) is not None}
