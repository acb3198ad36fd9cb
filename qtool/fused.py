"""Float encoders with integer weights: their blocks in one native call, inside transformers' own forward.

Everything around the blocks stays transformers'. The module that holds the blocks becomes an instance of a subclass
with the same name, whose forward runs all of them at once where nobody needs to see what happens in between, and the
blocks one by one where somebody does.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch

from qtool import kernels
from qtool.anatomy import FAMILIES
from qtool.nn.plan import NoPlan, SameName, kept_plan

_ROLES = {
    "attention.query": "query", "attention.key": "key", "attention.value": "value", "attention.output": "output",
    "ffn.up": "up", "ffn.down": "down",
}  # fmt: skip


def fuse(model: Any) -> None:
    """Let the blocks of a post-norm encoder run together, in place; other models are left alone."""
    base, config = model.base_model, model.config
    family = FAMILIES.get(config.model_type)
    if family is None or not family.norms or getattr(config, "is_decoder", False):
        return
    if getattr(config, "position_embedding_type", "absolute") not in ("absolute", None):
        return
    holder = base.get_submodule(family.blocks.rpartition(".")[0])
    if not isinstance(holder, FusedEncoder):
        holder.qtool_config = config
        cls: Any = type(holder)
        holder.__class__ = _fused_class(cls)


class FusedEncoder(SameName):
    """Marks the holder of blocks that run together."""


@functools.cache
def _fused_class(cls: Any) -> Any:
    original = cls.forward

    @functools.wraps(original)
    def forward(self: Any, hidden_states: Any, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        if not args and _plain(self, hidden_states, kwargs):
            real = _real_tokens(attention_mask, hidden_states)
            plan = None if real is _UNUSUAL else _plan(self)
            if plan is not None:
                return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=plan.run(hidden_states, real))
        return original(self, hidden_states, attention_mask, *args, **kwargs)

    return SameName.subclass(_fused_class, FusedEncoder, cls, forward)


def _plain(holder: Any, hidden: Any, options: Mapping[str, Any]) -> bool:
    """Whether nothing but the hidden states of an evaluation is asked for."""
    if holder.training or hidden.dtype != torch.float32 or hidden.is_meta:
        return False
    if kernels.backend(hidden.device).name != "native":
        return False
    refused = ("encoder_hidden_states", "past_key_values", "output_attentions", "output_hidden_states")
    return not any(options.get(name) is not None and options[name] is not False for name in refused)


_UNUSUAL: Any = object()


def _real_tokens(mask: Any, hidden: torch.Tensor) -> Any:
    """Boolean `[batch, tokens]` of a mask that is the same for every query, None for no mask, else `_UNUSUAL`."""
    if mask is None:
        return None
    batch, tokens = hidden.shape[:2]
    if not isinstance(mask, torch.Tensor) or mask.shape[0] != batch or mask.shape[-1] != tokens or mask.dim() != 4:
        return _UNUSUAL
    if mask.dtype != torch.bool:  # what is added to scores: 0, or so much less that nothing is left
        allowed = mask == 0
        if not bool((allowed | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
            return _UNUSUAL
        mask = allowed
    real = mask[:, 0, 0]
    return real if bool((mask == real[:, None, None]).all()) else _UNUSUAL


def _plan(holder: Any) -> Any:
    from transformers.activations import ACT2FN

    from qtool.nn.fused import FloatPlan, fits, plain

    config = holder.qtool_config
    family = FAMILIES[config.model_type]
    blocks = list(holder.get_submodule(family.blocks.rpartition(".")[2]))
    heads, activation = config.num_attention_heads, getattr(config, "hidden_act", None) or config.activation

    def make() -> Any:
        parts = [
            {
                **{_ROLES[name]: block.get_submodule(path) for name, path in family.block_parts.items()},
                "attention_norm": block.get_submodule(family.norms["attention"]),
                "ffn_norm": block.get_submodule(family.norms["ffn"]),
            }
            for block in blocks
        ]
        fit = fits(parts, heads, activation) and all(
            plain(block, part, heads, type(ACT2FN[activation])) for block, part in zip(blocks, parts, strict=True)
        )
        return FloatPlan(blocks, parts, heads, activation) if fit else NoPlan(blocks)

    plan = kept_plan(holder, blocks, make)
    return None if isinstance(plan, NoPlan) else plan
