"""calibrate → quantize → publish, unit by unit.

Pass 1 streams the float units once while observers watch their inputs (this alone is `qtool calibrate`); pass 2 lowers
each unit to integer modules, writes it as a shard and lets a golden batch flow through what was written. Then the
shards are streamed into an artifact, which a fresh process loads and compares before it is moved into place.

Both functions are generators of events; whoever iterates them renders progress, or does not.
"""

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qtool import __version__, artifact, audit, card, golden, ranks
from qtool.anatomy import Anatomy, Unit
from qtool.anatomy import anatomy as anatomy_of
from qtool.artifact import FORMAT_VERSION, PRUNED, QUANT_METHOD
from qtool.calibrate.observers import OBSERVERS, Observer
from qtool.calibrate.sources import Batches
from qtool.calibrate.statistics import Statistics
from qtool.checkpoint import Checkpoint, load_config, open_float, opened, sha256, skeleton, tied_names
from qtool.device import CPU, arithmetic
from qtool.errors import InputError, QtoolError
from qtool.follow import Follower
from qtool.hf import adapt
from qtool.kernels import backend, reference
from qtool.memory import followed
from qtool.methods import build, entry
from qtool.methods.base import Method, Plan
from qtool.methods.combined import Combined
from qtool.nn import QModule
from qtool.pruning import heads_json, shrink
from qtool.recipe import Recipe
from qtool.rundir import RunDirectory
from qtool.spill import SpilledStates, State
from qtool.stream import Call, Reader, Stream, give_back, stored
from qtool.watch import open_attention, watching

Keep = Callable[[], MutableSequence[State]]


@dataclass(frozen=True)
class Progress:
    """A unit of work is about to start (`seconds` None) or has ended. `peak_bytes` is the process's peak memory."""

    stage: str
    unit: str
    index: int
    total: int
    seconds: float | None = None
    peak_bytes: int = 0


@dataclass(frozen=True)
class Note:
    """Something the user should know."""

    message: str


Event = Progress | Note


@dataclass
class Job:
    """A model and a recipe, with everything that follows from shapes alone; `device` is where units compute."""

    source: Path
    source_name: str
    recipe: Recipe
    device: torch.device = CPU
    model: Any = field(init=False)
    anatomy: Anatomy = field(init=False)
    methods: Sequence[Method] = field(init=False)
    method: Method = field(init=False)
    """All methods as one."""
    plan: Plan = field(init=False)
    checkpoint: Checkpoint = field(init=False)

    def __post_init__(self) -> None:
        self.model, self.checkpoint = open_float(self.source)
        self.methods = build(self.recipe.for_parts(anatomy_of(self.model).names()))
        self.method = self.methods[0] if len(self.methods) == 1 else Combined(self.methods)
        self.method.reshape(self.model, self.checkpoint)
        self.anatomy = anatomy_of(self.model)
        plan = self.method.plan(self.anatomy, self.model)
        if not plan.modules and not plan.heads:
            raise InputError("the recipe leaves every module in float; there is nothing to quantize")
        tied = getattr(self.model.config, "tie_word_embeddings", True)
        self.plan = replace(plan, config={**({} if tied else {"tie_word_embeddings": False}), **plan.config})
        if not plan.modules:
            kept = {part.path: "no method of the recipe quantizes" for _, part in self.anatomy.parts()}
            self.plan = replace(self.plan, kept_float=kept)
        for method in self.methods:
            if settled := method.settled():
                self.recipe = self.recipe.with_options(method.name, settled)

    def lowered_skeleton(self) -> Any:
        """The model with empty quantized modules (meta device)."""
        config = load_config(self.source)
        for key, value in self.plan.config.items():
            setattr(config, key, value)
        model = skeleton(config)
        if self.plan.heads:
            shrink(model, self.plan.heads)
        adapt(model, self.plan.modules, dtype=torch.float32)
        return model

    def stored_names(self, model: Any) -> list[str]:
        """Tensors of the artifact, in the order of the model; a tensor shared by two names is stored once."""
        shared = {} if self.plan.config.get("tie_word_embeddings") is False else tied_names(model)
        return [name for name in model.state_dict() if name not in shared]

    def predicted_bytes(self) -> int:
        """Size of the weight file, from shapes alone."""
        model = self.lowered_skeleton()
        tensors = model.state_dict()
        return artifact.predicted_size((name, tensors[name]) for name in self.stored_names(model))

    def observed(self) -> dict[str, dict[str, str]]:
        """Unit name → module path → observer."""
        wanted = {unit.name: self.method.observers(unit, self.plan) for unit in self.anatomy.units}
        return {name: observers for name, observers in wanted.items() if observers}

    @property
    def reads_data(self) -> bool:
        """Whether any step looks at calibration data; without one, they need not be made."""
        return bool(self.observed()) or self.method.follows or self.method.learns

    def fingerprint(self, batches: Batches, statistics: Path | None = None) -> dict[str, Any]:
        """Everything that the bytes of the artifact depend on; `statistics` is a file that replaces pass 1."""
        return {
            "model": self.checkpoint.digest(),
            "data": batches.digest,
            "recipe": _digest(self.recipe.quantization_part()),
            "seed": self.recipe.seed,
            "threads": torch.get_num_threads(),
            "instruction set": instruction_set(self.device),
            "versions": {**versions(), **_plugin_versions(self.methods)},
            "statistics": sha256(statistics) if statistics else None,
        }

    def statistics_fingerprint(self, batches: Batches) -> dict[str, Any]:
        """What a statistics file depends on: not the part of the recipe that only rounding reads."""
        observers = sorted({(path, name) for unit in self.observed().values() for path, name in unit.items()})
        found = {"model": self.checkpoint.digest(), "data": batches.digest, "observers": _digest(observers)}
        return {**found, "heads": _digest(heads_json(self.plan.heads))} if self.plan.heads else found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def instruction_set(device: torch.device = CPU) -> str:
    """What decides how float sums are rounded on this CPU, and which exact integer product is used.

    Of a GPU its name too: there sums are rounded in another way.
    """
    here = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {reference.exact_product()}"
    return here if device.type == "cpu" else f"{here}{BESIDE}{arithmetic(device)}"


