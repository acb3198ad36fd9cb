"""The benchmark: workers are started, warmed up, and take turns, round after round; what they say becomes results."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from qtool.bench import batches as files
from qtool.bench.agreement import Agreement, compare
from qtool.bench.batches import Outputs, Workload
from qtool.bench.crew import EngineError, Peer, crew, prepare
from qtool.bench.engines import ENGINES, QTOOL, REFERENCE
from qtool.bench.peaks import Peaks
from qtool.bench.runtimes import Request
from qtool.bench.timing import Timing, rotated

CALIBRATION, CHECK = "calibration.safetensors", "check.safetensors"


class Listener(Protocol):
    """Who is told how far it is: the screen of the command line."""

    def note(self, message: str) -> None:
        """A line."""

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of a stage are finished."""


class Silent:
    """Nobody."""

    def note(self, message: str) -> None:
        """Nothing."""

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Entry:
    """A model on an engine. `reference` is the float model that its outputs are compared with, None if there is none.

    `timed` is false for a reference that nobody asked for. `simulated` marks an artifact whose arithmetic only imitates
    integers: its times say nothing about integers.
    """

    model: str
    folder: Path
    engine: str
    methods: tuple[str, ...] = ()
    reference: Path | None = None
    simulated: bool = False
    timed: bool = True

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.model} on {self.engine}"


@dataclass
class Outcome:
    """What is known of an entry at the end: how it failed, or facts, times by workload and agreement with float."""

    entry: Entry
    error: str | None = None
    exit_code: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    peak_bytes: int = 0
    gpu_bytes: int | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    agreement: Agreement | None = None


@dataclass(frozen=True)
class Settings:
    """How it is measured. `seconds` is the least length of a turn; `cold_l2` empties a GPU's L2 cache before
    each call."""

    rounds: int = 5
    seconds: float = 0.5
    threads: int = 1
    device: str = "cpu"
    cold_l2: bool = False


@dataclass(frozen=True)
class Samples:
    """Batches that are not timed: those that engines calibrate on, and those whose outputs are compared."""

    calibration: Workload
    check: Workload


@dataclass
class _Player:
    outcome: Outcome
    peer: Peer
    outputs: list[Outputs] = field(default_factory=list)
    rounds: dict[str, list[list[float]]] = field(default_factory=dict)


def hold(
    entries: Sequence[Entry],
    workloads: Sequence[Workload],
    samples: Samples,
    settings: Settings,
    scratch: Path,
    max_tokens: int | None,
    listener: Listener,
) -> list[Outcome]:
    """Measure all entries on all workloads; an entry that fails says so in its outcome and stops nobody else."""
    places = [scratch / f"work-{number}.safetensors" for number in range(len(workloads))]
    for workload, place in zip(workloads, places, strict=True):
        files.write(workload, place)
    files.write(samples.calibration, scratch / CALIBRATION)
    files.write(samples.check, scratch / CHECK)
    outcomes = [Outcome(entry) for entry in entries]
    with crew() as start:
        players: list[_Player] = []
        for number, outcome in enumerate(outcomes):
            request = _request(outcome.entry, entries, workloads, settings, scratch, max_tokens)
            with _guarded(outcome, listener):
                players.append(_player(outcome, request, scratch / CHECK, places, start))
            listener.step("load", outcome.entry.label, number + 1, len(outcomes))
        players = _compared(players, samples.check.ragged)
        _take_turns(players, workloads, settings, listener)
        for player in players:
            if player.outcome.error is None:
                with _guarded(player.outcome, listener):
                    _finish(player, workloads)
    return outcomes


def _request(
    entry: Entry,
    entries: Sequence[Entry],
    workloads: Sequence[Workload],
    settings: Settings,
    scratch: Path,
    max_tokens: int | None,
) -> Request:
    """Engines of one model share a folder for what they export."""
    models = list(dict.fromkeys(other.folder for other in entries))
    folder = scratch / f"model-{models.index(entry.folder)}"
    folder.mkdir(exist_ok=True)
    inputs = list(workloads[0].batches[0])
    calibration = scratch / CALIBRATION
    return Request(
        entry.engine, entry.folder, settings.threads, folder, inputs, calibration, max_tokens, settings.device,
        settings.cold_l2,
    )  # fmt: skip


