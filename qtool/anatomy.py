"""What a model is made of: an ordered list of units, each with named parts.

A unit is what is loaded, calibrated and lowered at a time: the embeddings, each block, the head. A part is a weight
matrix inside a unit: `(module, rows, transposed)`, so that a fused q|k|v or a Conv1D `[in, out]` is described here and
nowhere else. Adding an architecture adds a row to `FAMILIES`; a type without one gets a generic anatomy.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qtool.errors import InputError

Kind = Literal["embeddings", "block", "head"]


@dataclass(frozen=True)
class Part:
    """A weight matrix of logical shape `[out_features, in_features]`, stored as `[in, out]` when `transposed`.

    Several parts may share a module: `rows` then says which rows of the logical matrix, in this order, are this part.
    """

    name: str
    path: str
    rows: tuple[slice, ...] | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Feed:
    """Channels that may be divided by any positive numbers where the columns of all that reads them are multiplied.

    `source` is the path of a norm, or a part whose rows are the channels; `readers` are parts. Where a reader has more
    columns than there are channels, each stretch of `head_size` channels serves as many heads in a row.
    """

    source: str | Part
    readers: tuple[Part, ...]
    head_size: int = 1


@dataclass(frozen=True)
class Unit:
    """`modules` are the paths of modules (or single tensors) that belong to the unit; `parts` are its matrices that a
    method may quantize, `feeds` say where ranges may move from activations into weights."""

    name: str
    kind: Kind
    modules: tuple[str, ...]
    parts: tuple[Part, ...]
    feeds: tuple[Feed, ...] = ()

    def owns(self, path: str) -> bool:
        """Whether a module or tensor path lies inside this unit."""
        return any(path == module or path.startswith(f"{module}.") for module in self.modules)


@dataclass(frozen=True)
class Anatomy:
    """Units in the order of execution; `head_kind` says what the model is for.

    `generic` marks a layout that was found by looking, not by a row of `FAMILIES`.
    """

    architecture: str
    head_kind: str
    units: tuple[Unit, ...]
    word_table: str
    tied_head: str | None
    generic: bool = False

    @property
    def embeddings(self) -> Unit:
        """The first unit."""
        return self.units[0]

    @property
    def blocks(self) -> tuple[Unit, ...]:
        """All units between embeddings and head."""
        return self.units[1:-1]

    @property
    def head(self) -> Unit:
        """The last unit."""
        return self.units[-1]

    def parts(self) -> Iterator[tuple[Unit, Part]]:
        """Every part with its unit."""
        for unit in self.units:
            for part in unit.parts:
                yield unit, part

    def names(self) -> dict[str, list[str]]:
        """Module path → the names of its parts."""
        found: dict[str, list[str]] = {}
        for _, part in self.parts():
            found.setdefault(part.path, []).append(part.name)
        return found


@dataclass(frozen=True)
class HeadModule:
    """A module of a pooler or head as the layers that it runs in order: pairs of a kind and a path inside the module.

    Kinds: `linear` (what follows gives its grid), `hidden` (a linear whose output leaves the module), `output`
    (logits), `norm`, `tanh`, `gelu`, and `act`, the model's own activation. An empty path is the module itself. With
    `first` only token 0 of a text goes in.
    """

    path: str
    layers: tuple[tuple[str, str], ...]
    first: bool = False


@dataclass(frozen=True)
class Family:
    """Architectures that share a layout. `tables` and `blocks` are paths in the base model, `block_parts` in a block.

    Names that share a path are rows of one fused matrix, in this order: one stretch each, or, with `interleaved`, one
    stretch a head. The heads of an encoder see both sides of a token; a decoder's only what was before it. Post-norm
    encoders name their LayerNorms (`embeddings` in the base model, `attention` and `ffn` in a block) and what their
    heads run, by kind of head; `pooled` are the kinds that start from the pooler's output. `feeds` lists what passes
    its channels on to which parts with nothing in between that minds a factor: norms by path, parts by name.
    """

    tables: Mapping[str, str]
    blocks: str
    block_parts: Mapping[str, str]
    decoder: bool = False
    interleaved: bool = False
    norms: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, tuple[HeadModule, ...]] = field(default_factory=dict)
    pooled: tuple[str, ...] = ()
    feeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


POOLER = HeadModule("pooler", (("linear", "dense"), ("tanh", "tanh")), first=True)
"""What a pooler in the base model runs."""


def _heads(*classes: HeadModule, masked: tuple[HeadModule, ...]) -> dict[str, tuple[HeadModule, ...]]:
    """The heads of an encoder: `classes` for texts and `masked` for masked tokens; tags and answers are one product."""
    return {
        "encoder": (),
        "sequence-classification": classes,
        "token-classification": (HeadModule("classifier", (("output", ""),)),),
        "question-answering": (HeadModule("qa_outputs", (("output", ""),)),),
        "masked-lm": masked,
    }


def _parts(query: str, key: str, value: str, output: str, *ffn: str) -> dict[str, str]:
    names = ("attention.query", "attention.key", "attention.value", "attention.output")
    others = ("ffn.gate", "ffn.up", "ffn.down")[-len(ffn) :]
    return dict(zip((*names, *others), (query, key, value, output, *ffn), strict=True))


_QKV = ("attention.query", "attention.key", "attention.value")
_CONTEXT = {"attention.value": ("attention.output",)}
"""A context is linear in the values, whatever the probabilities are."""

_WORD, _POSITION, _TYPE = (
    "embeddings.word_embeddings",
    "embeddings.position_embeddings",
    "embeddings.token_type_embeddings",
)
_SELF = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NORMS = {"embeddings": "embeddings.LayerNorm", "attention": "attention.output.LayerNorm", "ffn": "output.LayerNorm"}
_BERT = Family(
    {"word": _WORD, "position": _POSITION, "token_type": _TYPE},
    "encoder.layer",
    _parts(*_SELF, "intermediate.dense", "output.dense"),
    norms=_NORMS,
    feeds=_CONTEXT,
    heads=_heads(
        HeadModule("classifier", (("output", ""),)),
        masked=(
            HeadModule(
                "cls",
                (
                    ("linear", "predictions.transform.dense"),
                    ("act", "predictions.transform.act"),
                    ("norm", "predictions.transform.LayerNorm"),
                    ("output", "predictions.decoder"),
                ),
            ),
        ),
    ),
    pooled=("sequence-classification",),
)
_ROBERTA = replace(
    _BERT,
    heads=_heads(
        HeadModule("classifier", (("linear", "dense"), ("tanh", "tanh"), ("output", "out_proj")), first=True),
        masked=(
            HeadModule(
                "lm_head", (("linear", "dense"), ("gelu", "act"), ("norm", "layer_norm"), ("output", "decoder"))
            ),
        ),
    ),
    pooled=(),
)
_ELECTRA = replace(
    _BERT,
    heads=_heads(
        HeadModule("classifier", (("linear", "dense"), ("gelu", "act"), ("output", "out_proj")), first=True),
        masked=(
            HeadModule("generator_predictions", (("linear", "dense"), ("gelu", "act"), ("norm", "LayerNorm"))),
            HeadModule("generator_lm_head", (("output", ""),)),
        ),
    ),
    pooled=(),
)
_LLAMA = Family(
    {"word": "embed_tokens"},
    "layers",
    _parts(*_PROJECTIONS, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    decoder=True,
    feeds={
        "input_layernorm": _QKV,
        "post_attention_layernorm": ("ffn.gate", "ffn.up"),
        "ffn.up": ("ffn.down",),  # it only scales what the gate lets through
        **_CONTEXT,
    },
)
_DISTILBERT = Family(
    {"word": _WORD, "position": _POSITION},
    "transformer.layer",
    _parts(*(f"attention.{name}_lin" for name in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"),
    norms={"embeddings": "embeddings.LayerNorm", "attention": "sa_layer_norm", "ffn": "output_layer_norm"},
    feeds=_CONTEXT,
    heads=_heads(
        HeadModule("pre_classifier", (("hidden", ""),)),  # transformers applies ReLU behind it, as to any numbers
        HeadModule("classifier", (("output", ""),)),
        masked=(
            HeadModule("vocab_transform", (("linear", ""),)),
            HeadModule("activation", (("act", ""),)),
            HeadModule("vocab_layer_norm", (("norm", ""),)),
            HeadModule("vocab_projector", (("output", ""),)),
        ),
    ),
)
_GPT2 = Family(
    {"word": "wte", "position": "wpe"},
    "h",
    _parts(*["attn.c_attn"] * 3, "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    decoder=True,
    feeds={"ln_1": _QKV, "ln_2": ("ffn.up",), **_CONTEXT},
)
_OPT = Family(
    {"word": "decoder.embed_tokens", "position": "decoder.embed_positions"},
    "decoder.layers",
    _parts(*_PROJECTIONS, "self_attn.out_proj", "fc1", "fc2"),
    decoder=True,
    feeds=_CONTEXT,  # its norms come before or behind, as the config says
)
_NEOX = Family(
    {"word": "embed_in"},
    "layers",
    _parts(*["attention.query_key_value"] * 3, "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    decoder=True,
    interleaved=True,
    feeds={"input_layernorm": _QKV, "post_attention_layernorm": ("ffn.up",), **_CONTEXT},
)
_GPTJ = Family(
    {"word": "wte"},
    "h",
    _parts(*(f"attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc_in", "mlp.fc_out"),
    decoder=True,
    feeds={"ln_1": (*_QKV, "ffn.up"), **_CONTEXT},
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), _ROBERTA),
    "electra": _ELECTRA,
    **dict.fromkeys(("llama", "mistral", "qwen2"), _LLAMA),
    "distilbert": _DISTILBERT,
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_neox": _NEOX,
    "gptj": _GPTJ,
}
"""Layout by `config.model_type`."""

_POSITIONS_BEHIND_PADDING = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "ibert", "mpnet"),
        *("roberta-prelayernorm", "longformer", "xmod", "data2vec-text"),
    }
)

HEADS: dict[str, str] = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "masked-lm",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "Model": "encoder",
}
"""What the suffix of a class name says about its head; the first that fits."""

_SAME_AS_LINEAR = frozenset({"FalconLinear"})
"""Subclasses of Linear whose forward is another spelling of `x @ W^T + b`."""


def position_padding(config: Any) -> int | None:
    """The padding index behind which RoBERTa and its kin count positions, over tokens that are not it; else None."""
    return config.pad_token_id if config.model_type in _POSITIONS_BEHIND_PADDING else None


def max_tokens(config: Any) -> int | None:
    """How long a text may be for the model's position table; None when it has none.

    RoBERTa counts positions from the padding index + 1 on, so its table is that much longer.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    return positions - ((config.pad_token_id or 0) + 1 if config.model_type in _POSITIONS_BEHIND_PADDING else 0)


