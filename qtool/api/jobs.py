"""`quantize` and `calibrate`: open a job, run it, say what it left."""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.api.data import calibration_events, golden_inputs, planned_batches
from qtool.api.recipes import FLAG_KEYS, resolve_recipe
from qtool.aside import folder_aside
from qtool.errors import InputError, QtoolError, UnavailableError, one_of
from qtool.recipe import Recipe

if TYPE_CHECKING:
    from qtool.calibrate.sources import Batches
    from qtool.calibrate.statistics import Statistics
    from qtool.job import Event, Job
    from qtool.memory import Budget
    from qtool.rundir import RunDirectory


DEFAULT_FOLDER = "qtool-out"
LATEST = "latest"


@dataclass(frozen=True)
class Quantized:
    """What a successful run leaves."""

    path: Path
    size_bytes: int
    source_bytes: int
    seconds: float
    peak_bytes: int
    worst: Sequence[tuple[str, float]] = ()
    """Modules whose outputs are furthest from float's, with their signal to noise in dB, where that was measured."""


def default_output(model: str, recipe: Recipe) -> Path:
    """`qtool-out/<model>-<method>`."""
    name = Path(model).name or Path(model).resolve().name
    return Path(DEFAULT_FOLDER) / "-".join([name, *(method.name for method in recipe.methods)])


def set_threads(recipe: Recipe, fingerprint: Mapping[str, Any] | None = None) -> None:
    """The recorded threads of a run that is resumed, else the recipe's, else torch's own choice."""
    import torch

    threads = (fingerprint or {}).get("threads") or recipe.threads
    if threads:
        torch.set_num_threads(int(threads))


def open_job(model: str, recipe: Recipe, device: str = "cpu") -> "Job":
    """Find the model and check that the recipe fits it and that it can be run here; nothing is computed yet.

    Raises UsageError for an unknown device, UnavailableError for one that cannot be used.
    """
    from qtool.checkpoint import locate
    from qtool.device import usable
    from qtool.job import Job
    from qtool.kernels import backend

    where = usable(device)
    if where.type != "cpu" and os.environ.get("QTOOL_BACKEND") == "triton":
        raise UnavailableError(
            "QTOOL_BACKEND=triton: a part of this runs on the CPU (the golden check); leave it out, --device cuda is "
            "enough"
        )
    backend()
    return Job(locate(model, recipe.model.revision), model, recipe, where)


def divided_batches(job: "Job", *, calibrates: bool) -> "tuple[Batches, Budget]":
    """The job's calibration data in batches that its `max_memory` allows; the job's recipe then says so.

    Where the model would write them itself, random tokens stand for its text. Raises UnavailableError when no batches
    are small enough.
    """
    from qtool.memory import divide

    batches, recipe = planned_batches(job), job.recipe
    budget = divide(job, batches, recipe.max_memory, calibrates=calibrates)
    if budget.batch_size < recipe.calibration.batch_size:
        calibration = recipe.calibration.model_copy(update={"batch_size": budget.batch_size})
        job.recipe = recipe.model_copy(update={"calibration": calibration})
        batches = planned_batches(job)
    return batches, budget


def batches_events(job: "Job", *, calibrates: bool) -> 'Generator["Event", None, tuple[Batches, Budget]]':
    """The same, and text of the model's own is written now."""
    batches, budget = divided_batches(job, calibrates=calibrates)
    if job.recipe.calibration.source == "self":
        batches = yield from calibration_events(job)
    return batches, budget


def read_statistics(path: str | Path, job: "Job", batches: "Batches") -> "Statistics":
    """Statistics from a file. Raises InputError unless they were made from this model, data and these observers."""
    from qtool.calibrate.statistics import Statistics

    statistics = Statistics.read(Path(path))
    statistics.require(job.statistics_fingerprint(batches), str(path))
    return statistics


def quantize_events(
    model: str,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    statistics: str | Path | None = None,
    remember: bool = True,
    device: str = "cpu",
) -> Generator["Event", None, Quantized]:
    """Quantize `model` into `out`, as events that end with the result; `remember` notes it as the newest artifact.

    On several ranks each does its share, and only the first one reads and writes `out`.
    """
    import time

    from qtool import ranks, rundir
    from qtool.device import usable
    from qtool.job import Note
    from qtool.pipeline import help_quantize

    started, group = time.perf_counter(), ranks.current()
    usable(device)
    if group.first:
        rundir.check_output(out, resume=resume, overwrite=overwrite)
    data = recipe.evaluate.data
    places = list(data.values()) if isinstance(data, dict) else [data]
    read = (*places, recipe.evaluate.baseline, recipe.calibration.source, statistics)
    rundir.keep_apart(out, *(Path(path) for path in read if path and Path(path).exists()))
    known = (rundir.recorded(out) or rundir.published(out)) if resume and group.first else None
    set_threads(recipe, group.told("recorded run", known))
    job = open_job(model, recipe, device)
    rundir.keep_apart(out, job.source)
    batches, budget = yield from batches_events(job, calibrates=not statistics)
    yield Note(_about_calibration(job, batches, statistics))
    if budget.batch_size < recipe.calibration.batch_size:
        yield Note(f"calibration batches of {budget.batch_size} sequences, to stay in max-memory")
    if budget.spill:
        yield Note("hidden states of the calibration data lie on disk, beside the output")
    given = read_statistics(statistics, job, batches) if statistics else None
    fingerprint = job.fingerprint(batches, Path(statistics) if statistics else None)
    group.agree("quantization", fingerprint)
    if group.first:
        run = rundir.RunDirectory(out, fingerprint, resume=resume, overwrite=overwrite)
        yield from _into(run, job, batches, given, spill=budget.spill)
    else:
        yield from help_quantize(job, batches, given, spill=budget.spill)
    if remember:
        note_latest(out)
    return _result(out, job, time.perf_counter() - started)


