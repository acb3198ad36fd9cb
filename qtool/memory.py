"""How much anonymous memory a run takes, from shapes alone, and how its work is divided so that it takes no more.

Anonymous is what the system cannot drop and read again: mapped files (the source, finished shards, the artifact) do not
count, nor does what is imported. The golden check's fresh process has a need of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from qtool import golden
from qtool.anatomy import Unit
from qtool.calibrate.generation import LOGIT_BYTES
from qtool.errors import UnavailableError
from qtool.kernels import backend
from qtool.nn import parts_of

if TYPE_CHECKING:
    from qtool.calibrate.sources import Batches
    from qtool.job import Job

FIXED = 128 << 20
"""Bytes beside what grows with the model: weights in float64 a stretch at a time, buffers of the products, and what the
allocator keeps. Measured: 55 MB at width 1024, 110 MB at 2560."""
GOLDEN_FIXED = 72 << 20
"""The same in the golden check's process, which rounds nothing; measured: 57 MB."""
MEASURED_BATCHES = 2
"""How many calibration batches flow through a lowered model to measure its errors and its saturation."""

_LOGITS = 4  # copies of the golden batch's outputs: expected, found twice, compared
_COPIES = 3  # of codes that the reference backend makes for its product
_PAIR = 64  # bytes of a pair of tokens while its probability is counted
_KEPT = 20
"""Values as wide as a block's widest layer that a token keeps for gradients. Measured: 20 in a Llama, 11 in a BERT."""


@dataclass(frozen=True)
class Need:
    """Bytes that a step takes at its worst."""

    step: str
    unit: str
    num_bytes: int


@dataclass(frozen=True)
class Budget:
    """How the work is divided: sequences in a calibration batch, and whether hidden states lie on disk."""

    batch_size: int
    spill: bool = False


def needs(job: "Job", shapes: Sequence[tuple[int, int]], *, calibrates: bool, spill: bool) -> list[Need]:
    """Every step's need; `shapes` are those of the calibration batches, `(sequences, tokens)`.

    `calibrates` says whether pass 1 runs where the recipe needs it, `spill` that hidden states lie on disk.
    """
    found = [*_lowering(job), *_golden(job)]
    if calibrates and job.observed():
        flow = 0 if spill else sum(_states(job, shape) for shape in shapes)
        found += _passing("calibrate", job, flow, shapes, models=1)
    if job.recipe.calibration.source == "self" and job.reads_data:
        found.append(_writing(job, shapes))
    if job.method.follows or job.method.learns:
        chosen = shapes[:: followed(job, len(shapes))]
        flows = (1 if job.method.independent else 2) + job.method.learns  # a teacher's outputs too
        flow = 0 if spill else flows * sum(_states(job, shape) for shape in chosen)
        found += _passing("quantize", job, flow, chosen, models=2)
    return found


