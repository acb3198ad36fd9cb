"""Values that travel between ranks as JSON: never pickled, and equal on arrival."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def packed(value: Any) -> Any:
    """JSON-clean, so that `unpacked` gives an equal value of the same types; exact for floats, also NaN."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [packed(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [packed(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[packed(key), packed(item)] for key, item in value.items()]}
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return {"array": value.ravel().tolist(), "shape": list(value.shape)}
    raise TypeError(f"a {type(value).__name__} does not travel between ranks")


def unpacked(value: Any) -> Any:
    """See `packed`."""
    if type(value) is list:
        return [unpacked(item) for item in value]
    if type(value) is not dict:
        return value
    if "array" in value:
        return np.array(value["array"], dtype=np.float64).reshape(value["shape"])
    if "tuple" in value:
        return tuple(unpacked(item) for item in value["tuple"])
    return {unpacked(key): unpacked(item) for key, item in value["dict"]}


def written(value: Any) -> dict[str, torch.Tensor]:
    """A JSON-clean value as a tensor of bytes."""
    text = json.dumps(value, sort_keys=True).encode()
    return {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def read(part: Mapping[str, torch.Tensor]) -> Any:
    """See `written`."""
    return json.loads(part["json"].numpy().tobytes())
