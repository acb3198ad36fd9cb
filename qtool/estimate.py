"""How long `quantize` will take and how much memory it will need here: from shapes, the data, and a second of timing.

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
from qtool.calibrate.generation import GROUPS, LOGIT_BYTES, SWEEPS
from qtool.calibrate.sources import Batches
from qtool.nn import parts_of
from qtool.numerics import QuantSpec
from qtool.pipeline import MEASURED_BATCHES, Job, peak_bytes
from qtool.rounding import ROUNDINGS
from qtool.stream import Stream

_SECONDS = 0.4  # for each of the two timed samples
_LOWER_BYTES = 16
"""An element's bytes while its matrix is lowered: float32, codes, and what they stand for again, for the SQNR."""
_SAMPLE = 4_000_000  # elements: large enough that threads which wait for a busy core do not decide
_FOLLOWING = 6.0  # a pass of the float and the integer model side by side, in passes of the float model
_PASSES = 6  # over the written bytes: shards, assembly, digests, the golden check, and the system's own work


@dataclass(frozen=True)
class Estimate:
    """Seconds from start to end of the command, and the peak of its resident memory."""

    seconds: float
    peak_bytes: int


def estimate(job: Job, batches: Batches, *, startup: float, reading: float, calibrates: bool = True) -> Estimate:
    """`startup` and `reading` are the seconds in which this process opened the job and read the data.

    `calibrates` says whether pass 1 will run, if the recipe needs it.
    """
    peak, resident = peak_bytes(), psutil.Process().memory_info().rss
    sizes = _unit_bytes(job)
    seconds, need = _lowering(job, sizes)
    if calibrates and job.observed():
        passing, transient = _pass_1(job, batches)
        flow = 4 * job.model.config.hidden_size * sum(batch["input_ids"].numel() for batch in batches.batches)
        seconds, need = seconds + passing, max(need, flow + transient + max(sizes))
        if job.lowering.follows:  # both models see these batches, once more for every stage of corrections
            stages = len(job.lowering.stages(job.anatomy.blocks[0]))
            share = 1.0 if stages else min(1.0, MEASURED_BATCHES / len(batches.batches))
            seconds += (1 + stages) * _FOLLOWING * passing * share
            need = max(need, int(2 * flow * share) + 2 * max(sizes) + transient)
    if job.recipe.calibration.source == "self" and job.reads_data:
        writing, transient = _writing(job, batches)
        seconds, need = seconds + writing, max(need, sum(sizes) + max(sizes) + transient)
    moved = job.checkpoint.num_bytes + _PASSES * job.predicted_bytes()
    return Estimate(2 * startup + reading + seconds + moved * _hash_second(), max(peak, resident + need))


def _unit_bytes(job: Job) -> list[int]:
    """Float32 bytes of each unit."""
    tensors = job.model.state_dict()
    return [4 * sum(t.numel() for name, t in tensors.items() if unit.owns(name)) for unit in job.anatomy.units]


def _lowering(job: Job, sizes: list[int]) -> tuple[float, int]:
    """Seconds of pass 2, and the bytes of its worst unit: what is kept of it, and its largest matrix in hand."""
    paths = [path for path, module in _described(job).items() if "weights" in module and "table" not in module]
    counts = {path: job.model.get_submodule(path).weight.numel() for path in paths}
    need = 0
    for unit, size in zip(job.anatomy.units, sizes, strict=True):
        own = [count for path, count in counts.items() if unit.owns(path)]
        need = max(need, size - 3 * sum(own) + _LOWER_BYTES * max(own, default=0))
    return _lowering_second(job) * sum(counts.values()), need


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
    rounding = ROUNDINGS[job.recipe.weights.rounding]

    def lower() -> None:
        noise = weight.double() - rounding(weight, spec).dequantize().double()
        noise.square().sum(), weight.double().square().sum()

    return _timed(lower) / weight.numel()


def _pass_1(job: Job, batches: Batches) -> tuple[float, int]:
    """Seconds of streaming all batches through all float blocks, and the bytes that one block needs on its way."""
    stream = Stream(job.model, job.anatomy, job.checkpoint.tensor)
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
    seconds = embedding * share + len(job.anatomy.blocks) * (block * share + loading)
    widest = max((part.numel() // hidden.shape[-1] for part in _block_weights(job, unit)), default=hidden.shape[-1])
    heads = getattr(job.model.config, "num_attention_heads", 1)
    sequences, tokens = batch["input_ids"].shape
    return seconds, 4 * sequences * tokens * (3 * widest + 2 * heads * tokens)


def _writing(job: Job, batches: Batches) -> tuple[float, int]:
    """Seconds in which the model writes the batches itself, and the bytes that it needs on its way.

    A decoder reads a token a step from its cache, whose growing part of the time is left out.
    """
    sequences, tokens = batches.batches[0]["input_ids"].shape
    config, masked = job.model.config, job.anatomy.head_kind == "masked-lm"
    steps = SWEEPS * GROUPS if masked else tokens
    seconds = steps * len(batches.batches) * _forward_second(job, batches.first(sequences, tokens if masked else 1))
    cache = 0 if masked else 8 * len(job.anatomy.blocks) * sequences * tokens * config.hidden_size
    return seconds, cache + (min(LOGIT_BYTES, 4 * sequences * tokens * config.vocab_size) if masked else 0)


def _forward_second(job: Job, batch: Mapping[str, torch.Tensor]) -> float:
    """Seconds of the whole float model on a batch, from one block and the head."""
    stream = Stream(job.model, job.anatomy, job.checkpoint.tensor)
    unit = job.anatomy.blocks[0]
    with stream.loaded(job.anatomy.embeddings):
        hidden, calls = stream.embed(batch)
    with stream.loaded(unit):
        block = _timed(lambda: stream.block(unit, hidden, calls[0]))
    with stream.loaded(job.anatomy.head):
        head = _timed(lambda: stream.head(batch, hidden))
    return len(job.anatomy.blocks) * block + head


def _block_weights(job: Job, unit: Unit) -> list[torch.Tensor]:
    return [job.model.get_submodule(part.path).weight for part in unit.parts]


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
