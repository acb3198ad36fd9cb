"""The forward of a whole model as a CUDA graph, where nothing is asked for but what its head says."""

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.anatomy import FAMILIES
from qtool.nn.integer.module import gives_integers
from qtool.nn.module import fleeting
from qtool.nn.plan import Plan, SameName, kept_plan

_READ = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "cache_position"})
_STEPS = frozenset({"gpt2", "gpt_neox", "llama", "mistral", "qwen2"})
"""Decoders whose step waits for nothing on the host; OPT's counts its positions there."""
_KNOWN = frozenset({"torch", "transformers", "qtool"})
_SEEN_INSIDE = ("output_hidden_states", "output_attentions")


class GraphPlan(Plan):
    """Recordings of a model's forward, as long as all of its modules and tensors are what they were.

    A recording also reads what modules have made of their weights, plans of encoders and operands of products: these
    are kept here, and recordings end when a module has made them anew, as it does after a move.
    """

    runs_checks = True  # all of them look at settings that a recording belongs to, see `_Call.key`

    def __init__(self, model: Any) -> None:
        from qtool.kernels.triton.graphs import Graphs

        super().__init__([model], ("training",), called=True)
        self.graphs = Graphs()
        self.foreign = any(cls.__module__.partition(".")[0] not in _KNOWN for cls in self._classes)
        """Whether a module is of a class that may go by more than its tensors, as adapters that are switched off do."""
        self._made: list[tuple[dict[str, Any], str, Any]] = []
        self._dtypes = [(own, own.get("output_dtype")) for own in self._own]  # moves change it where no tensor changes

    def note(self) -> None:
        """Keep what modules have made by now."""
        names = ("_plan", "_operand")
        self._made = [(own, name, own[name]) for own in self._own for name in names if own.get(name) is not None]

    def holds(self, roots: Sequence[nn.Module]) -> bool:
        """See `Plan`; also whether modules have what they had made."""
        if not super().holds(roots) or any([own.get("output_dtype") is not dtype for own, dtype in self._dtypes]):
            return False
        return all([own.get(name) is value for own, name, value in self._made])


class Recorded(SameName):
    """Marks a float model whose forward is recorded."""


def record(model: Any) -> None:
    """Let the forward of a model that computes with floats between integer products be recorded, in place.

    An encoder is recorded as it is called. Of a decoder only a step is: one token a sequence behind a static cache,
    which lies in the same place from call to call.
    """
    if not isinstance(model, Recorded):
        cls: Any = type(model)
        model.__class__ = _recorded_class(cls)


@functools.cache
def _recorded_class(cls: Any) -> Any:
    original = cls.forward
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not any(_is_on_gpu(value) for value in (*args, *kwargs.values())):
            return original(self, *args, **kwargs)
        return recorded(self, functools.partial(original, self), arguments(signature, self, args, kwargs))

    return SameName.subclass(_recorded_class, Recorded, cls, forward)


