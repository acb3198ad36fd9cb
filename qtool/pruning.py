"""A model without some of its attention heads: which heads there are, and what becomes of modules and tensors.

A head is what can be taken out of a block as a whole: a head of keys and values together with all the heads of queries
that it serves (one, where keys are not grouped). Removing one takes rows from the query, key and value projections with
their biases, and columns from the output projection; its bias stays, and so do the size of a head and the scale of the
scores. transformers 5 has nothing of the kind left, and its configs know one number of heads for all layers: so modules
are made smaller here, on the skeleton, before weights are loaded into them.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool.anatomy import FAMILIES, Part, Unit, known_blocks, matrix_kind
from qtool.checkpoint import Cut
from qtool.errors import InputError
from qtool.nn.plan import SameName

Gone = Mapping[int, Sequence[int]]
"""Layer → heads that are removed from it, ascending."""

_UNKNOWN = frozenset({"gpt_neox", "gptj"})
"""Types whose attention has a layout or a forward of its own that is not known here."""
_QUERIES = ("num_attention_heads", "num_heads", "n_heads")
_WIDTHS = ("all_head_size", "split_size")
"""Attributes of attention modules: heads of queries, and the channels of all of them."""


def heads_json(gone: Gone) -> dict[str, list[int]]:
    """As config.json records it."""
    return {str(layer): list(heads) for layer, heads in gone.items()}


@dataclass(frozen=True)
class Attention:
    """The attention of a block: `count` heads that give `width` channels of context each, from `size` of a key.

    `path` is the module that attends; the four parts are its projections.
    """

    path: str
    query: Part
    key: Part
    value: Part
    output: Part
    count: int
    size: int
    width: int

    def channels(self, heads: Sequence[int]) -> list[int]:
        """The channels of the context that come from `heads`."""
        return [head * self.width + channel for head in heads for channel in range(self.width)]


def attentions(model: Any) -> list[Attention]:
    """The attention of every block of a whole model (on any device). Raises InputError for a type that is not known."""
    config = model.config
    if config.model_type in _UNKNOWN:
        known = ", ".join(name for name in FAMILIES if name not in _UNKNOWN)
        raise InputError(f"heads of model type '{config.model_type}' cannot be removed; those of {known} can")
    queries = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or queries)
    found = []
    for unit in known_blocks(model):
        parts = {part.name: part for part in unit.parts}
        query, key, value, output = (parts[f"attention.{role}"] for role in ("query", "key", "value", "output"))
        size = _outputs(model, key) // groups
        path = query.path.rpartition(".")[0]
        found.append(Attention(path, query, key, value, output, groups, size, size * (queries // groups)))
    return found


def _outputs(model: Any, part: Part) -> int:
    """Rows of the logical matrix of a part."""
    if part.rows is not None:
        return sum(rows.stop - rows.start for rows in part.rows)
    return int(model.get_submodule(part.path).weight.shape[1 if part.transposed else 0])


def checked(gone: Mapping[int, Sequence[int]], sites: Sequence[Attention]) -> dict[int, list[int]]:
    """`gone` in order, without layers that lose nothing. Raises InputError for what these layers do not have, or where
    nothing or no head at all would be left."""
    ordered: dict[int, list[int]] = {}
    for layer, heads in sorted(gone.items()):
        if not 0 <= layer < len(sites):
            raise InputError(f"heads: there is no layer {layer}; the model's are 0 to {len(sites) - 1}")
        if twice := sorted({head for head in heads if list(heads).count(head) > 1}):
            raise InputError(f"heads: layer {layer} names head {twice[0]} twice")
        count = sites[layer].count
        if wrong := [head for head in heads if not 0 <= head < count]:
            raise InputError(f"heads: layer {layer} has no head {wrong[0]}; its heads are 0 to {count - 1}")
        if heads:
            ordered[layer] = sorted(heads)
    if not ordered:
        raise InputError("heads: no head is to be removed; name some, as in {0: [1, 5]}")
    if sum(map(len, ordered.values())) == sum(site.count for site in sites):
        raise InputError("heads: all heads of all layers would go, and tokens would never see each other; keep some")
    return ordered


def cuts(model: Any, gone: Gone) -> dict[str, Cut]:
    """Of a whole model, what stays of every tensor that loses something, by name."""
    found: dict[str, Cut] = {}
    sites = attentions(model)
    for layer, heads in gone.items():
        site = sites[layer]
        kept = [head for head in range(site.count) if head not in heads]
        rows: dict[str, list[int]] = {}
        for part, width in ((site.query, site.width), (site.key, site.size), (site.value, site.size)):
            rows.setdefault(part.path, []).extend(_rows(part, [h * width + i for h in kept for i in range(width)]))
        for path, own in rows.items():
            transposed = matrix_kind(model.get_submodule(path)) == "conv1d"
            found[f"{path}.weight"] = Cut(1 if transposed else 0, tuple(own))
            if model.get_submodule(path).bias is not None:
                found[f"{path}.bias"] = Cut(0, tuple(own))
        found[f"{site.output.path}.weight"] = Cut(0 if site.output.transposed else 1, tuple(site.channels(kept)))
    return found


def _rows(part: Part, channels: Sequence[int]) -> Iterator[int]:
    """The rows of a module's matrix that are these rows of a part of it."""
    if part.rows is None:
        yield from channels
        return
    rows = [row for stretch in part.rows for row in range(stretch.start, stretch.stop)]
    yield from (rows[channel] for channel in channels)


