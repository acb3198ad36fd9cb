"""Pass 2: units lowered, audited and written as shards, while a golden batch flows through what was written.

Where no block depends on what the blocks before it became (`Method.independent`), ranks share the blocks: each follows
the float model on its own and lowers every so many-th block. After each round the first rank, which alone has the run
directory, gets the shards of the others. A kill costs a round.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
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


class _Work:
    """Units on their way: which are missing, and whose they are."""

    def __init__(self, job: Job, shards: Shards, batches: Batches, statistics: Statistics | None, keep: Keep) -> None:
        self.job, self.shards, self.statistics, self.group = job, shards, statistics, ranks.current()
        job.method.resolve(job.plan, statistics)
        self.source = job.method.source(job.plan, statistics, job.checkpoint)
        self.model = job.lowered_skeleton()
        self._names = job.stored_names(self.model)
        units = job.anatomy.units
        missing = self.group.told(
            "missing units", [unit.name for unit in units if not shards.shard(unit.name).exists()]
        )
        self._owner = _owners(missing, {unit.name for unit in job.anatomy.blocks}, self.group, job.method.independent)
        mine = [number for number, unit in enumerate(units) if self._owner.get(unit.name) == self.group.rank]
        self._last = max(mine, default=-1)
        self._stream = Stream(self.model, job.anatomy, _shard_reader(job, shards), job.device)
        self._follower = self._followed(batches, keep) if job.method.follows or job.method.learns else None

    def _followed(self, batches: Batches, keep: Keep) -> Follower:
        """Over the batches that a run of this size can afford."""
        job = self.job
        step = followed(job, len(batches.batches))
        exact = Stream(job.model, job.anatomy, self.source, job.device)
        lowered = None if job.method.independent else self._stream
        return Follower(exact, lowered, batches.batches[::step], keep)

    def rounds(self) -> Iterator[list[Unit]]:
        """Units in order, so many at a time that no rank has more than one to lower; those that are done alone."""
        units: list[Unit] = []
        taken: list[int | None] = []
        for unit in self.job.anatomy.units:
            owner = self._owner.get(unit.name)
            if units and (owner is None or None in taken or owner in taken):
                yield units
                units, taken = [], []
            units.append(unit)
            taken.append(owner)
        yield units

    def go_through(self, unit: Unit) -> Iterator[Event]:
        """Lower a unit that is this rank's, and go on to the next where it matters."""
        job, shard = self.job, self.shards.shard(unit.name)
        if self._owner.get(unit.name) == self.group.rank:
            torch.manual_seed(unit_seed(job.recipe.seed, unit.name))
            names = [name for name in self._names if unit.owns(name)]
            _write_unit(job, unit, self.source, names, shard, self.statistics, self._follower)
            if self.group.size == 1 and (remark := job.method.remark(unit)):
                yield Note(remark)
        follower, here = self._follower, self.job.anatomy.units.index(unit)
        if follower is None or follower.passed(unit) or here >= self._last:
            return
        if follower.lowered is None:
            follower.advance(unit)
        elif self.group.first:
            with self._stream.loaded(unit):
                follower.advance(unit)

    def collect(self, units: Sequence[Unit]) -> Iterator[Event]:
        """Let the first rank have what the others lowered in this round."""
        if self.group.size == 1:
            return
        owned = [(unit, self._owner[unit.name]) for unit in units if unit.name in self._owner]
        remarks = ranks.gathered(
            "remarks",
            {
                number: self.job.method.remark(unit)
                for number, (unit, owner) in enumerate(owned)
                if owner == self.group.rank
            },
        )
        yield from (Note(remark) for remark in remarks.values() if remark)
        for unit, owner in owned:
            shard = self.shards.shard(unit.name)
            for file in (shard.with_suffix(".json"), shard):  # the shard last: with it a unit is finished
                if owner:
                    self.group.fetch(file, owner)
                if owner and owner == self.group.rank:
                    file.unlink()


def _owners(missing: Sequence[str], blocks: set[str], group: ranks.Ranks, independent: bool) -> dict[str, int]:
    """Which rank lowers each missing unit: blocks in turn, where they may be shared, and the first rank the rest."""
    shared = [name for name in missing if name in blocks] if independent else []
    return {**dict.fromkeys(missing, 0), **{name: group.owner(number) for number, name in enumerate(shared)}}


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
    method = job.method
    with ExitStack() as stack:
        lesson = (
            stack.enter_context(follower.lesson(unit)) if follower and method.learns and unit.kind == "block" else None
        )
        lowered = method.lower(unit, job.plan, source, statistics, lesson)
    figures = {path: dict(found) for path, found in method.report().items() if unit.owns(path)}
    if follower is not None and method.follows:
        for path, found in _refine(job, unit, lowered, follower).items():
            figures.setdefault(path, {}).update(found)
    for path, found in audit.check(lowered).items():
        figures.setdefault(path, {}).update(found)
    tensors = {
        f"{path}.{name}": value for path, module in lowered.items() for name, value in module.state_dict().items()
    }
    kept = dict(method.floats(unit))
    kept |= {name: stored(source, name) for name in names if name not in tensors and name not in kept}  # mapped, mostly
    wide = [name for name, value in kept.items() if value.is_floating_point()]
    artifact.write_json(shard.with_suffix(".json"), figures)
    artifact.write_tensors(shard, {**tensors, **kept}, as_float32=wide)


def _refine(job: Job, unit: Unit, lowered: Mapping[str, QModule], follower: Follower) -> dict[str, dict[str, float]]:
    """Correct what the method wants corrected, with the unit's modules in their places, and measure what is left."""
    stream, method = follower.lowered, job.method
    assert stream is not None  # who follows sees both models
    tensors = {
        f"{path}.{name}": value for path, module in lowered.items() for name, value in module.state_dict().items()
    }

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
