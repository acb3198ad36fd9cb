"""The GPU backend: the reference's integers from Triton kernels.

This file says whether it can run here and imports neither triton nor a kernel. The kernels lie by what they compute:
`arithmetic` (functions that others are made of), `rows`, `linear`, `attention`, `float_linear`, `float_attention`,
`codes`, `tables`, `wide_attention`; `encoder` is a whole forward of integers, `step` a decoder's block for few rows.
"""

import functools
import importlib.util
import os

import torch

CAPABILITY = (8, 0)
"""What a GPU must have at least: Triton's int8 products run on tensor cores from Ampere on."""


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on the CPU: slow, and right. For tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def reason() -> str | None:
    """Why the kernels cannot run here, with what to do next; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        what = "was built without CUDA" if torch.version.cuda is None else "finds no GPU with a driver that suits it"
        return f"torch {torch.__version__} {what}; install torch for CUDA"
    return too_old()


def too_old(number: int | None = None) -> str | None:
    """Why the kernels cannot run on the GPU of a number, or the current one; None when they can."""
    found = torch.cuda.get_device_capability(number)
    if found < CAPABILITY:
        has, needs = (".".join(map(str, version)) for version in (found, CAPABILITY))
        return f"{torch.cuda.get_device_name(number)} has compute capability {has}, and int8 products need {needs}"
    return None


def available() -> bool:
    """Whether the kernels can run here."""
    return reason() is None