def followed(job: "Job", count: int) -> int:
    """Every how many-th of `count` batches flows through both models in pass 2.

    All where a method learns or errors are corrected; where they are only measured, an even sample is enough.
    """
    every = job.method.learns or any(job.method.stages(unit) for unit in job.anatomy.units)
    return 1 if every else -(-count // MEASURED_BATCHES)


def divide(job: "Job", batches: "Batches", limit: int | None, *, calibrates: bool) -> Budget:
    """The largest calibration batches, at most the recipe's, that stay in `limit` bytes; states on disk if they must.

    Without a limit batches are as they are, and states go to disk where the machine has no memory for them now: that
    changes no result. Raises UnavailableError when the limit cannot be kept, naming what needs most.
    """
    wanted = job.recipe.calibration.batch_size
    shapes = shapes_of(batches)

    def worst(size: int, spill: bool) -> Need:
        cut = [part for shape in shapes for part in _cut(shape, size)]
        return max(needs(job, cut, calibrates=calibrates, spill=spill), key=lambda need: need.num_bytes)

    if limit is None:
        return Budget(wanted, worst(wanted, False).num_bytes > psutil.virtual_memory().available)
    for size in _halved(wanted):
        for spill in (False, True):
            if worst(size, spill).num_bytes <= limit:
                return Budget(size, spill)
    least = worst(1, True)
    raise UnavailableError(
        f"max-memory of {_shown(limit)} cannot be kept: {least.unit} needs {_shown(least.num_bytes)} "
        f"({least.step}); allow that much{_advice(least)}"
    )


def shapes_of(batches: "Batches") -> list[tuple[int, int]]:
    """`(sequences, tokens)` of each batch."""
    return [(batch["input_ids"].shape[0], batch["input_ids"].shape[1]) for batch in batches.batches]


def _advice(need: Need) -> str:
    return ", or take shorter texts (--max-length)" if need.step == "calibrate" else ""


def _shown(num_bytes: int) -> str:
    """Rounded up, so that what is asked for is enough."""
    return f"{-(-num_bytes // 10**6):,} MB"


def _halved(size: int) -> Iterator[int]:
    while size >= 1:
        yield size
        size //= 2


def _cut(shape: tuple[int, int], size: int) -> Iterator[tuple[int, int]]:
    sequences, tokens = shape
    for start in range(0, sequences, size):
        yield min(size, sequences - start), tokens


def _lowering(job: "Job") -> Iterator[Need]:
    """Pass 2: the codes of a unit, what its method keeps, and the largest matrix in hand."""
    stored = lowered_bytes(job)
    for unit in job.anatomy.units:
        kept = stored[unit.name] + job.method.memory(unit, job.plan)
        yield Need("quantize", unit.name, FIXED + kept + max(_matrices(job, unit), default=0))


def _writing(job: "Job", shapes: Sequence[tuple[int, int]]) -> Need:
    """The whole float model while it writes its own text: a decoder with its cache, a masked model with its logits."""
    sequences, tokens = max(shapes)
    model = sum(_widened(job, unit) for unit in job.anatomy.units)
    cache = 2 * 4 * len(job.anatomy.blocks) * sequences * tokens * _hidden(job)
    logits = min(LOGIT_BYTES, 4 * sequences * tokens * _vocabulary(job))
    moment = cache if job.anatomy.head_kind == "causal-lm" else logits
    return Need("its own text", "the whole model", FIXED + model + moment + pass_bytes(job, (sequences, tokens)))


def _matrices(job: "Job", unit: Unit) -> Iterator[int]:
    """What each matrix of a unit takes while it becomes codes, beside these."""
    for outer in job.plan.modules.items():
        for path, module in parts_of(*outer):
            if unit.owns(path) and "weights" in module and "table" not in module:
                yield job.method.in_hand(job.model.get_submodule(path), module)


def lowered_bytes(job: "Job") -> dict[str, int]:
    """By unit, the bytes of its quantized modules. What stays float is written from the mapped source."""
    model = job.lowered_skeleton()
    quantized = [f"{path}." for path in job.plan.modules]
    tensors = [(name, t) for name, t in model.state_dict().items() if name.startswith(tuple(quantized))]
    return {
        unit.name: sum(t.numel() * t.element_size() for name, t in tensors if unit.owns(name))
        for unit in job.anatomy.units
    }


def _golden(job: "Job") -> Iterator[Need]:
    """The fresh process: outputs, a block's activations, and copies of codes where the backend makes them."""
    outputs = _LOGITS * 4 * golden.SEQUENCES * golden.TOKENS * _vocabulary(job)
    moment = pass_bytes(job, (golden.SEQUENCES, golden.TOKENS))
    stored = lowered_bytes(job)
    for unit in job.anatomy.units:
        copies = _COPIES * stored[unit.name] if unit.kind == "block" and backend().name != "native" else 0
        yield Need("golden check", unit.name, GOLDEN_FIXED + outputs + moment + copies)


def _passing(step: str, job: "Job", flow: int, shapes: Sequence[tuple[int, int]], *, models: int) -> Iterator[Need]:
    """Batches through float units, `flow` bytes of their states; with two models, also through lowered ones."""
    stored = lowered_bytes(job)
    sizes = {unit.name: _widened(job, unit) for unit in job.anatomy.units}
    if job.anatomy.head.name not in job.observed() and models == 1:
        sizes.pop(job.anatomy.head.name)
    else:  # a head runs inside the model's forward, which begins with the embeddings
        sizes[job.anatomy.head.name] += sizes[job.anatomy.embeddings.name]
    for unit in job.anatomy.units:
        if unit.name in sizes:
            moment = max(
                models * _moment(job, unit, shape)
                + _gradients(job, unit, shape, models)
                + (_probabilities(job, unit, shape) if models == 1 else 0)
                for shape in shapes
            )
            kept = (models - 1) * (stored[unit.name] + job.method.memory(unit, job.plan))
            yield Need(step, unit.name, FIXED + sizes[unit.name] + kept + flow + moment)


def _moment(job: "Job", unit: Unit, shape: tuple[int, int]) -> int:
    """Bytes of a batch inside a unit, at most."""
    if unit.kind == "block":
        return pass_bytes(job, shape)
    wide = _vocabulary(job) if unit.kind == "head" else 0
    return 4 * 2 * shape[0] * shape[1] * (_hidden(job) + wide)


def _probabilities(job: "Job", unit: Unit, shape: tuple[int, int]) -> int:
    """Of attention that is observed: two more tensors of a batch, and what the pairs of one text become."""
    if not any(site.endswith(":probabilities") for site in job.observed().get(unit.name, ())):
        return 0
    sequences, tokens = shape
    heads = getattr(job.model.config, "num_attention_heads", 1)
    return heads * tokens * tokens * (2 * 4 * sequences + _PAIR)


def _gradients(job: "Job", unit: Unit, shape: tuple[int, int], models: int) -> int:
    """What a batch leaves in a block for its gradients, in pass 2, beside what a pass takes."""
    if models == 1 or unit.kind != "block" or not job.method.differentiates:
        return 0
    return 4 * shape[0] * shape[1] * _KEPT * _widest(job)


def _vocabulary(job: "Job") -> int:
    """Outputs a token of a language model's head; 0 for others, which are small."""
    return int(job.model.config.vocab_size) if job.anatomy.head_kind.endswith("-lm") else 0


def _widened(job: "Job", unit: Unit) -> int:
    """Bytes of a float unit in memory: none of what the file holds as float32, which stays mapped."""
    infos = ((name, job.checkpoint.info(name), slot) for name, slot in job.model.state_dict().items())
    return sum(4 * slot.numel() for name, info, slot in infos if unit.owns(name) and info.dtype not in ("F32", "I64"))


def _states(job: "Job", shape: tuple[int, int]) -> int:
    """Bytes of the hidden states of a batch between two blocks, and of the masks that its blocks are called with."""
    sequences, tokens = shape
    return 4 * sequences * tokens * (_hidden(job) + tokens)


def pass_bytes(job: "Job", shape: tuple[int, int]) -> int:
    """Bytes of a batch inside a block: some tensors of its widest layer, and attention scores."""
    sequences, tokens = shape
    heads = getattr(job.model.config, "num_attention_heads", 1)
    return 4 * sequences * tokens * (3 * _widest(job) + 2 * heads * tokens)


def _widest(job: "Job") -> int:
    """Outputs of a block's widest layer."""
    weights = [job.model.get_submodule(part.path).weight for part in job.anatomy.blocks[0].parts]
    return max((weight.numel() // _hidden(job) for weight in weights), default=_hidden(job))


def _hidden(job: "Job") -> int:
    config: Mapping[str, Any] = job.model.config.to_dict()
    return int(config.get("hidden_size") or config.get("n_embd") or job.model.config.hidden_size)
