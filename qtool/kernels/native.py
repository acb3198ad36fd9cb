"""The native library: whether it is here, and what this CPU can run.

`_native` is built from `csrc/` when a C++ compiler is found at install time. It has a flat C interface and is loaded
with ctypes, so that neither torch's nor Python's ABI ties it to a version. Without it the reference backend serves.
"""

import ctypes
import functools
import sys
from pathlib import Path
from typing import NamedTuple

ABI_VERSION = 1
"""What `qtool_abi_version()` must answer; raised together with `kAbiVersion` in csrc/cpu.cc."""

FEATURES = (
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "avx512_bf16",
)
"""Instruction sets by the bit of `qtool_cpu_features()`, under the names that Linux gives them."""


class _Attempt(NamedTuple):
    library: ctypes.CDLL | None
    reason: str | None


def available() -> bool:
    """Whether the native library was built, is found and speaks this version's interface."""
    return _attempt().library is not None


def library() -> ctypes.CDLL | None:
    """The loaded library, or None; `reason()` says why it is None."""
    return _attempt().library


def reason() -> str | None:
    """Why the library is not available, with what to do next; None when it is."""
    return _attempt().reason


def cpu_features() -> tuple[str, ...]:
    """The names of FEATURES that both the CPU and the operating system support.

    Empty without the library, and on anything but x86-64.
    """
    loaded = library()
    if loaded is None:
        return ()
    mask = int(loaded.qtool_cpu_features())
    return tuple(name for bit, name in enumerate(FEATURES) if mask >> bit & 1)


@functools.cache
def _attempt() -> _Attempt:
    path = _find()
    if path is None:
        return _Attempt(None, "qtool was installed without native kernels: install a C++ compiler, then qtool again")
    try:
        loaded = ctypes.CDLL(str(path))
        return _checked(loaded, path)
    except (OSError, AttributeError) as error:
        return _Attempt(None, f"{path} does not load ({error}): install qtool again")


def _checked(loaded: ctypes.CDLL, path: Path) -> _Attempt:
    loaded.qtool_abi_version.restype = ctypes.c_int32
    loaded.qtool_cpu_features.restype = ctypes.c_uint64
    found = loaded.qtool_abi_version()
    if found != ABI_VERSION:
        message = f"{path} was built for interface {found}, this qtool needs {ABI_VERSION}: install qtool again"
        return _Attempt(None, message)
    return _Attempt(loaded, None)


def _find() -> Path | None:
    # An editable install keeps sources and build products in two folders; the package's path names both.
    folders = [Path(entry) for entry in sys.modules[__name__.rpartition(".")[0]].__path__]
    names = ("_native.so", "_native.dll")
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)
