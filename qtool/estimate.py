"""How long `quantize` will take and how much memory it will need here: from shapes, the data, and a second of timing.

Memory is that of `qtool.memory`, and what is resident besides: the pages of the source that are being read.

Nothing is written. What starts up again in the golden check's fresh process has just been timed in this one; the float
units and the rounding are timed on samples; reading, hashing and writing go by bytes.
"""

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import psutil
import torch

from qtool.anatomy import Unit
from qtool.calibrate.generation import GROUPS, SWEEPS
from qtool.calibrate.sources import Batches
from qtool.job import Job, peak_bytes
from qtool.memory import followed, needs, shapes_of
from qtool.nn import parts_of
from qtool.numerics import QuantSpec
from qtool.rounding import ROUNDINGS, mse
from qtool.stream import Stream

_SECONDS = 0.4  # for each of the two timed samples
_SAMPLE = 4_000_000  # elements: large enough that threads which wait for a busy core do not decide
_FOLLOWING = 6.0  # a pass of the float and the integer model side by side, in passes of the float model
_PASSES = 6  # over the written bytes: shards, assembly, digests, the golden check, and the system's own work


@dataclass(frozen=True)
class Estimate:
    """Seconds from start to end of the command, the peak of its resident memory, and of that what is anonymous and came
    after the imports: what `max_memory` bounds."""

    seconds: float
    peak_bytes: int
    anonymous_bytes: int


def estimate(
    job: Job, batches: Batches, *, startup: float, reading: float, calibrates: bool = True, spill: bool = False
) -> Estimate:
    """`startup` and `reading` are the seconds in which this process opened the job and read the data.

    `calibrates` says whether pass 1 will run, if the recipe needs it, `spill` whether hidden states will lie on disk.
    """
    peak, resident = peak_bytes(), psutil.Process().memory_info().rss
    steps = needs(job, shapes_of(batches), calibrates=calibrates, spill=spill)
    mapped = max(_source_bytes(job, unit) for unit in job.anatomy.units)
    seconds = _lowering_second(job) * _weights(job)
    watches = calibrates and bool(job.observed())
    passing = _pass_1(job, batches) if watches or job.method.learns else 0.0
    if watches:
        seconds += passing
        if job.method.follows:  # both models see these batches, once more for every stage of corrections
            stages = len(job.method.stages(job.anatomy.blocks[0]))
            share = 1 / followed(job, len(batches.batches))
            seconds += (1 + stages) * _FOLLOWING * passing * share
    if job.method.learns:
        seconds += job.method.passes(len(batches.batches)) * passing
    if job.recipe.calibration.source == "self" and job.reads_data:
        seconds += _writing(job, batches)
    moved = job.checkpoint.num_bytes + _PASSES * job.predicted_bytes()
    here = max(need.num_bytes for need in steps if need.step != "golden check")  # that one is a process of its own
    total = 2 * startup + reading + seconds + moved * _hash_second()
    return Estimate(total, max(peak, resident + mapped + here), max(need.num_bytes for need in steps))


def _source_bytes(job: Job, unit: Unit) -> int:
    """Of a unit as its file has it: its pages are resident while they are read."""
    return sum(job.checkpoint.info(name).num_bytes for name in job.model.state_dict() if unit.owns(name))


def _weights(job: Job) -> int:
    """How many are rounded."""
    paths = [path for path, module in _described(job).items() if "weights" in module and "table" not in module]
    return sum(job.model.get_submodule(path).weight.numel() for path in paths)


def _described(job: Job) -> dict[str, Mapping[str, Any]]:
    """Every quantized module by path, those inside composites too."""
    return {path: module for item in job.plan.modules.items() for path, module in parts_of(*item)}


def _lowering_second(job: Job) -> float:
    """Seconds an element takes: some rows are rounded again and again, and measured as methods measure a matrix."""
    module = next((module for module in _described(job).values() if module["type"] in ("linear", "int_linear")), None)
    if module is None:
        return 0.0
    spec = QuantSpec.parse(module["weights"])
    columns = module["shape"][1]
    rows = -(-_SAMPLE // columns)
    weight = torch.randn(rows + -rows % (spec.block[0] or 1), columns)
    rounding = ROUNDINGS.get(job.recipe.weights.rounding, mse)  # by which those with data begin

    def lower() -> None:
        noise = weight.double() - rounding(weight, spec).dequantize().double()
        noise.square().sum(), weight.double().square().sum()

    return _timed(lower) / weight.numel()


def _pass_1(job: Job, batches: Batches) -> float:
    """Seconds of streaming all batches through all float blocks."""
    stream = Stream(job.model, job.anatomy, job.checkpoint.tensor, job.device)
    batch = max(batches.batches, key=lambda batch: batch["input_ids"].numel())
    started = time.perf_counter()
    with stream.loaded(job.anatomy.embeddings):
        hidden, calls = stream.embed(batch)
    embedding = time.perf_counter() - started
    unit = job.anatomy.blocks[0]
    started = time.perf_counter()
    with stream.loaded(unit):
        loading = time.perf_counter() - started
        block = _timed(lambda: stream.block(unit, hidden, calls[0]))
    share = sum(other["input_ids"].numel() for other in batches.batches) / batch["input_ids"].numel()
    return embedding * share + len(job.anatomy.blocks) * (block * share + loading)


def _writing(job: Job, batches: Batches) -> float:
    """Seconds in which the model writes the batches itself.

    A decoder reads a token a step from its cache, whose growing part of the time is left out.
    """
    sequences, tokens = batches.batches[0]["input_ids"].shape
    masked = job.anatomy.head_kind == "masked-lm"
    steps = SWEEPS * GROUPS if masked else tokens
    return steps * len(batches.batches) * _forward_second(job, batches.first(sequences, tokens if masked else 1))


def _forward_second(job: Job, batch: Mapping[str, torch.Tensor]) -> float:
    """Seconds of the whole float model on a batch, from one block and the head."""
    stream = Stream(job.model, job.anatomy, job.checkpoint.tensor, job.device)
    unit = job.anatomy.blocks[0]
    with stream.loaded(job.anatomy.embeddings):
        hidden, calls = stream.embed(batch)
    with stream.loaded(unit):
        block = _timed(lambda: stream.block(unit, hidden, calls[0]))
    with stream.loaded(job.anatomy.head):
        head = _timed(lambda: stream.head(batch, hidden))
    return len(job.anatomy.blocks) * block + head


def _hash_second() -> float:
    """Seconds that hashing a byte takes."""
    data = bytes(1 << 22)
    return _timed(lambda: hashlib.sha256(data).digest(), 0.05) / len(data)


def _timed(step: Callable[[], object], seconds: float = _SECONDS) -> float:
    """Median seconds of `step`, which runs once to warm up and then for about so long, at least three times."""
    step()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        started = time.perf_counter()
        step()
        taken.append(time.perf_counter() - started)
    return median(taken)
