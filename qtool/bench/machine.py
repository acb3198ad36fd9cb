"""The machine that a benchmark ran on, as far as it explains the numbers."""

import os
import platform
from pathlib import Path
from typing import Any

FLAGS = (
    "avx2", "fma", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile",
    "amx_int8", "amx_bf16",
)  # fmt: skip
"""The CPU's abilities that decide how fast a matrix product is, under the names that Linux gives them."""

_BUSY = 0.25  # of all cores


def cpu_facts(text: str | None = None) -> tuple[str, list[str]]:
    """The CPU's name and which of FLAGS it has, from the text of /proc/cpuinfo; no flags where that does not exist."""
    if text is None:
        try:
            text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
        except OSError:
            text = ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    own = set(fields.get("flags", "").split())
    return fields.get("model name") or platform.processor() or platform.machine(), [f for f in FLAGS if f in own]


def has_vnni() -> bool:
    """Whether products of 8-bit integers are exact in other engines too: without it pairs saturate in 16 bits."""
    return bool({"avx_vnni", "avx512_vnni"} & set(cpu_facts()[1]))


def load_average() -> float | None:
    """Over the last minute; None where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def is_busy(load: float | None, cores: int) -> bool:
    """Whether others compute enough to spoil times."""
    return load is not None and load > _BUSY * cores


def describe(load: float | None) -> dict[str, Any]:
    """JSON-clean; `load` as it was before anything was measured."""
    name, flags = cpu_facts()
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "flags": flags,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "load_average": load,
    }
