"""`--jobs N`: the ranks of one command on one machine, without a launcher.

The parent keeps the store in which they meet, so that it outlives each of them, and starts the same command line once
for every rank. Its exit code is that of the command, which torchrun would not pass on.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from qtool.errors import JOBS_PARENT, RESUMABLE, STOPPED, InterruptedRun, UnavailableError, stopped

_GRACE = 15.0
"""Seconds that ranks have to end by themselves after one has."""


def run(count: int, arguments: Sequence[str]) -> int:
    """Run `qtool` with `arguments` on `count` ranks and return the exit code. Only rank 0 writes and prints."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    with socket.socket() as place:  # torch by itself listens to whole networks
        place.bind(("127.0.0.1", 0))
        place.listen(128)
        port = place.getsockname()[1]
        store = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=place.detach())
    children: list[subprocess.Popen[bytes]] = []
    try:
        with _deaf_to_the_terminal():
            for rank in range(count):
                children.append(_start(rank, count, store.port, arguments))
        return _wait(children)
    finally:
        _end(children)


def _loopback() -> dict[str, str]:
    """What has gloo, too, listen to this machine alone."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}


_QUIETLY = {"TORCH_CPP_LOG_LEVEL": "ERROR", **_loopback()}
"""In the environment of ranks, unless somebody says something else: a store that is gone is a line of qtool's."""


@contextmanager
def _deaf_to_the_terminal() -> Iterator[None]:
    """Children that are started meanwhile do not hear Ctrl-C, which a terminal sends to all of them: the parent does,
    and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(rank: int, count: int, port: int, arguments: Sequence[str]) -> "subprocess.Popen[bytes]":
    place = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # torch's word for: the store is there, only connect
        JOBS_PARENT: os.getpid(),
    }  # fmt: skip
    environment = {**_QUIETLY, **os.environ, **{name: str(value) for name, value in place.items()}}
    return subprocess.Popen([sys.executable, "-m", "qtool", *arguments], env=environment)


def _wait(children: Sequence["subprocess.Popen[bytes]"]) -> int:
    """The exit code, once all have ended or one has and the others do not: that of the first rank that failed."""
    ended: float | None = None
    while True:
        codes = [child.poll() for child in children]
        killed = next((rank for rank, code in enumerate(codes) if code is not None and code < 0), None)
        if killed is not None:
            _verdict(128 - int(codes[killed] or 0))
            name = signal.strsignal(-int(codes[killed] or 0)) or f"signal {codes[killed]}"
            raise UnavailableError(f"rank {killed} was ended by a signal ({name}); {RESUMABLE}")
        if any(codes):
            ended = ended or time.monotonic()
        late = ended is not None and time.monotonic() - ended > _GRACE
        if late:
            for child in children:  # frozen, maybe
                child.kill()
        if late or all(code is not None for code in codes):
            return _verdict(next((code for code in codes if code), 0))
        time.sleep(0.1)


def _verdict(code: int) -> int:
    """Raises InterruptedRun for ranks that were asked to end: they say nothing then (`said_by_parent`)."""
    if code in STOPPED:
        raise InterruptedRun(stopped(code), code - 128)
    return code


def _end(children: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Nobody stays behind, whatever ended the parent."""
    for child in children:
        child.terminate()
    deadline = time.monotonic() + _GRACE
    try:
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
    finally:  # also where a second Ctrl-C cuts the waiting short
        for child in children:
            child.kill()
            child.wait()
