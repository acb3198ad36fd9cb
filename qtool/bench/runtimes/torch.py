"""Float models by torch and torchao, and artifacts of qtool: all load with plain transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache, StaticCache, StaticLayer

import qtool.hf  # artifacts load as ordinary models from here on
from qtool.bench.batches import OUTPUTS, Batch
from qtool.bench.runtimes import Facts, Request
from qtool.bench.runtimes.weights import read_bytes, state_bytes
from qtool.checkpoint import load_config
from qtool.errors import InputError, UnavailableError
from qtool.evaluation.models import Subject, load_for
from qtool.kernels import backend

MODE = "max-autotune"
"""Of `torch.compile` on a GPU: the products are tuned, and a forward is one CUDA graph. Its strongest."""

STRIDE = 32
"""Compiled for fixed shapes on a GPU, padded batches are padded on to a multiple of so many tokens."""

_SHAPES = 64  # that torch compiles a model for; 8 by itself, and more would then run eagerly without a word


def imports(request: Request) -> None:
    """The model's class; packages came with this module, but for torchao."""
    _class_name(request.model)
    if request.engine == "torchao":
        import torchao.quantization  # noqa: F401


def prepare(request: Request) -> None:
    """Nothing to make."""


def load(request: Request) -> "TorchRunner":
    """Raises InputError for a model that transformers cannot load."""
    torch.set_num_threads(request.threads)
    torch.set_float32_matmul_precision("highest")  # no TF32: what is called float32 is
    device = torch.device(request.device)
    on_gpu = device.type == "cuda"
    dtype = "bfloat16" if request.engine in ("torch-bf16", "torchao") else "float32"
    model = load_model(request.model, dtype).to(device)
    facts = Facts(f"torch {torch.__version__}", torch.get_num_threads(), weight_bytes(request.model))
    if request.engine == "qtool":
        facts.version = f"qtool {qtool.__version__}"
        facts.details["backend"] = backend(device).name
    elif request.engine == "torch-int8":
        model = _dynamic_int8(model)
        facts.details["kernels"] = str(torch.backends.quantized.engine)
        facts.size_bytes = state_bytes(model)
    elif request.engine == "torchao":
        facts.version = _torchao_int8(model)
        facts.size_bytes = state_bytes(model)
    facts.read_bytes = None if request.engine == "torch-int8" else read_bytes(model)
    compiled = request.engine in ("torch-compile", "torchao") or (request.engine == "torch-bf16" and on_gpu)
    if compiled:
        model = _compiled(model, on_gpu)
        facts.details["compiled"] = MODE if on_gpu else "default"
    still = on_gpu and (compiled or request.engine == "qtool")
    return TorchRunner(model, facts, device, compiled and on_gpu, request.max_tokens, still)


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


def _torchao_int8(model: Any) -> str:
    """The same as torchao offers it, in place: a scale per channel and per token. Its version."""
    import torchao
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return f"torchao {torchao.__version__}"


def _compiled(model: Any, on_gpu: bool) -> Any:
    """Compiled at the first forward of each shape."""
    if not on_gpu:
        return torch.compile(model)
    torch._dynamo.config.recompile_limit = _SHAPES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(model, mode=MODE, dynamic=False)


@dataclass(frozen=True)
class Feed:
    """What a forward takes; `width`, the tokens of its outputs that belong to the batch (None: all); and `context`, how
    many its cache holds."""

    inputs: dict[str, Any]
    width: int | None = None
    context: int = 0


class TorchRunner:
    """A model of transformers.

    With `fixed_shapes` it is compiled anew for each shape of a batch. With `static_cache` it decodes behind a cache
    that lies still, as compiled models and recordings of forwards need it.

    `max_tokens` are the model's positions, where it has a limit.
    """

    def __init__(
        self,
        model: Any,
        facts: Facts,
        device: torch.device,
        fixed_shapes: bool = False,
        max_tokens: int | None = None,
        static_cache: bool = False,
    ) -> None:
        self.model, self.facts, self.device = model, facts, device
        self.fixed_shapes, self.static_cache, self.max_tokens = fixed_shapes, static_cache, max_tokens

    def feed(self, batch: Batch, context: int = 0) -> Feed:
        """Tensors on the device; on the CPU, on the same memory.

        Compiled for fixed shapes, a model gets no mask where nothing is padded, so that attention takes its fastest
        way, and where something is, a few shapes serve all batches.
        """
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        if context:
            return self._decoding(tensors["input_ids"].to(self.device), context)
        width = tensors["attention_mask"].shape[1]
        if self.fixed_shapes:
            tensors = fixed(tensors, int(self.model.config.pad_token_id), self.max_tokens)
        return Feed({name: value.to(self.device) for name, value in tensors.items()}, width)

    def _decoding(self, ids: torch.Tensor, context: int) -> Feed:
        """The last token, and a cache of those before."""
        cache = self._cache(ids.shape[1])
        plain = getattr(self.model, "_orig_mod", self.model)
        with torch.inference_mode():
            plain(input_ids=ids[:, :context], past_key_values=cache, use_cache=True)
        return Feed({"input_ids": ids[:, context:], "past_key_values": cache, "use_cache": True}, context=context)

    def _cache(self, tokens: int) -> Any:
        """An empty one for so many tokens, which lies still where it can."""
        config = self.model.config
        if self.static_cache:
            cache = StaticCache(config=config, max_cache_len=tokens)
            if all(type(layer) is StaticLayer for layer in cache.layers):
                return cache
        if self.fixed_shapes:
            raise UnavailableError(f"a {config.model_type} is not compiled for a cache whose layers differ")
        return DynamicCache(config=config)

    def ready(self, feed: Feed) -> None:
        """Take what a call added out of its cache."""
        cache: Any = feed.inputs.get("past_key_values")
        if cache is None:
            return
        if isinstance(cache, StaticCache):
            still: Any = cache.layers  # `StaticLayer` all, see `_cache`
            with torch.inference_mode():
                for layer in still:
                    layer.cumulative_length.fill_(feed.context)
        else:
            cache.crop(feed.context - cache.get_seq_length())

    def run(self, feed: Feed) -> tuple[Any, int | None]:
        """The forward, and the width of the feed."""
        with torch.inference_mode():
            return self.model(**feed.inputs, return_dict=True), feed.width

    def arrays(self, result: tuple[Any, int | None]) -> dict[str, Any]:
        """Float32."""
        outputs, width = result
        found = {name: outputs[name].float().cpu() for name in OUTPUTS if outputs.get(name) is not None}
        return {
            name: (value[:, :width] if name in _BY_TOKEN or value.ndim == 3 else value).numpy()
            for name, value in found.items()
        }


_BY_TOKEN = ("start_logits", "end_logits")
"""Outputs `[sequences, tokens]`; those of three axes have tokens as their second one too."""


def fixed(tensors: dict[str, torch.Tensor], padding: int, max_tokens: int | None) -> dict[str, torch.Tensor]:
    """The batch as a model compiled for fixed shapes takes it: its own tokens, and more of padding behind them.

    A batch padded on the left stays as it is: further padding would move positions.
    """
    mask = tensors["attention_mask"]
    if bool(mask.all()):
        return {name: value for name, value in tensors.items() if name != "attention_mask"}
    if bool((mask[:, 0] == 0).any()):
        return tensors
    width = mask.shape[1]
    more = min(-width % STRIDE, (max_tokens or width + STRIDE) - width)
    fill = {"input_ids": padding}
    return {name: torch.nn.functional.pad(value, (0, more), value=fill.get(name, 0)) for name, value in tensors.items()}