BESIDE = " + "
"""Between a CPU and the GPU that computed beside it. Golden outputs are always the CPU's."""


def versions() -> dict[str, str]:
    """Versions of what computes and what writes."""
    packages = ("torch", "transformers", "safetensors", "tokenizers")
    return {"qtool": __version__, **{name: metadata.version(name) for name in packages}}


def _plugin_versions(methods: Sequence[Method]) -> dict[str, str]:
    """Of the packages that bring methods along."""
    origins = {method.name: entry(method.name).origin for method in methods}
    return {name: origin for name, origin in origins.items() if origin != "qtool"}


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def unit_seed(seed: int, unit: str) -> int:
    """The seed of a unit: the first 8 bytes of SHA-256 of `seed:unit`, whatever ran before."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{unit}".encode()).digest()[:8], "big", signed=True)


def calibrate(job: Job, batches: Batches, keep: Keep = list) -> Generator[Event, None, Statistics]:
    """Pass 1: stream the float units once. Returns the statistics that the job's method asked for.

    `keep` makes the lists of hidden states. Ranks share the batches, and each returns the statistics of all.
    """
    stream = Stream(job.model, job.anatomy, job.checkpoint.tensor, job.device)
    states: dict[tuple[str, str], Any] = {}
    flow, group = keep(), ranks.current()
    mine = list(group.share(len(batches.batches)))
    firsts = _first_rows(batches)
    observed = job.observed()
    units = job.anatomy.units if job.anatomy.head.name in observed else job.anatomy.units[:-1]
    sites = [site for unit in observed.values() for site in unit]
    with open_attention(stream.model, sites) as probes:
        for index, unit in enumerate(units):
            started = time.perf_counter()
            yield Progress("calibrate", unit.name, index, len(units))
            observers = {site: OBSERVERS[name]() for site, name in observed.get(unit.name, {}).items()}
            with stream.loaded(unit):
                if unit.kind == "embeddings":
                    for number in mine:
                        flow.append(stream.embed(batches.batches[number]))
                        give_back()
                else:
                    for place, (hidden, calls) in enumerate(flow):
                        number = mine[place]
                        batch = batches.batches[number]
                        if group.size > 1:
                            for observer in observers.values():
                                observer.begin(number, firsts[number])
                        real = batch["attention_mask"].bool().to(job.device)
                        with watching(stream.model, observers, real, probes):
                            if unit.kind == "head":
                                stream.head(batch, hidden)
                            else:
                                flow[place] = stream.block(unit, hidden, calls[index - 1]), calls
                        give_back()
            for site, observer in _put_together(observers).items():
                state = {name: value.cpu() for name, value in observer.state().items()}
                states[site, observed[unit.name][site]] = state
            yield _ended("calibrate", unit, index, len(units), started)
    return Statistics(states, job.statistics_fingerprint(batches))


def _first_rows(batches: Batches) -> list[int]:
    """The number among all real tokens of the first one of each batch."""
    sizes = [int(batch["attention_mask"].sum()) for batch in batches.batches]
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _put_together(observers: Mapping[str, Observer]) -> Mapping[str, Observer]:
    """Observers of what all ranks saw, by site."""
    group = ranks.current()
    if group.size == 1:
        return observers
    sites = list(observers)
    mine = {
        f"{place}|{name}": value.cpu()
        for place, site in enumerate(sites)
        for name, value in observers[site].parts().items()
    }
    found: dict[str, Observer] = {site: type(observers[site])() for site in sites}
    for theirs in group.exchange(mine):
        for place, site in enumerate(sites):
            start = f"{place}|"
            found[site].absorb({key[len(start) :]: x for key, x in theirs.items() if key.startswith(start)})
    return found


def _ended(stage: str, unit: Unit, index: int, total: int, started: float) -> Progress:
    return Progress(stage, unit.name, index, total, time.perf_counter() - started, peak_bytes())


def quantize(
    job: Job,
    batches: Batches,
    inputs: Mapping[str, torch.Tensor],
    run: RunDirectory,
    statistics: Statistics | None = None,
    *,
    spill: bool = False,
) -> Generator[Event, None, None]:
    """Both passes and the publication. Shards that `run` already holds are kept; `inputs` is the golden batch.

    With `spill` the hidden states of calibration batches lie on disk, in the run directory.
    """
    keep: Keep = partial(SpilledStates, run.path) if spill else list
    if run.already_published():
        yield Note(f"{run.out} was already published by this run")
        run.finish()
        return
    if job.anatomy.generic:
        yield Note(
            f"model type '{job.model.config.model_type}' is not in qtool's table: its generic anatomy is used "
            f"({len(job.anatomy.blocks)} blocks, all Linears in them)"
        )
    if job.observed():
        statistics = yield from _statistics(job, batches, run, statistics, keep)
    outputs = yield from _lower_all(job, run, batches, statistics, inputs, keep)
    yield from _publish(job, run, batches, inputs, outputs)


def _statistics(
    job: Job, batches: Batches, run: RunDirectory, given: Statistics | None, keep: Keep
) -> Generator[Event, None, Statistics]:
    """Given ones, those of an earlier try, or pass 1."""
    kept = run.shard("statistics")
    if given is None and kept.exists():
        return Statistics.read(kept)
    statistics = given or (yield from calibrate(job, batches, keep))
    artifact.write_tensors(kept, statistics.tensors())
    return statistics


def _lower_all(
    job: Job,
    run: RunDirectory,
    batches: Batches,
    statistics: Statistics | None,
    inputs: Mapping[str, torch.Tensor],
    keep: Keep,
) -> Generator[Event, None, dict[str, torch.Tensor]]:
    """Pass 2. Returns the golden outputs, computed on the CPU from the shards as they lie on disk."""
    job.method.resolve(job.plan, statistics)
    source = job.method.source(job.plan, statistics, job.checkpoint)
    model = job.lowered_skeleton()
    names = job.stored_names(model)
    golden_stream, stream = (Stream(model, job.anatomy, _shard_reader(job, run), at) for at in (CPU, job.device))
    follows = job.method.follows or job.method.learns
    follower = _follower(job, source, stream, batches, keep) if follows else None
    hidden, calls, outputs = torch.empty(0), tuple[Call, ...](), {}
    total = len(job.anatomy.units)
    for index, unit in enumerate(job.anatomy.units):
        started = time.perf_counter()
        yield Progress("quantize", unit.name, index, total)
        shard = run.shard(unit.name)
        if not shard.exists():
            torch.manual_seed(unit_seed(job.recipe.seed, unit.name))
            _write_unit(job, unit, source, [name for name in names if unit.owns(name)], shard, statistics, follower)
            if remark := job.method.remark(unit):
                yield Note(remark)
        if follower is not None and not follower.passed(unit):
            with stream.loaded(unit):
                follower.advance(unit)
        with golden_stream.loaded(unit):
            if unit.kind == "embeddings":
                hidden, calls = golden_stream.embed(inputs)
            elif unit.kind == "block":
                hidden = golden_stream.block(unit, hidden, calls[index - 1])
            else:
                outputs = golden_stream.head(inputs, hidden)
        yield _ended("quantize", unit, index, total, started)
    return outputs


def _follower(job: Job, source: Reader, lowered: Stream, batches: Batches, keep: Keep) -> Follower:
    """Over the batches that a run of this size can afford."""
    step = followed(job, len(batches.batches))
    exact = Stream(job.model, job.anatomy, source, job.device)
    return Follower(exact, lowered, batches.batches[::step], keep)


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


def _shard_reader(job: Job, run: RunDirectory) -> Reader:
    """Reads tensors of the units that are on disk; a name that is shared is read under the name that is stored."""
    tied = tied_names(job.model)

    def read(name: str) -> torch.Tensor:
        for candidate in (name, tied.get(name, name)):
            unit = next(unit for unit in job.anatomy.units if unit.owns(candidate))
            with opened(run.shard(unit.name)) as tensors:
                if candidate in tensors.keys():  # noqa: SIM118 (not a mapping)
                    value: torch.Tensor = tensors.get_tensor(candidate)
                    return value
        raise AssertionError(f"{name} was not written")

    return read


def _publish(
    job: Job,
    run: RunDirectory,
    batches: Batches,
    inputs: Mapping[str, torch.Tensor],
    outputs: Mapping[str, torch.Tensor],
) -> Iterator[Event]:
    """Assemble, check in a fresh process, move into place."""
    started = time.perf_counter()
    yield Progress("publish", "assemble", 0, 2)
    staging = run.fresh_staging()
    manifest = artifact.assemble([run.shard(unit.name) for unit in job.anatomy.units], staging)
    _write_config(job, staging, manifest)
    artifact.copy_side_files(job.source, staging)
    report = _report(job, run, batches, golden.record(inputs, outputs), staging)
    artifact.write_json(staging / artifact.REPORT, report, sort=False)  # the order of rules counts
    text = card.render(report, artifact.size_on_disk(staging), job.recipe.without_paths().to_yaml())
    artifact.write_text(staging / artifact.CARD, text)
    yield Progress("publish", "assemble", 0, 2, time.perf_counter() - started, peak_bytes())
    started = time.perf_counter()
    yield Progress("publish", "golden check", 1, 2)
    try:
        _check_in_fresh_process(run, inputs, outputs)
    except QtoolError as error:
        if job.anatomy.generic:  # what was only guessed did not fit: no bug of this model's loader
            raise InputError(f"{job.anatomy.architecture} does not compute the same unit by unit: {error}") from error
        raise
    run.publish()
    yield Progress("publish", "golden check", 1, 2, time.perf_counter() - started, peak_bytes())
    run.finish()


def _write_config(job: Job, staging: Path, manifest: artifact.Manifest) -> None:
    """The source's config.json with what quantization changes."""
    config = json.loads((job.source / "config.json").read_text("utf-8"))
    for key in ("_name_or_path", "torch_dtype", "transformers_version", "auto_map"):  # an artifact holds no code
        config.pop(key, None)
    quantization = {
        "quant_method": QUANT_METHOD,
        "version": FORMAT_VERSION,
        "producer": f"qtool {__version__}",
        "methods": [method.name for method in job.methods],
        "modules": job.plan.modules,
        "tensors": manifest,
        **({PRUNED: heads_json(job.plan.heads)} if job.plan.heads else {}),
    }
    artifact.write_json(
        staging / "config.json", {**config, **job.plan.config, "dtype": "float32", "quantization_config": quantization}
    )


