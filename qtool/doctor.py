"""What this machine and this installation can do."""

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

import psutil
import torch

from qtool import __version__
from qtool.device import gpu_problem
from qtool.errors import UnavailableError
from qtool.kernels import backend, native, reference, triton

_PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "datasets", "evaluate")
_MEANING = {
    "direct": "torch._int_mm, exact on this CPU",
    "split": "torch._int_mm on weights split in two digits: without VNNI the direct product saturates",
    "integer": "integer matmul: torch._int_mm is not exact on this CPU; slow",
}


def diagnose() -> dict[str, str]:
    """Findings by name, in the order in which they are shown."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    return {
        "qtool": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        **{name: _version(name) for name in _PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "CPU instruction sets": ", ".join(native.cpu_features()) or f"unknown; torch uses {_capability()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
        "memory": f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB",
        "disk here": f"{disk.free / 1e9:.1f} GB free",
        "native library": "found" if native.available() else str(native.reason()),
        "backend": _backend(),
        "int8 product": _MEANING[reference.exact_product()],
        **_gpus(),
        "triton": _version("triton", "missing: pip install triton, for --device cuda"),
        "backend on a GPU": gpu_problem() or _gpu_backend(),
        "hub": "offline (HF_HUB_OFFLINE)" if _offline() else "online when reachable",
    }


def _backend() -> str:
    try:
        name = backend().name
        return f"{name} ({native.isa()}, of {', '.join(native.isas())})" if name == "native" else name
    except UnavailableError as error:
        return str(error)


def _gpus() -> dict[str, str]:
    """A line each, and what torch was built for; one line where there is none."""
    cuda = torch.version.cuda
    built = "torch was built without CUDA" if cuda is None else f"torch was built for CUDA {cuda}"
    if not torch.cuda.is_available():
        return {"GPU": f"none ({built})"}
    every = {f"GPU cuda:{number}": _gpu(number) for number in range(torch.cuda.device_count())}
    return {**every, "CUDA": f"{built}{_driver()}"}


def _gpu(number: int) -> str:
    known = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    old = triton.too_old(number)
    memory = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB"
    said = f"{known.name}, compute capability {known.major}.{known.minor}, {memory}"
    return f"{said}: too old ({old})" if old else said


def _driver() -> str:
    """The newest version of CUDA that the driver takes, where torch tells it."""
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return f", the driver takes {version // 1000}.{version % 1000 // 10}" if version else ""


def _gpu_backend() -> str:
    try:
        return backend(torch.device("cuda")).name
    except UnavailableError as error:
        return str(error)


def _version(package: str, missing: str = "missing: install qtool again") -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return missing


def _capability() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