def _into(
    run: "RunDirectory", job: "Job", batches: "Batches", statistics: "Statistics | None", *, spill: bool
) -> Generator["Event", None, None]:
    """Quantize into an open run; one that finished no unit leaves nothing behind."""
    from qtool import pipeline

    with closing(run):
        try:
            inputs = golden_inputs(job, batches)
            yield from pipeline.quantize(job, batches, inputs, run, statistics, spill=spill)
        except QtoolError:
            run.discard_if_empty()
            raise


def _result(out: Path, job: "Job", seconds: float) -> Quantized:
    """What the first rank finds at `out`, for all: the folder may be no other's."""
    from qtool import ranks
    from qtool.artifact import report, size_on_disk
    from qtool.inspection import worst
    from qtool.job import peak_bytes

    group = ranks.current()
    found = [size_on_disk(out), worst(report(out).get("figures", {}))] if group.first else None
    size, furthest = group.told("result", found)
    least = [(str(path), float(decibels)) for path, decibels in furthest]
    return Quantized(out, size, job.checkpoint.num_bytes, seconds, peak_bytes(), least)


def _about_calibration(job: "Job", batches: "Batches", statistics: str | Path | None) -> str:
    if not job.reads_data:
        return "no calibration pass: this recipe computes the scales of activations at run time"
    return (
        f"statistics: {statistics}"
        if statistics and not job.method.learns
        else f"calibration data: {batches.description}, {batches.num_tokens} tokens"
    )


def note_latest(out: Path) -> None:
    """`qtool-out/latest` names the newest artifact; a place that cannot be written is no reason to fail."""
    from qtool.artifact import write_text
    from qtool.errors import UnavailableError
    from qtool.ranks import current

    if not current().first:
        return
    try:
        Path(DEFAULT_FOLDER).mkdir(exist_ok=True)
        write_text(Path(DEFAULT_FOLDER) / LATEST, f"{out.resolve()}\n")
    except (OSError, UnavailableError):
        return


def latest() -> Path:
    """The artifact of the last successful `quantize` in this working directory. Raises InputError without one."""
    note = Path(DEFAULT_FOLDER) / LATEST
    try:
        path = Path(note.read_text("utf-8").strip())
    except OSError:
        raise InputError(f"no MODEL given and no {note} here; quantize something first or name a model") from None
    if not path.is_dir():
        raise InputError(f"{note} names {path}, which is gone; name a model")
    return path


def quantize(
    model: str,
    *,
    method: str | Sequence[str] = (),
    config: str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    statistics: str | Path | None = None,
    set: Sequence[str] = (),
    device: str = "cpu",
    **flags: Any,
) -> Quantized:
    """Quantize the float `model` (folder or hub name) and return where the artifact is.

    `set` takes `key=value` strings of the recipe, `flags` the names in `FLAG_KEYS` (task, data, num_samples, …).
    `device` is where the model computes meanwhile: cpu, cuda or cuda:N. Raises QtoolError subclasses, as the command
    does, and TypeError for an argument that does not exist.
    """
    if unknown := [name for name in flags if name not in FLAG_KEYS]:
        raise TypeError(one_of(unknown[0], list(FLAG_KEYS), "argument"))
    methods = [method] if isinstance(method, str) else list(method)
    given = {name: value for name, value in flags.items() if value is not None}
    recipe = resolve_recipe(config=config, sets=set, methods=methods, model=model, flags=given)
    out = Path(output or recipe.output or default_output(model, recipe))
    choices: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "statistics": statistics, "device": device}
    events = quantize_events(model, recipe, out, **choices)
    while True:
        try:
            next(events)
        except StopIteration as done:
            result: Quantized = done.value
            return result


def calibrate_events(
    model: str, recipe: Recipe, file: Path, *, overwrite: bool = False, device: str = "cpu"
) -> Generator["Event", None, int]:
    """Pass 1 alone, into a statistics file; ends with the number of activations that were observed."""
    from qtool import pipeline, ranks
    from qtool.artifact import write_tensors
    from qtool.device import usable
    from qtool.job import Note
    from qtool.spill import SpilledStates

    usable(device)
    group = ranks.current()
    if group.first and file.exists() and not overwrite:
        raise InputError(f"{file} exists; choose another -o or pass --overwrite")
    if group.first and not file.parent.is_dir():
        raise InputError(f"{file.parent} does not exist; make the folder first")
    set_threads(recipe)
    job = open_job(model, recipe, device)
    if not job.observed():
        names = ", ".join(method.name for method in job.methods)
        raise InputError(f"{names} needs no statistics with this recipe: nothing in it is calibrated")
    batches, budget = yield from batches_events(job, calibrates=True)
    yield Note(f"calibration data: {batches.description}")
    group.agree("calibration", job.fingerprint(batches))
    with nullcontext(file.absolute().parent) if group.first else folder_aside() as folder:
        keep = partial(SpilledStates, folder) if budget.spill else list
        statistics = yield from pipeline.calibrate(job, batches, keep)
    if group.first:
        write_tensors(file, statistics.tensors())
    return len(statistics.states)
