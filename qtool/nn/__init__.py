"""Modules that hold integer codes, and the table from which a saved description becomes modules again.

A description is a JSON-clean dictionary with a `type` from `MODULES`; `quantization_config.modules` of an artifact maps
module paths to descriptions. Modules know no model names and touch no files.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from qtool.errors import InputError, one_of
from qtool.nn.attention import QAttention, QCodedAttention
from qtool.nn.codes import CodedAttention
from qtool.nn.embedding import QEmbedding
from qtool.nn.integer.activation import IntGelu, IntRelu, IntTable, IntTanh
from qtool.nn.integer.block import IntAttention, IntBlock, IntCodedAttention
from qtool.nn.integer.chain import IntChain, IntTiedLinear
from qtool.nn.integer.embedding import IntEmbeddings, IntTableRows
from qtool.nn.integer.linear import IntLinear
from qtool.nn.integer.module import IntModule
from qtool.nn.integer.norm import IntNorm
from qtool.nn.linear import QLinear
from qtool.nn.module import QModule
from qtool.nn.tied import QTiedLinear

MODULES: dict[str, type[QModule]] = {
    "linear": QLinear,
    "embedding": QEmbedding,
    "tied_linear": QTiedLinear,
    "attention": QAttention,
    "coded_attention": QCodedAttention,
    "attention_codes": CodedAttention,
    "int_embeddings": IntEmbeddings,
    "int_rows": IntTableRows,
    "int_block": IntBlock,
    "int_attention": IntAttention,
    "int_coded_attention": IntCodedAttention,
    "int_linear": IntLinear,
    "int_tied_linear": IntTiedLinear,
    "int_norm": IntNorm,
    "int_table": IntTable,
    "int_gelu": IntGelu,
    "int_relu": IntRelu,
    "int_tanh": IntTanh,
    "int_chain": IntChain,
}

__all__ = [
    "MODULES", "CodedAttention", "IntCodedAttention", "IntModule", "QAttention", "QCodedAttention", "QEmbedding",
    "QLinear", "QModule", "QTiedLinear", "describe", "install", "parts_of",
]  # fmt: skip


def install(
    model: nn.Module, descriptions: Mapping[str, Mapping[str, Any]], *, dtype: torch.dtype, device: str = "meta"
) -> None:
    """Replace submodules of `model`, in place, by empty quantized ones; their buffers are filled by a loader later.

    `dtype` is what the modules return. Raises InputError for a type that this version does not know.
    """
    # Those that share a table come last: it must exist.
    shared_last = sorted(descriptions.items(), key=lambda item: any("table" in d for _, d in parts_of(*item)))
    for path, description in shared_last:
        kind = description["type"]
        if kind not in MODULES:
            raise InputError(f"{path}: {one_of(kind, list(MODULES), 'module type')}; the model needs a newer qtool")
        module = MODULES[kind].from_description(model, path, description, device=device)
        module.output_dtype = dtype
        model.set_submodule(path, module)


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The description of every quantized submodule of `model`, by path; what a composite contains is in its own."""
    found: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if isinstance(module, QModule) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module.description()
    return found


def parts_of(path: str, description: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A description with its path, or those of all that a composite contains."""
    if "parts" not in description:
        yield path, description
    for part in description.get("parts", {}).values():
        yield from parts_of(f"{path}.{part['path']}", part)
