"""Values: how numbers are rounded to integers and back, and how integers are rescaled without floats.

`QuantSpec` needs no torch and is imported at once; `QParams`, `QTensor` and `Dyadic` load torch when they are first
used, so that recipes and the command line's help stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qtool.numerics.spec import QuantSpec

if TYPE_CHECKING:
    from qtool.numerics.dyadic import Dyadic
    from qtool.numerics.qtensor import QParams, QTensor

__all__ = ["Dyadic", "QParams", "QTensor", "QuantSpec"]

_HOME = {"Dyadic": "dyadic", "QParams": "qtensor", "QTensor": "qtensor"}


def __getattr__(name: str) -> Any:
    """Import the torch-based classes on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