def _report(
    job: Job, run: RunDirectory, batches: Batches, golden_batch: Mapping[str, Any], staging: Path
) -> dict[str, Any]:
    """`qtool.json`."""
    figures: dict[str, Any] = {}
    for unit in job.anatomy.units:
        figures |= json.loads(run.shard(unit.name).with_suffix(".json").read_text("utf-8"))
    local = Path(job.source_name).expanduser().is_dir()
    return {
        "schema_version": 1,
        "source": {
            "name": str(job.source.absolute()) if local else job.source_name,
            "revision": job.recipe.model.revision,
            "bytes": job.checkpoint.num_bytes,
            "sha256": run.fingerprint["model"],
        },
        "recipe": job.recipe.model_dump(mode="json", exclude_none=True),
        "calibration": batches.description if job.reads_data else None,
        "execution": {"kind": "real", "backend": backend().name, "arithmetic": job.method.arithmetic},
        "architecture": job.anatomy.architecture,
        "head": job.anatomy.head_kind,
        "modules": job.plan.modules,
        "kept_float": job.plan.kept_float,
        "figures": figures,
        "fingerprint": run.fingerprint,
        "golden": golden_batch,
        "files": artifact.file_digests(staging),
    }


def _check_in_fresh_process(
    run: RunDirectory, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]
) -> None:
    """Raises when the staged model does not load, or does not give the golden outputs bit for bit."""
    expected = run.path / "golden.safetensors"
    tensors = {f"in.{name}": value for name, value in inputs.items()}
    tensors |= {f"out.{name}": value for name, value in outputs.items()}
    artifact.write_tensors(expected, tensors)
    paths = [str(path.absolute()) for path in (run.staging, expected)]
    command = [sys.executable, "-m", "qtool.golden", *paths, str(torch.get_num_threads())]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    # In the run's own folder: before Python 3.11 `-m` would also look for modules in the user's working directory.
    result = subprocess.run(command, cwd=run.path, capture_output=True, text=True, env=environment, check=False)
    if result.returncode != 0:
        said = result.stderr.strip().splitlines() or ["it said nothing"]
        raise QtoolError(
            f"the quantized model failed its golden check in a fresh process; please report this: {said[-1]}"
        )