@contextmanager
def _guarded(outcome: Outcome, listener: Listener) -> Iterator[None]:
    """A failure of the engine becomes its outcome."""
    try:
        yield
    except EngineError as error:
        outcome.error, outcome.exit_code = str(error), error.exit_code
        listener.note(f"{outcome.entry.label} failed: {error}")


def _player(
    outcome: Outcome, request: Request, check: Path, places: Sequence[Path], start: Callable[[Request], Peer]
) -> _Player:
    """A worker that has loaded its model, computed what is compared and, where it is timed, seen every workload."""
    if {**ENGINES, QTOOL.name: QTOOL}[request.engine].packages:
        prepare(request, start)
    player = _Player(outcome, start(request))
    outcome.facts = player.peer.ask("load")
    player.outputs = _outputs(Path(player.peer.ask("check", file=str(check))["outputs"]))
    for place in places if outcome.entry.timed else ():
        player.peer.ask("warm", file=str(place))
    return player


def _outputs(path: Path) -> list[Outputs]:
    """What a worker computed, batch by batch."""
    from safetensors.numpy import load_file

    found: dict[int, Outputs] = {}
    for name, value in load_file(path).items():
        number, _, own = name.partition(".")
        found.setdefault(int(number), {})[own] = value
    path.unlink()
    return [found[number] for number in sorted(found)]


def _compared(players: list[_Player], texts: bool) -> list[_Player]:
    """Compare outputs, and send home who was only there for that."""
    by_folder = {p.outcome.entry.folder: p.outputs for p in players if p.outcome.entry.engine == REFERENCE}
    for player in players:
        entry = player.outcome.entry
        if entry.reference in by_folder and (entry.reference, REFERENCE) != (entry.folder, entry.engine):
            player.outcome.agreement = compare(by_folder[entry.reference], player.outputs, texts)
        if not entry.timed:
            player.peer.kill()
    return [player for player in players if player.outcome.entry.timed]


def _take_turns(players: list[_Player], workloads: Sequence[Workload], settings: Settings, listener: Listener) -> None:
    """Round after round, shape after shape, everybody once, another one first each round."""
    total, done = settings.rounds * len(workloads) * len(players), 0
    for number in range(settings.rounds):
        for workload in workloads:
            for player in rotated(players, number):
                if player.outcome.error is None:
                    with _guarded(player.outcome, listener):
                        _turn(player, workload, settings)
                done += 1
                listener.step("measure", "", done, total)


def _turn(player: _Player, workload: Workload, settings: Settings) -> None:
    found = player.peer.ask("measure", workload=workload.name, seconds=settings.seconds)
    player.rounds.setdefault(workload.name, []).append(found["ms"])


def _finish(player: _Player, workloads: Sequence[Workload]) -> None:
    """Memory and times."""
    memory = player.peer.ask("memory")
    player.outcome.peak_bytes, player.outcome.gpu_bytes = memory["peak_bytes"], memory.get("gpu_bytes")
    player.outcome.timings = {w.name: Timing(player.rounds[w.name], len(w.batches)) for w in workloads}


def peaks_of(folder: Path, settings: Settings, scratch: Path, listener: Listener) -> Peaks | None:
    """The peaks of the GPU, measured by a worker that is gone afterwards; None, and a note, where that failed."""
    request = Request(REFERENCE, folder, settings.threads, scratch, [], scratch / CALIBRATION, device=settings.device)
    try:
        with crew() as start:
            return Peaks.from_json(start(request).ask("peaks"))
    except EngineError as error:
        listener.note(f"the peaks of the GPU were not measured: {error}")
        return None


def without_reference(entries: Sequence[Entry]) -> list[Entry]:
    """The entries, preceded by an untimed one for each reference that nobody measures."""
    measured = {entry.folder for entry in entries if entry.engine == REFERENCE}
    lacking = {entry.reference: entry for entry in entries if entry.reference and entry.reference not in measured}
    extra = [
        replace(entry, folder=folder, engine=REFERENCE, methods=(), timed=False, simulated=False, reference=folder)
        for folder, entry in lacking.items()
    ]
    return [*extra, *entries]
