"""qtool: post-training quantization of Transformer models on the command line and in Python.

Importing this package is light (no torch) and teaches transformers to load qtool's artifacts, whichever of the two is
imported first. `qtool.quantize` and `qtool.evaluate` take the same names as the commands.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qtool.api import evaluate, quantize

__all__ = ["__version__", "evaluate", "quantize"]

_HOST = "transformers.quantizers.auto"


def __getattr__(name: str) -> Any:
    if name in ("quantize", "evaluate"):
        from qtool import api

        return getattr(api, name)
    raise AttributeError(f"module 'qtool' has no attribute '{name}'")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Registers the plug-in right after transformers' quantizer table has been executed, then gets out of the way."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_then_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module("qtool.hf")

            spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


if _HOST in sys.modules:
    importlib.import_module("qtool.hf")
elif not any(type(finder).__name__ == "_AfterImport" for finder in sys.meta_path):
    sys.meta_path.insert(0, _AfterImport())
