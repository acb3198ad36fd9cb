"""Ranks: processes that carry out one command together, on one machine or on many.

Somebody else starts them, with the same command line each: torchrun, `accelerate launch`, Slurm, a Kubernetes
PyTorchJob, or `--jobs` (`jobs.py`). RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who one is and where the others
are found. Each rank takes a share of the work that only its number decides, and what the shares gave is put together in
one order, so that results do not depend on how many there are.

Tensors travel between CPUs, as safetensors: hidden states and statistics lie there anyway, also where GPUs compute.
"""

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load, save

from qtool.errors import RESUMABLE, InputError, QtoolError, UnavailableError

BEAT = 1.0
"""Seconds between two signs of life."""
LOST = 30.0
"""Seconds without one after which a rank is taken for dead."""
_PATIENCE = timedelta(days=30)  # of a collective: who is alive may compute for as long as it takes
_CHUNK = 1 << 26  # bytes of a file that travel at a time
_ENDED, _GOODBYE = "error", "done"


class OtherRankError(QtoolError):
    """What ended another rank, with its exit code."""

    def __init__(self, rank: int, message: str, code: int) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.exit_code = code


class Ranks:
    """This process alone; `Group` is one of several."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` pieces of work are this rank's."""
        return range(self.rank, count, self.size)

    def owner(self, piece: int) -> int:
        """Which rank a piece belongs to."""
        return piece % self.size

    def exchange(self, mine: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """What every rank gave, by rank: all of them call this, and each gets all."""
        return [dict(mine)]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises InputError, naming what differs, unless all ranks have the same JSON-clean facts."""

    def told(self, value: Any) -> Any:
        """The first rank's JSON-clean value."""
        return value

    def send(self, file: Path) -> None:
        """Send a file to the first rank, which `receive`s it."""
        raise AssertionError("there is nobody to send to")

    def receive(self, file: Path, source: int) -> None:
        """Write a file that a rank sends."""
        raise AssertionError("there is nobody who sends")

    def check(self) -> None:
        """Raises what ended another rank."""

    @contextmanager
    def folder_aside(self) -> Iterator[Path]:
        """A folder for what only this rank needs, gone at the end, however the process ends short of a kill."""
        with tempfile.TemporaryDirectory(prefix="qtool-") as folder:
            yield Path(folder)


ALONE = Ranks()
_CURRENT: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def current() -> Ranks:
    """The ranks of this process."""
    return _CURRENT.get()


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other ranks of the environment, and part at the end. An error on any rank ends all of them.

    Raises UnavailableError where they cannot be met, OtherRankError for what ended another rank.
    """
    group = Group.of_environment()
    token = _CURRENT.set(group)
    try:
        yield group
        group.leave()
    except BaseException as error:
        group.tell(error)
        raise
    finally:
        _CURRENT.reset(token)


def threads_for(cores: int) -> int:
    """Threads of a rank where nobody says: the cores that this process may use, divided among the ranks of the host."""
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


class Group(Ranks):
    """One of several ranks. `store` is shared memory of all, for what is not work: signs of life, and errors."""

    def __init__(self, rank: int, size: int, store: Any) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._stop = threading.Event()
        self.aside: list[Path] = []
        """Folders that go with the process, however it ends."""
        self._signals, pen = socket.socketpair()
        self._signals.setblocking(False)
        pen.setblocking(False)
        self._pen = pen  # a signal's number is written there also while torch waits and handlers do not run
        signal.set_wakeup_fd(pen.fileno(), warn_on_full_buffer=False)
        self._watch = threading.Thread(target=self._watching, args=(store.clone(),), daemon=True)
        self._watch.start()

    @classmethod
    def of_environment(cls) -> "Group":
        """See `joined`."""
        import torch.distributed as dist

        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        ours = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
        try:  # while torch waits for the others no handler of Python's would run
            store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            work = dist.PrefixStore("work", store)  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=work, rank=rank, world_size=size, timeout=_PATIENCE)
        except (RuntimeError, ValueError, dist.DistError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise UnavailableError(f"cannot meet the other ranks at {where}: {said}") from error
        finally:
            for number, handler in ours.items():
                if handler is not None:  # one that Python did not install
                    signal.signal(number, handler)
        return cls(rank, size, store)

    def exchange(self, mine: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """See `Ranks`."""
        import torch.distributed as dist

        payload = torch.frombuffer(
            bytearray(save({name: x.contiguous() for name, x in mine.items()})), dtype=torch.uint8
        )
        with self._working():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(payload)]))
            room = max(int(size) for size in sizes)
            parts = [torch.empty(room, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(parts, torch.nn.functional.pad(payload, (0, room - len(payload))))
        return [load(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """See `Ranks`."""
        found = [_read(part) for part in self.exchange(_written(dict(facts)))]
        for rank, theirs in enumerate(found):
            if different := [name for name in sorted(theirs) if theirs[name] != found[0].get(name)]:
                raise InputError(
                    f"rank {rank} has a different {', '.join(different)} than rank 0: all need the same files, "
                    "versions, instruction set and --threads"
                )

    def told(self, value: Any) -> Any:
        """See `Ranks`."""
        found = self.exchange(_written(value if self.first else None))[0]
        return value if self.first else _read(found)

    def send(self, file: Path) -> None:
        """See `Ranks`."""
        import torch.distributed as dist

        with self._working(), file.open("rb") as stream:
            dist.send(torch.tensor([file.stat().st_size]), 0)
            while chunk := stream.read(_CHUNK):
                dist.send(torch.frombuffer(bytearray(chunk), dtype=torch.uint8), 0)

    def receive(self, file: Path, source: int) -> None:
        """See `Ranks`. The file appears when it is whole."""
        import torch.distributed as dist

        part = file.with_name(f"{file.name}.part")
        size = torch.zeros(1, dtype=torch.int64)
        with self._working():
            dist.recv(size, source)
            with _writing(part) as stream:
                for start in range(0, int(size), _CHUNK):
                    chunk = torch.empty(min(_CHUNK, int(size) - start), dtype=torch.uint8)
                    dist.recv(chunk, source)
                    stream.write(chunk.numpy().tobytes())
        os.replace(part, file)

    def check(self) -> None:
        """See `Ranks`."""
        found = _error(self._store)
        if found is not None and found["rank"] != self.rank:
            raise OtherRankError(found["rank"], found["message"], found["code"])

    @contextmanager
    def folder_aside(self) -> Iterator[Path]:
        """See `Ranks`."""
        with super().folder_aside() as folder:
            self.aside.append(folder)
            try:
                yield folder
            finally:
                self.aside.remove(folder)

    def leave(self) -> None:
        """Say goodbye, and wait until all have: who goes earlier would be taken for dead."""
        import torch.distributed as dist

        self.exchange({})
        self._stop.set()
        self._watch.join()
        signal.set_wakeup_fd(-1)
        dist.destroy_process_group()  # its threads must not outlive the interpreter

    def tell(self, error: BaseException) -> None:
        """Let the other ranks end with this error, unless one has ended before."""
        self._stop.set()
        code, message = ending(error)
        self._note(self._store, self.rank, code, message)

    @staticmethod
    def _note(store: Any, rank: int, code: int, message: str) -> None:
        """Say what ended a rank, unless one has ended before, and give the others time to read it."""
        note = json.dumps({"rank": rank, "code": code, "message": message})
        try:
            store.compare_set(_ENDED, "", note)
            time.sleep(2 * BEAT)  # the store may be this process's
        except RuntimeError:  # whoever kept the store is gone, and with it all ranks that could be told
            return

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

    def _watching(self, store: Any) -> None:
        """Give signs of life, and end this process when another rank has failed or gives none.

        The main thread may be waiting for that rank, where no exception reaches it.
        """
        seen: dict[int, tuple[bytes, float]] = {}
        while not self._stop.wait(BEAT):
            try:
                found = _error(store)
                store.set(f"beat {self.rank}", repr(time.monotonic()))
                silent = self._silent(store, seen)
            except RuntimeError:
                found, silent = None, [0]
            if self._stop.is_set():
                return
            if number := self._signalled():
                time.sleep(2 * BEAT)  # the main thread may end in order
                if not self._stop.is_set():
                    message = f"terminated; {RESUMABLE}"
                    self._note(store, self.rank, 128 + number, message)
                    self._end(message, 128 + number, -1)
            if found is not None and found["rank"] != self.rank:
                time.sleep(BEAT)  # the main thread may notice by itself, and end in order
                if not self._stop.is_set():
                    self._end(f"rank {found['rank']}: {found['message']}", found["code"], found["rank"])
            elif silent:
                code, message = UnavailableError.exit_code, f"it is gone; {RESUMABLE}"
                self._note(store, silent[0], code, message)
                self._end(f"rank {silent[0]}: {message}", code, silent[0])

    def _signalled(self) -> int:
        """The number of a signal that came since the last look; 0 for none."""
        try:
            found = self._signals.recv(64)
        except BlockingIOError:
            return 0
        return next((number for number in found if number in (signal.SIGTERM, signal.SIGINT)), 0)

    def _silent(self, store: Any, seen: dict[int, tuple[bytes, float]]) -> list[int]:
        """Ranks without a sign of life for too long. The first one looks at all, the others at the first."""
        now = time.monotonic()
        for rank in range(self.size) if self.first else (0,):
            key = f"beat {rank}"
            beat = store.get(key) if store.check([key]) else b""
            if rank not in seen or seen[rank][0] != beat:
                seen[rank] = beat, now
        return [rank for rank, (_, since) in seen.items() if now - since > LOST]

    def _end(self, message: str, code: int, culprit: int) -> None:
        """The first rank that is left speaks."""
        speaker = next(rank for rank in range(self.size) if rank != culprit)
        if self.rank == speaker:
            sys.stderr.write(f"qtool: {message}\n")
            sys.stderr.flush()
        for folder in self.aside:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(code)


@contextmanager
def _writing(file: Path) -> Iterator[IO[bytes]]:
    """Raises UnavailableError where the disk is full or may not be written on."""
    try:
        with file.open("wb") as stream:
            yield stream
    except OSError as error:
        file.unlink(missing_ok=True)
        raise UnavailableError(f"cannot write {file}: {error.strerror or error}") from error


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the line of an error."""
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", None)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if not isinstance(code, int):
        code = 1
    said = " ".join(str(error).split()) or type(error).__name__
    return code, said if code != 1 else f"{type(error).__name__}: {said}"


def gathered(mine: Mapping[int, Any]) -> dict[int, Any]:
    """What all ranks made of their pieces of work, by the number of the piece and in that order.

    Values are None, numbers, strings, numpy arrays of float64, and lists, tuples and dictionaries of such.
    """
    if current().size == 1:
        return dict(sorted(mine.items()))
    parts = [
        _read(part) for part in current().exchange(_written([[key, packed(value)] for key, value in mine.items()]))
    ]
    pairs = [pair for part in parts for pair in part]
    return {key: unpacked(value) for key, value in sorted(pairs, key=lambda pair: int(pair[0]))}


def packed(value: Any) -> Any:
    """JSON-clean, so that `unpacked` gives an equal value of the same types; exact for floats, also NaN."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [packed(item) for item in value]
    if type(value) is tuple:
        return {"tuple": [packed(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[packed(key), packed(item)] for key, item in value.items()]}
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        return {"array": value.ravel().tolist(), "shape": list(value.shape)}
    raise TypeError(f"a {type(value).__name__} does not travel between ranks")


def unpacked(value: Any) -> Any:
    """See `packed`."""
    if type(value) is list:
        return [unpacked(item) for item in value]
    if type(value) is not dict:
        return value
    if "array" in value:
        return np.array(value["array"], dtype=np.float64).reshape(value["shape"])
    if "tuple" in value:
        return tuple(unpacked(item) for item in value["tuple"])
    return {unpacked(key): unpacked(item) for key, item in value["dict"]}


def _error(store: Any) -> dict[str, Any] | None:
    if not store.check([_ENDED]):
        return None
    note = store.get(_ENDED)
    return dict(json.loads(note)) if note else None


def _written(value: Any) -> dict[str, torch.Tensor]:
    text = json.dumps(value, sort_keys=True).encode()
    return {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def _read(part: Mapping[str, torch.Tensor]) -> Any:
    return json.loads(part["json"].numpy().tobytes())
