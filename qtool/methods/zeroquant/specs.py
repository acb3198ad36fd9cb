"""Which specs its modules execute."""

from typing import Any, Literal

from qtool.errors import InputError
from qtool.numerics import QuantSpec


def check_linear(weights: QuantSpec, activations: QuantSpec | Literal["float"], shape: Any, path: str) -> None:
    """Refuse specs that the products cannot execute. Raises InputError naming the module."""
    if weights.dynamic or weights.num_bits > 8:
        raise InputError(f"{path}: weights {weights} cannot run; zeroquant takes static int2 to int8 weights")
    if activations != "float":
        token_wise = activations.dynamic and activations.block == (1, None)
        tensor_wise = not activations.dynamic and activations.block == (None, None)
        if activations.num_bits != 8 or not activations.symmetric or not (token_wise or tensor_wise):
            known = "int8:token:sym, int8:tensor:sym or float"
            raise InputError(f"{path}: activations {activations} cannot run; use {known}")
    _check_block(weights, shape, path)


def check_table(weights: QuantSpec, shape: Any, path: str) -> None:
    """Refuse specs that a table lookup cannot execute. Raises InputError naming the module."""
    if weights.dynamic or not weights.symmetric or not 5 <= weights.num_bits <= 16 or weights.block[1] is not None:
        raise InputError(
            f"{path}: weights {weights} cannot run; a table takes static symmetric int5 to int16, scaled by whole rows"
        )
    _check_block(weights, shape, path)


def _check_block(weights: QuantSpec, shape: Any, path: str) -> None:
    try:
        weights.scale_shape(shape)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
