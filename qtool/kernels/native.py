"""The native library: whether it is here, what this CPU can run, and how its functions are called.

`_native` is built from `csrc/` when a C++ compiler is found at install time. It has a flat C interface and is loaded
with ctypes, so that neither torch's nor Python's ABI ties it to a version. Without it the reference backend serves.
"""

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from qtool.errors import QtoolError, UnavailableError, one_of

ABI_VERSION = 8
"""What `qtool_abi_version()` must answer; raised together with `kAbiVersion` in csrc/interface.cc."""

FEATURES = (
    "avx2",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "avx512_bf16",
    "avx512dq",
    "avx512vl",
    "fma",
)
"""Instruction sets by the bit of `qtool_cpu_features()`, under the names that Linux gives them."""

ISAS = ("portable", "avx2", "avx512vnni")
"""What kernels are compiled for, slowest first, by the number that the library knows them by."""

_NO_MEMORY, _BAD_ID = 1, 2


_FORKED: list[bool] = []
"""Whether this process is the child of one that had this module, which may have used torch's threads."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _FORKED.append(True))


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


def isas() -> tuple[str, ...]:
    """Which of ISAS were built and run on this CPU, slowest first; none without the library."""
    loaded = library()
    if loaded is None:
        return ()
    mask = int(loaded.qtool_isas())
    return tuple(name for bit, name in enumerate(ISAS) if mask >> bit & 1)


@functools.cache
def isa() -> str:
    """The instruction set of this process: the fastest, or what `QTOOL_CPU_ISA` names. Fixed at first use.

    Raises UnavailableError for one that this CPU or this build does not have.
    """
    wanted, here = os.environ.get("QTOOL_CPU_ISA"), isas()
    if not wanted:
        return here[-1]
    if wanted not in ISAS:
        raise UnavailableError(f"QTOOL_CPU_ISA={wanted}: {one_of(wanted, ISAS, 'instruction set')}")
    if wanted not in here:
        raise UnavailableError(f"QTOOL_CPU_ISA={wanted}: this CPU or build has {', '.join(here)}")
    return wanted


def call(name: str, *arguments: Any) -> None:
    """Run a function of the library on this process's instruction set; the GIL is released meanwhile.

    Raises IndexError for an id that an embedding table does not have, UnavailableError without memory.
    """
    loaded = library()
    assert loaded is not None
    status = getattr(loaded, name)(ISAS.index(isa()), *arguments)
    if status == _BAD_ID:
        raise IndexError("an id is not one of the rows of its embedding table")
    if status == _NO_MEMORY:
        raise UnavailableError("not enough memory for this batch; use a smaller one")
    if status:
        raise QtoolError(f"{name} failed with status {status}")


def code_offset() -> int:
    """By how much codes of activations are larger in this instruction set's product than what they stand for."""
    loaded = library()
    assert loaded is not None
    return int(loaded.qtool_code_offset(ISAS.index(isa())))


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
    found = loaded.qtool_abi_version()
    if found != ABI_VERSION:
        message = f"{path} was built for interface {found}, this qtool needs {ABI_VERSION}: install qtool again"
        return _Attempt(None, message)
    loaded.qtool_cpu_features.restype = ctypes.c_uint64
    loaded.qtool_isas.restype = ctypes.c_uint32
    if _FORKED:
        loaded.qtool_after_fork()
    p, i32 = ctypes.c_void_p, ctypes.c_int32
    loaded.qtool_code_offset.argtypes = (i32,)
    signatures = {
        "integer_encoder": (i32, p, p, p, i32),
        "row_sums": (i32, p, i32, i32, i32, i32, p),
        "quantize_rows": (i32, p, i32, i32, i32, p, p, i32),
        "integer_linear": (i32, p, p, p, i32, p, i32),
        "integer_norm": (i32, p, p, i32, p, i32),
        "float_linear": (i32, p, p, i32, p, i32),
        "code_linear": (i32, p, p, i32, p, i32),
        "float_encoder": (i32, p, p, p, i32, i32),
        "decoder_front": (i32, p, p, p, i32, p, i32),
        "decoder_back": (i32, p, p, p, i32, p, i32),
        "int8_attention": (i32, p, p, p, i32),
        "wide_attention": (i32, p, p, i32),
        "integer_attention": (i32, p, p, p, p, p, p, i32, i32, p, i32),
    }
    for name, arguments in signatures.items():
        getattr(loaded, f"qtool_{name}").argtypes = arguments
    return _Attempt(loaded, None)


def _find() -> Path | None:
    # An editable install keeps sources and build products in two folders; the package's path names both.
    folders = [Path(entry) for entry in sys.modules[__name__.rpartition(".")[0]].__path__]
    names = ("_native.so", "_native.dll")
    return next((path for folder in folders for name in names if (path := folder / name).is_file()), None)
