"""The forward of an encoder whose modules are integer ones (`qtool.nn.integer`).

transformers builds float masks above the blocks, so the base model's forward is replaced whole; what stands around it
(heads, losses, tuples or dictionaries) stays transformers' own. The model keeps its class: it becomes an instance of a
subclass with the same name.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from qtool.anatomy import FAMILIES, max_tokens
from qtool.errors import InputError
from qtool.nn.integer.embedding import IntEmbeddings
from qtool.nn.integer.module import IntModule, leave
from qtool.nn.integer.plan import planned
from qtool.nn.plan import SameName
from qtool.recorded import arguments, recorded

_INSIDE: ContextVar[bool] = ContextVar("inside a headed model", default=False)
_PLACES = 15  # the pooler ends with i-tanh, in units of 2^-15
_REFUSED = ("inputs_embeds", "output_attentions", "encoder_hidden_states", "encoder_attention_mask", "past_key_values")


def integrate(model: Any) -> None:
    """Give a model of integer modules the forward that goes with them, in place; other models are left alone."""
    base = model.base_model
    if not isinstance(getattr(base, "embeddings", None), IntEmbeddings):
        return
    inside = {id(weight) for weight in base.parameters()}
    foreign = any(
        id(weight) not in inside for weight in model.parameters()
    )  # a float head, to be trained: it gets floats
    for module in dict.fromkeys((base, base if foreign else model)):
        cls: Any = type(module)
        module.__class__ = _base_class(cls) if module is base else _headed_class(cls)


class IntegerEncoder(SameName):
    """Marks a model whose forward is one of this file."""


@functools.cache
def _base_class(cls: Any) -> Any:
    """For a model without a head: inside another one it gives integers."""
    original = cls.forward
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_training(self)
        given = arguments(signature, self, args, kwargs)
        if _INSIDE.get():
            return _base_forward(self, **given)
        return recorded(self, functools.partial(_base_forward, self), given)

    return SameName.subclass(_base_class, IntegerEncoder, cls, forward)


@functools.cache
def _headed_class(cls: Any) -> Any:
    original = cls.forward
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_training(self)

        def run(**given: Any) -> Any:
            with _inside():
                return original(self, **given)

        return recorded(self, run, arguments(signature, self, args, kwargs))

    return SameName.subclass(_headed_class, IntegerEncoder, cls, forward)


@contextmanager
def _inside() -> Iterator[None]:
    token = _INSIDE.set(True)
    try:
        yield
    finally:
        _INSIDE.reset(token)


def _base_forward(
    model: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    token_type_ids: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    **others: Any,
) -> Any:
    """ids `[batch, tokens]` → hidden states and pooled output: integers inside a headed model, else floats."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    _refuse(model, input_ids, attention_mask, others)
    assert input_ids is not None
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    wanted = model.config.output_hidden_states if output_hidden_states is None else output_hidden_states
    blocks = list(model.get_submodule(FAMILIES[model.config.model_type].blocks))
    projection = getattr(model, "embeddings_project", None)
    plan = None if wanted else planned(model.embeddings, projection, blocks)
    if plan is not None:
        states = []
        last = plan.run(model.embeddings.ids(input_ids, token_type_ids, position_ids), real)
    else:
        hidden = model.embeddings(input_ids, token_type_ids, position_ids)
        states = [hidden if projection is None else projection(hidden)]
        for block in blocks:
            states.append(block(states[-1], real))
        last = states[-1] * real.unsqueeze(-1).int()  # what stands at padding is nobody's business: zero

    inner, outer = model.embeddings.exponents

    def floats(x: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
        return leave(x, exponent, model.embeddings.output_dtype)

    hidden_states = (*(floats(state, inner) for state in states[:-1]), floats(last, outer)) if wanted else None
    pooler = getattr(model, "pooler", None)
    if isinstance(pooler, IntModule):
        pooled = pooler(last)
        pooled = pooled if _INSIDE.get() else floats(pooled, torch.full((), _PLACES, device=pooled.device))
    else:  # none, or a new float one that transformers adds to a model that had none
        pooled = None if pooler is None else pooler(floats(last, outer))
    if not _INSIDE.get():
        last = floats(last, outer)
    output = BaseModelOutputWithPooling(
        last_hidden_state=last,
        pooler_output=pooled,
        hidden_states=hidden_states,
    )
    as_dict = model.config.return_dict if return_dict is None else return_dict
    return output if as_dict else output.to_tuple()


def _refuse(model: Any, ids: torch.Tensor | None, mask: torch.Tensor | None, others: dict[str, Any]) -> None:
    """Raises InputError for what an integer encoder cannot honour."""
    name = type(model).__name__
    if model.config.output_attentions and others.get("output_attentions") is None:
        others = {**others, "output_attentions": True}
    asked = [key for key in _REFUSED if others.get(key) is not None and others[key] is not False]
    if asked or ids is None:
        raise InputError(f"an integer {name} takes input_ids" + (f" and no {', '.join(asked)}" if asked else ""))
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise InputError(f"an integer {name} takes ids [batch, tokens] with at least one token, not {list(ids.shape)}")
    if mask is not None and mask.shape != ids.shape:
        raise InputError(
            f"an integer {name} takes an attention mask [batch, tokens] as its ids are, not {list(mask.shape)}"
        )
    limit = max_tokens(model.config)
    if limit is not None and ids.shape[1] > limit:
        raise InputError(f"{ids.shape[1]} tokens are more than the {limit} that {name} has positions for; cut the text")


def _refuse_training(model: Any) -> None:
    if model.training:
        raise InputError(f"an integer {type(model).__name__} cannot be trained; call model.eval() first")
