"""Pass 2: units lowered, audited and written as shards, while a golden batch flows through what was written.

Where no block depends on what the blocks before it became (`Method.independent`), ranks share the blocks: each follows
the float model on its own and lowers every so many-th block. After each round the first rank, which alone has the run
directory, gets the shards of the others. A kill costs a round.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from qtool import artifact, audit, ranks
from qtool.anatomy import Unit
from qtool.calibrate.sources import Batches
from qtool.calibrate.statistics import Statistics
from qtool.checkpoint import opened, tied_names
from qtool.device import CPU
from qtool.follow import Follower
from qtool.job import Event, Job, Note, Progress, ended, unit_seed
from qtool.memory import followed
from qtool.nn import QModule
from qtool.spill import State
from qtool.stream import Call, Reader, Stream, stored

Keep = Callable[[], MutableSequence[State]]


class Shards(Protocol):
    """Where the files of finished units lie."""

    def shard(self, unit: str) -> Path:
        """The file of a unit; its figures lie beside it."""


@dataclass(frozen=True)
class Aside:
    """The shards of a rank that does not publish, until they are fetched."""

    folder: Path

    def shard(self, unit: str) -> Path:
        """See `Shards`."""
        return self.folder / f"{unit}.safetensors"


def lower_all(
    job: Job,
    shards: Shards,
    batches: Batches,
    statistics: Statistics | None,
    inputs: Mapping[str, torch.Tensor],
    keep: Keep,
) -> Generator[Event, None, dict[str, torch.Tensor]]:
    """Lower what is not among `shards`. Returns the golden outputs, computed on the CPU from what lies on disk."""
    work = _Work(job, shards, batches, statistics, keep)
    golden = _Golden(job, work.model, shards, inputs)
    place, total = {unit.name: index for index, unit in enumerate(job.anatomy.units)}, len(job.anatomy.units)
    if ranks.current().size > 1 and not job.method.independent:
        yield Note("blocks of this recipe build on each other: one rank lowers them, the others wait")
    for units in work.rounds():
        started = {}
        for unit in units:
            started[unit.name] = time.perf_counter()
            yield Progress("quantize", unit.name, place[unit.name], total)
            yield from work.go_through(unit)
        yield from work.collect(units)
        for unit in units:
            golden.pass_through(unit)
            yield ended("quantize", unit, place[unit.name], total, started[unit.name])
    return golden.outputs


def help_lower(
    job: Job, batches: Batches, statistics: Statistics | None, keep: Keep, folder: Path
) -> Generator[Event, None, None]:
    """The share of a rank that does not publish; `folder` is for its shards until they are fetched."""
    work = _Work(job, Aside(folder), batches, statistics, keep)
    for units in work.rounds():
        for unit in units:
            yield from work.go_through(unit)
        yield from work.collect(units)


@dataclass(frozen=True)
class _Turns:
    """Which rank lowers which unit, and when."""

    units: Sequence[Unit]
    owner: Mapping[str, int]
    """The rank of each unit, by name; those that are done are not there."""

    def last(self, rank: int) -> int:
        """The place of the last unit that a rank lowers; -1 without one."""
        return max((place for place, unit in enumerate(self.units) if self.owner.get(unit.name) == rank), default=-1)

    def rounds(self) -> list[list[Unit]]:
        """Units in order, so many at a time that no rank has more than one to lower; those that are done alone."""
        found: list[list[Unit]] = []
        for unit in self.units:
            if found and self._together([*found[-1], unit]):
                found[-1].append(unit)
            else:
                found.append([unit])
        return found

    def _together(self, units: Sequence[Unit]) -> bool:
        owners = [self.owner.get(unit.name) for unit in units]
        return None not in owners and len({*owners}) == len(owners)


def _owners(missing: Sequence[str], blocks: set[str], group: ranks.Ranks, independent: bool) -> dict[str, int]:
    """Which rank lowers each missing unit: blocks in turn, where they may be shared, and the first rank the rest."""
    shared = [name for name in missing if name in blocks] if independent else []
    return {**dict.fromkeys(missing, 0), **{name: group.owner(number) for number, name in enumerate(shared)}}


class _Work:
    """This rank's part: the units that are its turn, and calibration data on their way to them."""

    def __init__(self, job: Job, shards: Shards, batches: Batches, statistics: Statistics | None, keep: Keep) -> None:
        self.job, self.shards, self.statistics, self.group = job, shards, statistics, ranks.current()
        job.method.resolve(job.plan, statistics)
        self.source = job.method.source(job.plan, statistics, job.checkpoint)
        self.model = job.lowered_skeleton()
        self._names = job.stored_names(self.model)
        self._turns = self._divided()
        self._stream = Stream(self.model, job.anatomy, _shard_reader(job, shards), job.device)
        self._follower = self._followed(batches, keep) if job.method.follows or job.method.learns else None

    def _divided(self) -> _Turns:
        """What the first rank, which has the shards of earlier tries, finds missing."""
        anatomy, independent = self.job.anatomy, self.job.method.independent
        absent = [unit.name for unit in anatomy.units if not self.shards.shard(unit.name).exists()]
        missing = self.group.told("missing units", absent)
        blocks = {unit.name for unit in anatomy.blocks}
        return _Turns(anatomy.units, _owners(missing, blocks, self.group, independent))

    def _followed(self, batches: Batches, keep: Keep) -> Follower:
        """Over the batches that a run of this size can afford."""
        job = self.job
        step = followed(job, len(batches.batches))
        exact = Stream(job.model, job.anatomy, self.source, job.device)
        lowered = None if job.method.independent else self._stream
        return Follower(exact, lowered, batches.batches[::step], keep)

    def rounds(self) -> list[list[Unit]]:
        """See `_Turns`. All ranks go through all units of a round, and then `collect` it."""
        return self._turns.rounds()

    def go_through(self, unit: Unit) -> Iterator[Event]:
        """Lower a unit that is this rank's, and go on to the next where it matters."""
        if self._turns.owner.get(unit.name) == self.group.rank:
            yield from self._lower(unit)
        self._advance(unit)

    def _lower(self, unit: Unit) -> Iterator[Event]:
        job, shard = self.job, self.shards.shard(unit.name)
        torch.manual_seed(unit_seed(job.recipe.seed, unit.name))
        names = [name for name in self._names if unit.owns(name)]
        _write_unit(job, unit, self.source, names, shard, self.statistics, self._follower)
        if self.group.size == 1 and (remark := job.method.remark(unit)):  # of several, the first makes them
            yield Note(remark)

    def _advance(self, unit: Unit) -> None:
        """Let calibration data pass a unit, unless lowering it has, or nothing behind it is this rank's."""
        follower, here = self._follower, self._turns.units.index(unit)
        if follower is None or follower.passed(unit) or here >= self._turns.last(self.group.rank):
            return
        with self._stream.loaded(unit) if follower.lowered else nullcontext():
            follower.advance(unit)

    def collect(self, units: Sequence[Unit]) -> Iterator[Event]:
        """Let the first rank have what the others lowered in this round, and say what is to be said of it."""
        if self.group.size == 1:
            return
        lowered = [unit for unit in units if unit.name in self._turns.owner]
        yield from self._remarks(lowered)
        for unit in lowered:
            if owner := self._turns.owner[unit.name]:
                self._move(unit, owner)

    def _remarks(self, lowered: Sequence[Unit]) -> Iterator[Note]:
        rank, owner = self.group.rank, self._turns.owner
        mine = {place: unit for place, unit in enumerate(lowered) if owner[unit.name] == rank}
        made = ranks.gathered("remarks", {place: self.job.method.remark(unit) for place, unit in mine.items()})
        return (Note(remark) for remark in made.values() if remark)

    def _move(self, unit: Unit, owner: int) -> None:
        """From its owner to the first rank; the shard last: with it a unit is finished."""
        shard = self.shards.shard(unit.name)
        for file in (shard.with_suffix(".json"), shard):
            self.group.fetch(file, owner)
            if self.group.rank == owner:
                file.unlink()