def shrink(model: Any, gone: Gone) -> None:
    """Give a whole model the modules of one without the heads in `gone`, in place; their tensors are empty ones.

    Raises InputError for heads that the model does not have.
    """
    sites = attentions(model)
    gone = checked(gone, sites)
    for name, cut in cuts(model, gone).items():
        path, _, slot = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, slot)
        shape = [len(cut.kept) if dim == cut.dim else size for dim, size in enumerate(old.shape)]
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        setattr(module, slot, nn.Parameter(new, requires_grad=old.requires_grad))
        _note_shape(module)
    for layer, heads in gone.items():
        _note_heads(model, sites[layer], sites[layer].count - len(heads))


def _note_shape(module: Any) -> None:
    """What Linear and Conv1D know of their weight's shape."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    else:
        module.nx, module.nf = module.weight.shape


def _note_heads(model: Any, site: Attention, kept: int) -> None:
    """What the attention module knows of its heads; one without any gets a forward of its own."""
    module = model.get_submodule(site.path)
    values = {
        **dict.fromkeys(_QUERIES, kept * site.width // site.size),
        **dict.fromkeys(_WIDTHS, kept * site.width),
        "num_key_value_heads": kept,
    }
    for name, value in values.items():
        if name in module.__dict__:
            setattr(module, name, value)
    if not kept:
        inside = site.output.path.removeprefix(f"{site.path}.")
        module.qtool_output = inside if inside != site.output.path else None
        cls: Any = type(module)
        module.__class__ = _headless_class(cls)


class Headless(SameName):
    """Marks an attention that lost all of its heads: nothing of the hidden states but their shape goes through it."""


def is_headless(model: Any, unit: Unit) -> bool:
    """Whether the attention of a block lost all of its heads."""
    return any(isinstance(module, Headless) for path in unit.modules for module in model.get_submodule(path).modules())


@functools.cache
def _headless_class(cls: Any) -> Any:
    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        batch, tokens = hidden_states.shape[:2]
        cache = kwargs.get("past_key_values")
        if cache is not None:  # a cache counts tokens by its first layer's keys, and not by keys without channels
            cache.update(*hidden_states.new_zeros((2, batch, 1, tokens, 1)), self.layer_idx)
        if self.qtool_output is None:  # the projection is run by somebody else, on no channels
            return hidden_states.new_zeros((batch, tokens, 0)), None
        output = self.get_submodule(self.qtool_output)
        out = hidden_states.new_zeros((batch, tokens, hidden_states.shape[-1]))
        return out if output.bias is None else out + output.bias, None

    return SameName.subclass(_headless_class, Headless, cls, forward)