def arguments(
    signature: inspect.Signature, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call of a model's forward by name."""
    given = dict(signature.bind(model, *args, **kwargs).arguments)
    del given["self"]
    return {**given.pop("kwargs", {}), **given}


def recorded(model: Any, forward: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """`forward(**given)`, recorded and played again where it can be.

    It cannot where somebody watches modules, wants to see inside or a loss, or records a graph of his own.
    """
    call = _Call.of(given)
    if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda") or not call.recordable(model):
        return forward(**given)
    plan = kept_plan(model, [model], lambda: GraphPlan(model), backends=("triton",))
    if plan is None or plan.foreign:
        return forward(**given)

    def run(**own: torch.Tensor) -> Any:
        output = call.run(forward, own)
        plan.note()
        return output

    result = plan.graphs.call(run, call.tensors, call.key(model.config))
    if call.cache is not None:
        result["past_key_values"] = call.cache
    return result


@dataclass(frozen=True)
class _Call:
    """What a forward is asked: tensors that are read, a cache that is written, and settings."""

    tensors: dict[str, torch.Tensor]
    words: dict[str, Any]
    cache: Any

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "_Call":
        """All that is not None."""
        asked = {name: value for name, value in given.items() if value is not None}
        tensors = {name: value for name, value in asked.items() if isinstance(value, torch.Tensor)}
        cache = asked.pop("past_key_values", None)
        return cls(tensors, {name: value for name, value in asked.items() if name not in tensors}, cache)

    def recordable(self, model: Any) -> bool:
        """See `recorded`."""
        config, words = model.config, self.words
        if "input_ids" not in self.tensors or not self.tensors.keys() <= _READ:
            return False
        if any(not isinstance(value, bool | int) for value in words.values()) or fleeting() or gives_integers():
            return False
        if any(words.get(name, getattr(config, name, False)) for name in _SEEN_INSIDE):
            return False
        if not _has_known_attention(config):
            return False
        if not (_is_encoder(config) if self.cache is None else self._is_step(config)):
            return False
        return kernels.backend(self.tensors["input_ids"].device).name == "triton" and _on_gpu(self.tensors)

    def _is_step(self, config: Any) -> bool:
        """Whether one token comes behind a cache whose tensors stay where they are."""
        from transformers.cache_utils import StaticCache, StaticLayer

        if config.model_type not in _STEPS or _moves_angles(config):
            return False
        if not self.words.get("return_dict", config.return_dict):
            return False
        if type(self.cache) is not StaticCache or self.cache.offloading:  # such layers come and go
            return False
        if self.tensors["input_ids"].shape[1:] != (1,):
            return False
        return all(type(layer) is StaticLayer and layer.is_initialized for layer in self.cache.layers)

    def key(self, config: Any) -> Hashable:
        """What a recording depends on beside the shapes of `tensors`: settings, and where the cache lies."""
        places = [
            (tensor.data_ptr(), tensor.shape, tensor.dtype)
            for layer in (() if self.cache is None else self.cache.layers)
            for tensor in (layer.keys, layer.values, layer.cumulative_length)
        ]
        settings = config.return_dict, getattr(config, "use_cache", None), *_attention(config), *_torch_settings()
        return (*settings, *sorted(self.words.items()), *places)

    def run(self, forward: Callable[..., Any], own: Mapping[str, torch.Tensor]) -> Any:
        """The output for `own` in place of `tensors`, without the cache, which a recording must not keep alive."""
        if self.cache is None:
            return forward(**self.words, **own)
        output = forward(**self.words, **own, past_key_values=self.cache)
        return type(output)(**{name: value for name, value in output.items() if name != "past_key_values"})


def _moves_angles(config: Any) -> bool:
    """Whether rotary angles are changed by how long the text is: transformers then looks, or writes, each time."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for each type of layer, in some
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _attention(config: Any) -> tuple[Any, ...]:
    """Which one is computed: its name, and what that stands for where somebody registered another."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = config._attn_implementation
    return name, ALL_ATTENTION_FUNCTIONS.get(name)


def _torch_settings() -> tuple[Any, ...]:
    """What decides which kernels torch takes for the same tensors."""
    cuda = torch.backends.cuda
    return (
        # Known since torch 2.9; before, this is what decides.
        getattr(cuda.matmul, "fp32_precision", None) or torch.get_float32_matmul_precision(),
        *(cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction),
        *(getattr(cuda.matmul, "allow_fp16_accumulation", None), torch.are_deterministic_algorithms_enabled()),
        *(cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()),
        *(cuda.cudnn_sdp_enabled(), cuda.preferred_blas_library()),
    )


def _is_encoder(config: Any) -> bool:
    """Whether nothing of a call is left for the next one."""
    family = FAMILIES.get(config.model_type)
    return family is not None and not family.decoder and not getattr(config, "is_decoder", False)


def _has_known_attention(config: Any) -> bool:
    """Whether attention is torch's or qtool's own; others look on the host for where padding is."""
    from qtool.hf import CODES, REPEATABLE  # which imports this file

    return config._attn_implementation in ("eager", "sdpa", REPEATABLE, CODES)


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda


def _on_gpu(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors are there, and nobody else is recording."""
    return all(x.is_cuda for x in tensors.values()) and not torch.cuda.is_current_stream_capturing()