def head_kind(architecture: str) -> str:
    """The kind of head of a transformers class. Raises InputError for one that is not supported."""
    kind = next((kind for suffix, kind in HEADS.items() if architecture.endswith(suffix)), None)
    if kind is None or (kind == "encoder" and "Head" in architecture):  # GPT2DoubleHeadsModel is no bare model
        raise InputError(f"{architecture} is not supported; heads that are: {', '.join(HEADS)}")
    return kind


def matrix_kind(module: Any) -> Literal["linear", "conv1d", "embedding"] | None:
    """What a module computes, if that is exactly what Linear, transformers' Conv1D or Embedding compute; else None.

    A subclass with a forward of its own (a scaled embedding, a lookup with an offset) cannot be replaced by codes.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    forward = type(module).forward
    if isinstance(module, nn.Linear):
        return "linear" if forward is nn.Linear.forward or type(module).__name__ in _SAME_AS_LINEAR else None
    if isinstance(module, Conv1D):
        return "conv1d" if forward is Conv1D.forward else None
    plain = isinstance(module, nn.Embedding) and forward is nn.Embedding.forward and module.max_norm is None
    return "embedding" if plain else None


def anatomy(model: Any) -> Anatomy:
    """The units of a transformers model (on any device, also meta). Raises InputError for one that is not supported."""
    config, architecture = model.config, type(model).__name__
    kind = head_kind(architecture)
    known = FAMILIES.get(config.model_type)
    _refuse(config, architecture, kind, known)
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    family = known or _generic(model, base)
    word_table = f"{base}{family.tables['word']}"
    blocks = _blocks(model, base, family)
    tables = tuple(Part(name, f"{base}{path}") for name, path in family.tables.items())
    before, after = _outside(model, base, f"{base}{family.blocks}")
    units = (Unit("embeddings", "embeddings", before, tables), *blocks, Unit("head", "head", after, ()))
    return Anatomy(architecture, kind, units, word_table, _tied_head(model, word_table), known is None)


def known_blocks(model: Any) -> list[Unit]:
    """The blocks of a model whatever its head is for. Raises InputError for a type that is not in `FAMILIES`."""
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        raise InputError(f"model type '{model.config.model_type}' is not in qtool's table, which has {known}")
    return _blocks(model, "" if model.base_model is model else f"{model.base_model_prefix}.", family)


def _blocks(model: Any, base: str, family: Family) -> list[Unit]:
    return [_block(model, family, f"{base}{family.blocks}.{i}", i) for i in range(_depth(model, base, family))]


def _refuse(config: Any, architecture: str, kind: str, family: Family | None) -> None:
    """What no anatomy can serve. Raises InputError."""
    of = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{architecture} is an encoder-decoder ({of}); qtool quantizes encoders and decoders alone")
    decodes = getattr(config, "is_decoder", False) or kind == "causal-lm"
    if getattr(config, "add_cross_attention", False) or (family and not family.decoder and decodes):
        raise InputError(f"{of} used as a decoder is not supported; set is_decoder to false, and name another head")
    if kind == "sequence-classification" and family and family.decoder and config.pad_token_id is None:
        raise InputError(f"{architecture} finds the end of a text by its padding: set pad_token_id in config.json")


def _depth(model: Any, base: str, family: Family) -> int:
    """The number of blocks. Raises InputError when there are none, or when they run more than once."""
    count = len(model.get_submodule(f"{base}{family.blocks}"))
    if count < 1:
        raise InputError("the model has 0 blocks; there is nothing to quantize")
    layers = getattr(model.config, "num_hidden_layers", count)
    if layers != count:
        raise InputError(
            f"{type(model).__name__} makes {layers} layers of {count} blocks; models that run a block more than once "
            "are not supported"
        )
    return count


def _block(model: Any, family: Family, path: str, index: int) -> Unit:
    block = model.get_submodule(path)
    names = family.block_parts or {name: name for name, module in block.named_modules() if _is_weight(module)}
    sharing = Counter(names.values())
    parts, seen = [], Counter[str]()
    for name, inside in names.items():
        module = block.get_submodule(inside)
        if not module.weight.numel():  # of an attention that lost all of its heads
            continue
        part = Part(name, f"{path}.{inside}", transposed=matrix_kind(module) == "conv1d")
        if sharing[inside] > 1:
            heads = model.config.num_attention_heads if family.interleaved else 1
            outputs = module.weight.shape[1 if part.transposed else 0]
            part = replace(part, rows=_share(outputs, seen[inside], sharing[inside], heads))
        seen[inside] += 1
        parts.append(part)
    return Unit(f"block.{index}", "block", (path,), tuple(parts), _feeds(model.config, family, path, parts))


def _feeds(config: Any, family: Family, block: str, parts: Sequence[Part]) -> tuple[Feed, ...]:
    known = {part.name: part for part in parts}
    heads = getattr(config, "num_attention_heads", 1)
    head_size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", heads) // heads
    return tuple(
        Feed(known.get(source, f"{block}.{source}"), tuple(known[name] for name in readers), head_size)
        for source, readers in family.feeds.items()
        if known.keys() >= {*readers, *({source} & family.block_parts.keys())}
    )


def _share(outputs: int, index: int, parts: int, groups: int) -> tuple[slice, ...]:
    """The rows of part `index` of `parts` that lie side by side in each of `groups` equal stretches of `outputs`."""
    size = outputs // (parts * groups)
    return tuple(slice(start, start + size) for start in range(index * size, outputs, parts * size))


def _is_weight(module: Any) -> bool:
    return matrix_kind(module) in ("linear", "conv1d")


def _generic(model: Any, base: str) -> Family:
    """A layout found by looking: blocks are the largest ModuleList, parts all Linears in it. Raises InputError."""
    from torch import nn

    modules = dict(model.base_model.named_modules())
    lists = [path for path, module in modules.items() if isinstance(module, nn.ModuleList) and len(module)]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    sizes = {path: sum(weight.numel() for weight in modules[path].parameters()) for path in outermost}
    try:
        table = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # how transformers says that a class has no word table
        table = None
    words = [path for path, module in modules.items() if module is table]
    if not sizes or not words or not isinstance(table, nn.Embedding) or not hasattr(model.config, "vocab_size"):
        raise InputError(
            f"model type '{model.config.model_type}' is not in qtool's table, and a generic anatomy needs a list of "
            "blocks with a word table before it"
        )
    return Family({"word": words[0]}, max(sizes, key=lambda path: sizes[path]), {})


def _outside(model: Any, base: str, blocks: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths of what is not in the blocks: those that the embeddings need, and the head's.

    Registered before the blocks means embeddings. So does, registered after them inside the base model: what holds only
    buffers (rotary tables), what stands beside the blocks in an encoder of their own (relative positions).
    """
    before: list[str] = []
    after: list[str] = []
    path = ""
    while path != blocks:
        owner = model.get_submodule(path)
        dot = f"{path}." if path else ""
        inner = blocks.removeprefix(dot).split(".")[0]
        passed, in_base = False, dot.startswith(base)
        (before if in_base else after).extend(f"{dot}{name}" for name in (*owner._parameters, *owner._buffers))
        for name, child in owner.named_children():
            passed = passed or name == inner
            buffers_only = not any(True for _ in child.parameters()) and any(True for _ in child.buffers())
            early = in_base and (not passed or buffers_only or dot != base)
            if name != inner:
                (before if early else after).append(f"{dot}{name}")
        path = f"{dot}{inner}"
    return tuple(before), tuple(after)


def _tied_head(model: Any, word_table: str) -> str | None:
    """The path of the output layer that shares the word table, if one does. Raises InputError for anything more."""
    from torch import nn

    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    heads = [target.removesuffix(".weight") for target, source in tied.items() if source == f"{word_table}.weight"]
    if len(heads) > 1 or not all(isinstance(model.get_submodule(head), nn.Linear) for head in heads):
        raise InputError(
            f"{type(model).__name__} shares its word table with {', '.join(heads)}; one output layer may, nothing else"
        )
    return heads[0] if heads else None
