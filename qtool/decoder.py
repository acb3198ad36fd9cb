"""Float decoders with integer weights: a block in few calls of kernels, around transformers' own cache and attention.

A block becomes an instance of a subclass with the same name. Its forward joins what lies before and behind the
attention where nothing is lost by it, and calls the modules one by one elsewhere. What a block computes is known from
transformers' source by architecture, so that only blocks of `_OPTIONS` are joined.
"""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.anatomy import FAMILIES
from qtool.kernels.triton.tuning import FEW_ROWS
from qtool.nn.attention import CHILD, QAttention
from qtool.nn.codes import CODES_CHILD, CodedAttention
from qtool.nn.decoder import DecoderPlan, Heads, Parts, fits_native, heads_of
from qtool.nn.plan import NoPlan, SameName, kept_plan
from qtool.nn.step import StepPlan, fits_step

_ROLES = {
    "attention.query": "query", "attention.key": "key", "attention.value": "value", "attention.output": "output",
    "ffn.gate": "gate", "ffn.up": "up", "ffn.down": "down",
}  # fmt: skip
_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
_OPTIONS: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    "llama": lambda attention: {},
    "mistral": lambda attention: {"sliding_window": getattr(attention.config, "sliding_window", None)},
    "qwen2": lambda attention: {"sliding_window": attention.sliding_window},
}
"""By `config.model_type`, what the attention function is given beside what all are."""


_PLANS: Mapping[str, tuple[Any, Callable[[Mapping[str, Any]], bool]]] = {
    "native": (DecoderPlan, fits_native), "triton": (StepPlan, fits_step)
}  # fmt: skip
"""By backend, how a block is joined, and whether its linears fit."""


def join(model: Any) -> None:
    """Let each block of a decoder run joined, in place; other models are left alone."""
    kind = model.config.model_type
    if kind not in _OPTIONS:
        return
    layers: Any = model.base_model.get_submodule(FAMILIES[kind].blocks)
    for layer in layers:
        if not isinstance(layer, JoinedLayer):
            cls: Any = type(layer)
            layer.__class__ = _joined_class(cls)


class JoinedLayer(SameName):
    """Marks a block that runs joined."""


@functools.cache
def _joined_class(cls: Any) -> Any:
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        angles: Any = kwargs.get("position_embeddings")
        plan = None if args or angles is None else _plan(self, hidden_states, angles)
        if plan is None:
            return original(self, hidden_states, *args, **kwargs)
        return plan.back(
            _attend(self.self_attn, plan.front(hidden_states, angles[0], angles[1]), kwargs), hidden_states
        )

    return SameName.subclass(_joined_class, JoinedLayer, cls, forward)


def _plan(layer: Any, hidden: Any, angles: Any) -> DecoderPlan | StepPlan | None:
    """How to join the layer for these inputs; None where that cannot give what its modules give."""
    name = kernels.backend(hidden.device).name
    if name not in _PLANS or layer.training or layer.self_attn.training:
        return None
    if name == "triton" and not 0 < hidden.shape[:-1].numel() <= FEW_ROWS:  # with more it waits for more than weights
        return None
    plan: Any = kept_plan(layer, [layer], lambda: _made(layer, name), backends=tuple(_PLANS))
    return None if plan is None or isinstance(plan, NoPlan) or not _plain(hidden, angles, plan.heads) else plan


def _plain(hidden: Any, angles: Any, heads: Heads) -> bool:
    """Whether rows and angles are what the kernels read: float32 in the same memory, an angle for every token.

    Products on codes pass no gradient on, but what goes around them does.
    """
    if hidden.dim() != 3 or len(angles) != 2 or (hidden.requires_grad and torch.is_grad_enabled()):
        return False
    batch, tokens = hidden.shape[:2]
    wanted = ((1, tokens, heads.size), (batch, tokens, heads.size))
    if any(angle.shape not in wanted or angle.shape != angles[0].shape for angle in angles):
        return False
    return all(x.dtype == torch.float32 and x.device == hidden.device and not x.is_meta for x in (hidden, *angles))


def _attend(attention: Any, states: tuple[torch.Tensor, ...], given: Mapping[str, Any]) -> torch.Tensor:
    """What the attention module does between its projections, with what a block gives it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for check in attention._forward_pre_hooks.values():  # nothing but these: `watched` looked
        check(attention, ())
    query, key, value = states
    options = {"position_ids": None, "use_cache": False, **given}
    mask, cache = options.pop("attention_mask", None), options.pop("past_key_values", None)
    del options["position_embeddings"]
    if cache is not None:
        key, value = cache.update(key, value, attention.layer_idx)
    config = attention.config
    eager = sys.modules[type(attention).__module__].eager_attention_forward
    function = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    options |= _OPTIONS[config.model_type](attention)
    context, _ = function(attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling, **options)
    for check in attention._forward_hooks.values():
        check(attention, (), None)
    found: torch.Tensor = context.reshape(*context.shape[:2], -1)
    return found


def _made(layer: Any, backend: str) -> DecoderPlan | StepPlan | NoPlan:
    """A backend's plan for a layer that its family describes and that holds nothing else."""
    kind = layer.self_attn.config.model_type
    parts = {_ROLES[name]: layer.get_submodule(path) for name, path in FAMILIES[kind].block_parts.items()}
    parts |= {role: layer.get_submodule(path) for path, role in _NORMS.items()}
    activation = _activation(layer.mlp.act_fn)
    if activation is None or not _holds_only(layer, parts, kind):
        return NoPlan([layer])
    cls, fits = _PLANS[backend]
    heads = heads_of(parts, layer.self_attn.head_dim, fits)
    made: DecoderPlan | StepPlan | NoPlan = NoPlan([layer]) if heads is None else cls(layer, parts, heads, activation)
    return made


def _activation(module: nn.Module) -> str | None:
    from transformers.activations import ACT2FN

    if type(module) is nn.SiLU:
        return "silu"
    return next((name for name in ("silu", "gelu") if type(module) is type(ACT2FN[name])), None)


def _holds_only(layer: Any, parts: Parts, kind: str) -> bool:
    """Whether a layer is made of transformers' own modules, `parts`, an activation and attention on codes."""
    theirs = (layer.self_attn, layer.mlp, parts["attention_norm"], parts["ffn_norm"])
    classes = (type(layer).__mro__[3], *map(type, theirs))
    if any(cls.__module__ != f"transformers.models.{kind}.modeling_{kind}" for cls in classes):
        return False
    known = {id(module) for module in (layer, *theirs, *parts.values(), layer.mlp.act_fn)}
    added = (layer.self_attn._modules.get(name) for name in (CHILD, CODES_CHILD))
    known |= {id(child) for child in added if isinstance(child, QAttention | CodedAttention)}
    return {id(module) for module in layer.modules()} == known
