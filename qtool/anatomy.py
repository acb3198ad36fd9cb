"""What a model is made of: an ordered list of units, each with named parts.

A unit is what is loaded, calibrated and lowered at a time: the embeddings, each block, the head. A part is a weight
matrix inside a unit: `(module, row slice, transposed)`, so that a fused q|k|v or a Conv1D `[in, out]` is described
here and nowhere else. Adding an architecture adds a row to `FAMILIES` (and a function if its blocks differ).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from qtool.errors import InputError

Kind = Literal["embeddings", "block", "head"]


@dataclass(frozen=True)
class Part:
    """A weight matrix: `[out_features, in_features]`, or `[in, out]` when `transposed`; `rows` picks a slice of it."""

    name: str
    path: str
    rows: slice | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Unit:
    """`modules` are the paths whose tensors belong to the unit; `parts` are its matrices that a method may quantize."""

    name: str
    kind: Kind
    modules: tuple[str, ...]
    parts: tuple[Part, ...]

    def owns(self, path: str) -> bool:
        """Whether a module or tensor path lies inside this unit."""
        return any(path == module or path.startswith(f"{module}.") for module in self.modules)


@dataclass(frozen=True)
class Anatomy:
    """Units in the order of execution; `head_kind` says what the model is for."""

    architecture: str
    head_kind: str
    units: tuple[Unit, ...]
    word_table: str
    tied_head: str | None

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


@dataclass(frozen=True)
class Family:
    """Architectures that share a layout; paths are relative to the base model."""

    embeddings: str
    tables: dict[str, str]
    blocks: str
    block_parts: dict[str, str]


_BERT = Family(
    embeddings="embeddings",
    tables={"word": "word_embeddings", "position": "position_embeddings", "token_type": "token_type_embeddings"},
    blocks="encoder.layer",
    block_parts={
        "attention.query": "attention.self.query",
        "attention.key": "attention.self.key",
        "attention.value": "attention.self.value",
        "attention.output": "attention.output.dense",
        "ffn.up": "intermediate.dense",
        "ffn.down": "output.dense",
    },
)

FAMILIES: dict[str, Family] = {"bert": _BERT, "roberta": _BERT, "xlm-roberta": _BERT, "camembert": _BERT}
"""Layout by `config.model_type`."""

_POSITIONS_BEHIND_PADDING = frozenset({"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "ibert"})

HEADS: dict[str, str] = {
    "ForSequenceClassification": "sequence-classification",
    "ForMaskedLM": "masked-lm",
    "Model": "encoder",
}
"""What the suffix of a class name says about its head."""


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
    for suffix, kind in HEADS.items():
        if architecture.endswith(suffix) and "Head" not in architecture:  # BertLMHeadModel is no bare encoder
            return kind
    raise InputError(f"{architecture} is not supported; heads that are: {', '.join(HEADS)}")


def anatomy(model: Any) -> Anatomy:
    """The units of a transformers model (on any device, also meta). Raises InputError for one that is not supported."""
    config = model.config
    if config.model_type not in FAMILIES:
        raise InputError(f"model type '{config.model_type}' is not supported; types that are: {', '.join(FAMILIES)}")
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise InputError(f"{config.model_type} used as a decoder is not supported; set is_decoder to false")
    if config.num_hidden_layers < 1:
        raise InputError(f"the model has {config.num_hidden_layers} blocks; there is nothing to quantize")
    architecture = type(model).__name__
    kind = head_kind(architecture)
    family = FAMILIES[config.model_type]
    base = "" if model.base_model is model else f"{model.base_model_prefix}."
    embeddings = _embeddings(family, base)
    blocks = [_block(family, base, index) for index in range(config.num_hidden_layers)]
    word_table = f"{base}{family.embeddings}.{family.tables['word']}"
    tied = _tied_head(model, word_table)
    head = Unit("head", "head", _head_modules(model, base, family), ())
    return Anatomy(architecture, kind, (embeddings, *blocks, head), word_table, tied)


def _embeddings(family: Family, base: str) -> Unit:
    path = f"{base}{family.embeddings}"
    parts = tuple(Part(name, f"{path}.{module}") for name, module in family.tables.items())
    return Unit("embeddings", "embeddings", (path,), parts)


def _block(family: Family, base: str, index: int) -> Unit:
    path = f"{base}{family.blocks}.{index}"
    parts = tuple(Part(name, f"{path}.{module}") for name, module in family.block_parts.items())
    return Unit(f"block.{index}", "block", (path,), parts)


def _head_modules(model: Any, base: str, family: Family) -> tuple[str, ...]:
    """Everything that is neither embeddings nor blocks, at the top of the model and of its base model."""
    body = {family.embeddings, family.blocks.split(".")[0]}
    inside = [f"{base}{name}" for name, _ in model.base_model.named_children() if name not in body]
    outside = [name for name, _ in model.named_children() if base and name != base.rstrip(".")]
    return (*inside, *outside)


def _tied_head(model: Any, word_table: str) -> str | None:
    """The path of the output layer that shares the word table, if one does."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        if source == f"{word_table}.weight":
            return str(target.removesuffix(".weight"))
    return None