class _Golden:
    """The golden batch on its way through the shards, in the memory of one unit; only the first rank has one."""

    def __init__(self, job: Job, model: Any, shards: Shards, inputs: Mapping[str, torch.Tensor]) -> None:
        self._stream = Stream(model, job.anatomy, _shard_reader(job, shards), CPU)
        self._inputs, self._blocks = inputs, [unit.name for unit in job.anatomy.blocks]
        self._hidden, self._calls = torch.empty(0), tuple[Call, ...]()
        self.outputs: dict[str, torch.Tensor] = {}

    def pass_through(self, unit: Unit) -> None:
        """The next unit, as it lies on disk."""
        with self._stream.loaded(unit):
            if unit.kind == "embeddings":
                self._hidden, self._calls = self._stream.embed(self._inputs)
            elif unit.kind == "block":
                call = self._calls[self._blocks.index(unit.name)]
                self._hidden = self._stream.block(unit, self._hidden, call)
            else:
                self.outputs = self._stream.head(self._inputs, self._hidden)


def _write_unit(
    job: Job,
    unit: Unit,
    source: Reader,
    names: list[str],
    shard: Path,
    statistics: Statistics | None,
    follower: Follower | None,
) -> None:
    """Lower one unit, audit it, and write its tensors: those of the integer modules, and what is left in float."""
    lowered = _lowered(job, unit, source, statistics, follower)
    figures = _figures(job, unit, lowered, follower)
    tensors = _tensors(lowered)
    kept = dict(job.method.floats(unit))
    kept |= {name: stored(source, name) for name in names if name not in tensors and name not in kept}  # mapped, mostly
    wide = [name for name, value in kept.items() if value.is_floating_point()]
    artifact.write_json(shard.with_suffix(".json"), figures)
    artifact.write_tensors(shard, {**tensors, **kept}, as_float32=wide)


