"""Where a model computes, the CPU or one GPU, and how tensors get there and back.

An option of execution: no recipe and no artifact names a device. GPUs round floats in their own way, though, so that
fingerprints name the one that computed (`job.instruction_set`).
"""

import re
from collections.abc import Callable
from typing import Any

import torch

from qtool.errors import UnavailableError, UsageError
from qtool.kernels import backend, triton

CPU = torch.device("cpu")


def usable(name: str | torch.device = CPU) -> torch.device:
    """The device called `cpu`, `cuda` (torch's current one) or `cuda:N`, which is there and has kernels.

    Raises UsageError for another name, UnavailableError for a GPU that cannot be used, saying why.
    """
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", str(name))
    if found is None:
        raise UsageError(f"unknown device '{name}'; models compute on cpu, cuda or cuda:N")
    if str(name) == "cpu":
        return CPU
    if problem := gpu_problem(None if found[1] is None else int(found[1])):
        raise UnavailableError(f"--device {name}: {problem}, or leave it out: the CPU serves every model")
    device = torch.device("cuda", torch.cuda.current_device() if found[1] is None else int(found[1]))
    backend(device)  # what QTOOL_BACKEND asks for may not compute there
    return device


def gpu_problem(number: int | None = None) -> str | None:
    """Why no model can compute on the GPU of a number, or the current one, with what to do next; None when one can."""
    if problem := triton.reason():
        return problem
    if not torch.cuda.is_available():
        return "there is no GPU, and TRITON_INTERPRET=1 interprets kernels on tensors of the CPU; unset it"
    count = torch.cuda.device_count()
    if number is not None and number >= count:
        return f"there are only cuda:0 to cuda:{count - 1} here; name one of these"
    return triton.too_old(number)


def described(device: torch.device) -> str:
    """For people: `cpu`, or `cuda:0 (name)`."""
    return str(device) if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"


def arithmetic(device: torch.device) -> str:
    """What decides how a GPU rounds sums of floats: its name, compute capability, and CUDA's version."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} {major}.{minor} CUDA {torch.version.cuda}"


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told: calls return before, and a clock would not see the work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in its tuples, lists and dictionaries changed; other things stay as they are."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(item, change) for item in value)
    return {key: mapped(item, change) for key, item in value.items()} if type(value) is dict else value


def mover(device: torch.device) -> Callable[[Any], Any]:
    """Moves values to a device; a tensor that comes again, a mask that all blocks share, is moved once."""
    done: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # sources too, so that ids stay theirs

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in done:
            done[id(tensor)] = tensor, tensor.to(device)
        return done[id(tensor)][1]

    return lambda value: mapped(value, move)


def on_host(output: Any) -> Any:
    """A model's output with its tensors on the CPU, changed in place: what reads scores needs no device."""
    for name, value in output.items():
        if isinstance(value, torch.Tensor) and value.device.type != "cpu":
            output[name] = value.cpu()
    return output
