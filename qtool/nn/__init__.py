"""Modules that hold integer codes, and the table from which a saved description becomes modules again.

A description is a JSON-clean dictionary with a `type` from `MODULES`; `quantization_config.modules` of an artifact maps
module paths to descriptions. Modules know no model names and touch no files.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool.errors import InputError, one_of
from qtool.nn.embedding import QEmbedding
from qtool.nn.linear import QLinear
from qtool.nn.module import QModule
from qtool.nn.tied import QTiedLinear

MODULES: dict[str, type[QModule]] = {"linear": QLinear, "embedding": QEmbedding, "tied_linear": QTiedLinear}

__all__ = ["MODULES", "QEmbedding", "QLinear", "QModule", "QTiedLinear", "describe", "install"]


def install(
    model: nn.Module, descriptions: Mapping[str, Mapping[str, Any]], *, dtype: torch.dtype, device: str = "meta"
) -> None:
    """Replace submodules of `model`, in place, by empty quantized ones; their buffers are filled by a loader later.

    `dtype` is what the modules return. Raises InputError for a type that this version does not know.
    """
    shared_last = sorted(descriptions.items(), key=lambda item: "table" in item[1])  # their tables must exist
    for path, description in shared_last:
        kind = description["type"]
        if kind not in MODULES:
            raise InputError(f"{path}: {one_of(kind, list(MODULES), 'module type')}; the model needs a newer qtool")
        module = MODULES[kind].from_description(model, path, description, device=device)
        module.output_dtype = dtype
        model.set_submodule(path, module)


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The description of every quantized submodule of `model`, by path."""
    return {path: module.description() for path, module in model.named_modules() if isinstance(module, QModule)}
