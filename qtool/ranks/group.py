"""One of several ranks: how it meets the others, and what they send each other."""

import os
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load, save

from qtool.errors import JOBS_PARENT, RESUMABLE, InputError, UnavailableError
from qtool.ranks.alone import Ranks
from qtool.ranks.life import ASKED, BEAT, Life
from qtool.ranks.values import read, written

_PATIENCE = timedelta(days=30)  # of a collective: who is alive may compute for as long as it takes
_CHUNK = 1 << 26  # bytes of a file that travel at a time
_HEADER = struct.Struct("<q120s")  # bytes that follow, and what they are


class Group(Ranks):
    """One of several ranks, which all make the same calls in the same order."""

    def __init__(self, rank: int, size: int, life: Life) -> None:
        self.rank, self.size = rank, size
        self._life = life

    @classmethod
    def of_environment(cls, farewell: Callable[[str, int], None] | None) -> "Group":
        """See `qtool.ranks.joined`."""
        import torch.distributed as dist

        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        heard = [number for number in ASKED if signal.getsignal(number) != signal.SIG_IGN]
        ours = {number: signal.signal(number, signal.SIG_DFL) for number in heard}
        met = threading.Event()
        threading.Thread(target=_end_without_parent, args=(met,), daemon=True).start()
        life = None
        try:  # while torch waits for the others no handler of Python's would run
            store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            life = Life(rank, size, store, farewell)
            life.await_all()  # and they are watched from now on, for torch would wait for whoever dies here
            work = dist.PrefixStore("work", store)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=work, rank=rank, world_size=size, timeout=_PATIENCE)
        except (RuntimeError, ValueError, dist.DistError, UnavailableError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            problem = UnavailableError(f"cannot meet the other ranks at {where}: {said}")
            if life is not None:
                life.tell(problem)
            raise problem from error
        finally:
            met.set()
            for number, handler in ours.items():
                if handler is not None:  # one that Python did not install
                    signal.signal(number, handler)
        return cls(rank, size, life)

    def exchange(self, what: str, mine: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """See `Ranks`. Each part travels as it is: one that is large costs nothing where others are small or empty."""
        payload = save({name: x.contiguous() for name, x in mine.items()}) if mine else b""
        return [self._part(payload, rank, size) for rank, size in enumerate(self._announced(what, len(payload)))]

    def _announced(self, what: str, size: int) -> list[int]:
        """How many bytes each rank is about to give. Raises AssertionError unless all mean the same by it."""
        import torch.distributed as dist

        mine = _as_tensor(_HEADER.pack(size, what.encode()))
        headers = [torch.empty_like(mine) for _ in range(self.size)]
        with self._working():
            dist.all_gather(headers, mine)
        sizes, names = zip(*(_HEADER.unpack(header.numpy().tobytes()) for header in headers), strict=True)
        said = [name.rstrip(b"\0").decode(errors="replace") for name in names]
        for rank, theirs in enumerate(said):
            if theirs != said[0]:
                raise AssertionError(f"ranks went different ways: rank 0 is at '{said[0]}', rank {rank} at '{theirs}'")
        return list(sizes)

    def _part(self, mine: bytes, rank: int, size: int) -> dict[str, torch.Tensor]:
        """What `rank` gives, of `size` bytes, where `mine` is this rank's."""
        import torch.distributed as dist

        if not size:
            return {}
        part = _as_tensor(mine) if rank == self.rank else torch.empty(size, dtype=torch.uint8)
        with self._working():
            dist.broadcast(part, rank)
        return load(part.numpy().tobytes())

    def agree(self, what: str, facts: Mapping[str, Any]) -> None:
        """See `Ranks`."""
        found = [read(part) for part in self.exchange(what, written(dict(facts)))]
        for rank, theirs in enumerate(found):
            if different := [name for name in sorted(theirs) if theirs[name] != found[0].get(name)]:
                raise InputError(
                    f"rank {rank} has a different {', '.join(different)} than rank 0: all need the same files, "
                    "versions, instruction set and --threads"
                )

    def told(self, what: str, value: Any) -> Any:
        """See `Ranks`."""
        found = self.exchange(what, written(value) if self.first else {})[0]
        return value if self.first else read(found)

    def fetch(self, file: Path, owner: int) -> None:
        """See `Ranks`. The file appears when it is whole."""
        size = self._announced(f"file {file.name}", file.stat().st_size if self.rank == owner else 0)[owner]
        if self.rank == owner:
            self._send(file)
        elif self.first:
            self._receive(file, owner, size)

    def _send(self, file: Path) -> None:
        import torch.distributed as dist

        with self._working(), file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                dist.send(_as_tensor(chunk), 0)

    def _receive(self, file: Path, source: int, size: int) -> None:
        import torch.distributed as dist

        part = file.with_name(f"{file.name}.part")
        try:
            with _writing(part) as stream:
                for start in range(0, size, _CHUNK):
                    chunk = torch.empty(min(_CHUNK, size - start), dtype=torch.uint8)
                    with self._working():
                        dist.recv(chunk, source)
                    stream.write(chunk.numpy().tobytes())
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)

    def check(self) -> None:
        """See `Ranks`."""
        self._life.check()

    def leave(self) -> None:
        """Say goodbye, and wait until all have: who goes earlier would be taken for dead."""
        import torch.distributed as dist

        self.exchange("goodbye", {})
        self._life.end()
        dist.destroy_process_group()  # its threads must not outlive the interpreter

    def tell(self, error: BaseException) -> None:
        """Let the other ranks end with this error, unless one has ended before."""
        self._life.tell(error)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """A connection that broke says that a rank has ended; why, it may have told."""
        try:
            yield
        except RuntimeError as error:
            for _ in range(10):
                self.check()
                time.sleep(BEAT / 4)
            raise UnavailableError(f"another rank ended without a word; {RESUMABLE}") from error


def _end_without_parent(met: threading.Event) -> None:
    """End this process when the one is gone that `--jobs` was asked of: it keeps the store, for which torch would look
    for minutes. Once ranks have met, the store itself says so."""
    parent = os.environ.get(JOBS_PARENT)
    while parent is not None and not met.wait(BEAT):
        if str(os.getppid()) != parent:
            os._exit(UnavailableError.exit_code)


@contextmanager
def _writing(file: Path) -> Iterator[IO[bytes]]:
    """Raises UnavailableError where the disk is full or may not be written on."""
    try:
        with file.open("wb") as stream:
            yield stream
    except OSError as error:
        raise UnavailableError(f"cannot write {file}: {error.strerror or error}; free some space there") from error


def _as_tensor(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
