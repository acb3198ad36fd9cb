"""calibrate → quantize → publish, unit by unit.

Pass 1 streams the float units once while observers watch their inputs (this alone is `qtool calibrate`); pass 2
(`lowering.py`) lowers each unit to integer modules, writes it as a shard and lets a golden batch flow through what was
written. Then the shards are streamed into an artifact, which a fresh process loads and compares before it is moved into
place.

Both functions are generators of events; whoever iterates them renders progress, or does not. On several ranks all of
them run these, each with its share, and the first one publishes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qtool import __version__, artifact, card, golden, ranks
from qtool.artifact import FORMAT_VERSION, PRUNED, QUANT_METHOD
from qtool.aside import folder_aside
from qtool.calibrate.observers import OBSERVERS, Observer
from qtool.calibrate.sources import Batches
from qtool.calibrate.statistics import Statistics
from qtool.errors import InputError, QtoolError
from qtool.job import Event, Job, Note, Progress, ended, peak_bytes
from qtool.kernels import backend
from qtool.lowering import Keep, help_lower, lower_all
from qtool.pruning import heads_json
from qtool.rundir import RunDirectory
from qtool.spill import SpilledStates
from qtool.stream import Stream, give_back
from qtool.watch import open_attention, watching


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
            for site, observer in _put_together(unit.name, observers).items():
                state = {name: value.cpu() for name, value in observer.state().items()}
                states[site, observed[unit.name][site]] = state
            yield ended("calibrate", unit, index, len(units), started)
    return Statistics(states, job.statistics_fingerprint(batches))


def _first_rows(batches: Batches) -> list[int]:
    """The number among all real tokens of the first one of each batch."""
    sizes = [int(batch["attention_mask"].sum()) for batch in batches.batches]
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _put_together(unit: str, observers: Mapping[str, Observer]) -> Mapping[str, Observer]:
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
    for theirs in group.exchange(f"statistics of {unit}", mine):
        for place, site in enumerate(sites):
            start = f"{place}|"
            found[site].absorb({key[len(start) :]: x for key, x in theirs.items() if key.startswith(start)})
    return found


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
    if ranks.current().told("whether it is published", run.already_published()):
        yield Note(f"{run.out} was already published by this run")
        run.finish()
        return
    if job.anatomy.generic:
        yield Note(
            f"model type '{job.model.config.model_type}' is not in qtool's table: its generic anatomy is used "
            f"({len(job.anatomy.blocks)} blocks, all Linears in them)"
        )
    if job.observed():
        statistics = yield from _statistics(job, batches, run.shard("statistics"), statistics, keep)
    outputs = yield from lower_all(job, run, batches, statistics, inputs, keep)
    yield from _publish(job, run, batches, inputs, outputs)


def help_quantize(
    job: Job, batches: Batches, statistics: Statistics | None = None, *, spill: bool = False
) -> Generator[Event, None, None]:
    """What a rank that does not publish does of `quantize`."""
    if ranks.current().told("whether it is published", None):
        return
    with folder_aside() as folder:
        keep: Keep = partial(SpilledStates, folder) if spill else list
        if job.observed():
            statistics = yield from _statistics(job, batches, None, statistics, keep)
        yield from help_lower(job, batches, statistics, keep, folder)


def _statistics(
    job: Job, batches: Batches, kept: Path | None, given: Statistics | None, keep: Keep
) -> Generator[Event, None, Statistics]:
    """Given ones, those of an earlier try that the first rank has `kept`, or pass 1."""
    there = kept is not None and kept.exists()
    if given is None and ranks.current().told("whether statistics are there", there):
        mine = {} if kept is None else Statistics.read(kept).tensors()
        return Statistics.of_tensors(ranks.current().exchange("kept statistics", mine)[0], str(kept))
    statistics = given or (yield from calibrate(job, batches, keep))
    if kept is not None:
        artifact.write_tensors(kept, statistics.tensors())
    return statistics


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