def _lowered(
    job: Job, unit: Unit, source: Reader, statistics: Statistics | None, follower: Follower | None
) -> Mapping[str, QModule]:
    """The modules of a unit by path; a block's with a lesson where the method learns."""
    with ExitStack() as stack:
        lesson = None
        if follower is not None and job.method.learns and unit.kind == "block":
            lesson = stack.enter_context(follower.lesson(unit))
        return job.method.lower(unit, job.plan, source, statistics, lesson)


def _figures(
    job: Job, unit: Unit, lowered: Mapping[str, QModule], follower: Follower | None
) -> dict[str, dict[str, float]]:
    """What is known of a unit by module path: from its method, from data that went through it, from the audit."""
    figures = {path: dict(found) for path, found in job.method.report().items() if unit.owns(path)}
    measured = _refine(job, unit, lowered, follower) if follower is not None and job.method.follows else {}
    for found in (measured, audit.check(lowered)):
        for path, values in found.items():
            figures.setdefault(path, {}).update(values)
    return figures


def _tensors(lowered: Mapping[str, QModule]) -> dict[str, torch.Tensor]:
    return {f"{path}.{name}": value for path, module in lowered.items() for name, value in module.state_dict().items()}


def _refine(job: Job, unit: Unit, lowered: Mapping[str, QModule], follower: Follower) -> dict[str, dict[str, float]]:
    """Correct what the method wants corrected, with the unit's modules in their places, and measure what is left."""
    stream, method = follower.lowered, job.method
    assert stream is not None  # who follows sees both models
    tensors = _tensors(lowered)

    def read(name: str) -> torch.Tensor:
        return tensors[name] if name in tensors else stream.reader(name)

    with stream.loaded(unit, read):
        for stage in method.stages(unit):
            for site, error in follower.corrections(unit, stage, method.grids()).items():
                with _on_host(stream, site) as module:
                    method.correct(module, site, error)
        figures = follower.measure(unit, method.grids())
        for path, module in lowered.items():
            found = stream.model.get_submodule(path).state_dict()
            module.load_state_dict({name: value.cpu() for name, value in found.items()}, assign=True)
    return figures


@contextmanager
def _on_host(stream: Stream, path: str) -> Iterator[Any]:
    """A module of a unit that is loaded, whose tensors are on the host while active: methods know no devices."""
    module = stream.model.get_submodule(path)
    yield module if stream.device.type == "cpu" else module.to(CPU)
    if stream.device.type != "cpu":
        module.to(stream.device)


def _shard_reader(job: Job, shards: Shards) -> Reader:
    """Reads tensors of the units that are on disk; a name that is shared is read under the name that is stored."""
    tied = tied_names(job.model)

    def read(name: str) -> torch.Tensor:
        for candidate in (name, tied.get(name, name)):
            unit = next(unit for unit in job.anatomy.units if unit.owns(candidate))
            with opened(shards.shard(unit.name)) as tensors:
                if candidate in tensors.keys():  # noqa: SIM118 (not a mapping)
                    value: torch.Tensor = tensors.get_tensor(candidate)
                    return value
        raise AssertionError(f"{name} was not written")

    return read
