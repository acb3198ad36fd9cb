"""The two products of attention on integer codes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.errors import InputError
from qtool.kernels.attention import INT32, MAX_CODED_KEYS
from qtool.kernels.codebook import LEVEL_MAX, WholeCodebook, whole_edges, whole_levels
from qtool.kernels.reference import QMAX
from qtool.nn.module import QModule
from qtool.numerics.codebook import Codebook, check_bits

CHILD = "int8_products"
"""Name that the module has inside the attention module that it serves."""
_ACTIVATIONS = "int8:token:sym"
_WORDS = ("code_bits", "relative", "renormalize", "tokens")


class QAttention(QModule):
    """QKᵀ and PV as int8 products (`kernels.attention`); lies beside the projections that an attention module owns.

    Buffer: `value_scale`, float32 `[groups]`, what a value code is worth in each head of keys and values. Query and key
    are scaled by token and head as they come, so that a key has the same codes whenever they are made.
    """

    _scales: tuple[str, ...] = ("value_scale",)
    value_scale: torch.Tensor

    def __init__(self, heads: int, groups: int, size: int, *, device: str = "cpu") -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, size
        self.calls = 0
        self.register_buffer("value_scale", torch.empty(groups, dtype=torch.float32, device=device))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        softcap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Context `[batch, queries, heads, size]` in `output_dtype`, and probability codes; see `int8_attention`."""
        self.calls += 1
        scaling = self.size**-0.5 if scaling is None else scaling
        operation = kernels.backend(query.device).int8_attention
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, **self._coding()}
        context, codes = operation(query, key, value, self.value_scale, mask, **options)
        return context.to(self.output_dtype), codes

    def _coding(self) -> dict[str, Any]:
        """The operation's options that say what codes are; none here."""
        return {}

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The probabilities that codes `[batch, heads, queries, keys]` stand for, float32."""
        return codes / codes.sum(-1, keepdim=True).clamp_min(1)

    def description(self) -> dict[str, Any]:
        """Heads of queries, heads of keys and values, and their size."""
        return attention_description(self.heads, self.groups, self.size)

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "QAttention":
        """See `QModule`."""
        _check_activations(path, description)
        return cls(description["heads"], description["groups"], description["size"], device=device)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"heads={self.heads}, groups={self.groups}, size={self.size}"


class QCodedAttention(QAttention):
    """`QAttention` whose probabilities are codes of a few bits, by a codebook of each head.

    `code_bits` are 2 … 8, or None where probabilities are only pruned; `tokens` are those of the longest text. Buffers:
    `edges` int32 `[heads, codes - 1]` and `levels` int32 `[heads, codes]`, as in `WholeCodebook`, levels None for
    pruning; `level_unit` float32 `[heads]`, what one of a level is worth, None where that cancels.
    """

    _scales = ("value_scale", "level_unit")
    edges: torch.Tensor
    levels: torch.Tensor | None
    level_unit: torch.Tensor | None
    _known_largest: tuple[torch.Tensor, int, int] | None = None

    def __init__(
        self,
        heads: int,
        groups: int,
        size: int,
        *,
        code_bits: int | None,
        relative: bool,
        renormalize: bool,
        tokens: int,
        device: str = "cpu",
    ) -> None:
        super().__init__(heads, groups, size, device=device)
        check_bits(code_bits)
        self.code_bits, self.relative, self.renormalize, self.tokens = code_bits, relative, renormalize, tokens
        edges, levels = (1, 0) if code_bits is None else ((1 << code_bits) - 1, 1 << code_bits)
        self.register_buffer("edges", torch.empty((heads, edges), dtype=torch.int32, device=device))
        held = torch.empty((heads, levels), dtype=torch.int32, device=device) if levels else None
        self.register_buffer("levels", held)
        unit = torch.empty(heads, dtype=torch.float32, device=device) if levels and not renormalize else None
        self.register_buffer("level_unit", unit)

    def fill(self, codebook: Codebook) -> None:
        """Take a codebook of all heads, or one for all. Where probabilities are only pruned, its levels say nothing."""
        self.edges = whole_edges(codebook.edges.expand(self.heads, -1))
        if self.levels is None:
            return
        # Σ levels · values of the longest text must fit int32.
        most = min(LEVEL_MAX, INT32 // (QMAX * min(self.tokens, MAX_CODED_KEYS)))
        self.levels, units = whole_levels(codebook.levels.expand(self.heads, -1), most)
        if self.level_unit is not None:
            self.level_unit = units.float()

    def _coding(self) -> dict[str, Any]:
        book = WholeCodebook(self.edges, self.levels, self.relative, self.renormalize, self._largest())
        return {"book": book, "level_unit": self.level_unit}

    def _largest(self) -> int | None:
        """The largest level, looked for once; None where there are no levels, or a change would not be noticed."""
        levels = self.levels
        if levels is None or levels.is_inference():
            return None
        known = self._known_largest
        if known is None or known[0] is not levels or known[1] != levels._version:
            known = self._known_largest = levels, levels._version, int(levels.max())
        return known[2]

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """The levels of codes `[batch, heads, queries, keys]`, each row divided by its sum: float32.

        Where probabilities are only pruned, the codes are those that `QAttention` has of what is kept.
        """
        if self.levels is None:
            return super().values(codes)
        levels = self.levels[torch.arange(self.heads, device=codes.device)[:, None, None], codes.long()]
        return levels / levels.sum(-1, keepdim=True).clamp_min(1)

    def description(self) -> dict[str, Any]:
        """That of `QAttention`, and what codes are."""
        return {**super().description(), "type": "coded_attention", **self._words()}

    def _words(self) -> dict[str, Any]:
        return {word: getattr(self, word) for word in _WORDS}

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "QCodedAttention":
        """See `QModule`."""
        _check_activations(path, description)
        shape = (description[word] for word in ("heads", "groups", "size"))
        return cls(*shape, **{word: description[word] for word in _WORDS}, device=device)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return ", ".join([super().extra_repr(), *(f"{key}={value}" for key, value in self._words().items())])


def _check_activations(path: str, description: Mapping[str, Any]) -> None:
    if description["activations"] != _ACTIVATIONS:
        raise InputError(f"{path}: activations {description['activations']} cannot run; use {_ACTIVATIONS}")


def attention_description(heads: int, groups: int, size: int) -> dict[str, Any]:
    """JSON-clean; queries and keys are scaled by token and head."""
    return {"type": "attention", "heads": heads, "groups": groups, "size": size, "activations": _ACTIVATIONS}
