"""The GPU that a benchmark ran on, as far as it explains the numbers. Everything is read, nothing is ever set."""

import shutil
import subprocess
from typing import Any

BUSY = 10
"""Percent of use by others from which times say little."""

_FIELDS = {
    "driver": "driver_version",
    "sm_mhz": "clocks.sm",
    "max_sm_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "max_memory_mhz": "clocks.max.mem",
    "power_limit_watts": "power.limit",
    "temperature_celsius": "temperature.gpu",
    "utilization_percent": "utilization.gpu",
}
"""What is asked of nvidia-smi, under the names of the report."""

_SECONDS = 20  # to wait for nvidia-smi, which takes one or two where no driver is loaded yet


def describe(device: Any) -> dict[str, Any]:
    """JSON-clean: name, compute capability and sizes by torch; driver, clocks and power by nvidia-smi.

    What nvidia-smi does not say, or all of it where there is none, is None.
    """
    import torch

    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "compute_capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
        **_asked(str(found.uuid)),
    }


def _asked(uuid: str) -> dict[str, Any]:
    """Of nvidia-smi: numbers as numbers, and None for what it does not know."""
    nothing: dict[str, Any] = dict.fromkeys(_FIELDS)
    if (program := shutil.which("nvidia-smi")) is None:
        return nothing
    query = [f"--id=GPU-{uuid}", f"--query-gpu={','.join(_FIELDS.values())}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run([program, *query], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return nothing
    values = [value.strip() for value in said.stdout.strip().split(",")]
    if said.returncode != 0 or len(values) != len(_FIELDS):
        return nothing
    named = dict(zip(_FIELDS, values, strict=True))
    return {name: value if name == "driver" else _number(value) for name, value in named.items()}


def _number(text: str) -> float | None:
    """A value of nvidia-smi; None for `[N/A]` and its other ways to know nothing."""
    try:
        return float(text)
    except ValueError:
        return None


def lines(gpu: dict[str, Any], cold: bool) -> list[str]:
    """The GPU and how it was timed, for the head of a report."""
    about = [
        f"{gpu['name']}, compute capability {gpu['compute_capability']}",
        f"{gpu['multiprocessors']} multiprocessors",
        f"{gpu['memory_bytes'] / 2**30:.0f} GiB",
        f"driver {gpu['driver'] or 'unknown'}",
        f"CUDA {gpu['cuda']}",
    ]
    clocks = [
        _clock("SM", gpu["sm_mhz"], gpu["max_sm_mhz"]),
        _clock("memory", gpu["memory_mhz"], gpu["max_memory_mhz"]),
    ]
    power = "unknown" if gpu["power_limit_watts"] is None else f"{gpu['power_limit_watts']:.0f} W"
    cache = f"L2 of {gpu['l2_bytes'] / 2**20:.0f} MiB"
    state = f"{cache} cold: overwritten before each call" if cold else f"{cache} warm: as the call before left it"
    return [
        ", ".join(about),
        f"{', '.join(clocks)}; power limit {power} (before anything ran; nothing was set)",
        f"timed by CUDA events, from an idle GPU until it is idle again; {state}",
    ]


def _clock(name: str, now: float | None, most: float | None) -> str:
    if now is None or most is None:
        return f"{name} clock unknown"
    return f"{name} clock {now:.0f} of {most:.0f} MHz"
