"""`--device`: where a model computes."""

import re

import torch

from qtool.errors import UnavailableError, UsageError
from qtool.kernels import triton


def usable(name: str) -> torch.device:
    """The device of a name: `cpu`, `cuda` (the first GPU) or `cuda:N`.

    Raises UsageError for any other name, UnavailableError where that GPU or the package triton is not there.
    """
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,3}))?", name):
        raise UsageError(f"unknown device '{name}'; known: cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if problem := triton.reason():
            raise UnavailableError(f"--device {name}: {problem}")
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise UnavailableError(f"--device {name}: torch finds {count} GPUs here; their numbers start at 0")
    return device
