"""A model and a recipe, opened: everything that follows from shapes alone, and what the bytes of an artifact depend on.

What a job does comes as events; whoever iterates them renders progress, or does not.
"""

import hashlib
import json
import platform
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qtool import __version__, artifact
from qtool.anatomy import Anatomy, Unit
from qtool.anatomy import anatomy as anatomy_of
from qtool.calibrate.sources import Batches
from qtool.checkpoint import Checkpoint, load_config, open_float, sha256, skeleton, tied_names
from qtool.device import CPU, arithmetic
from qtool.errors import InputError
from qtool.hf import adapt
from qtool.kernels import reference
from qtool.methods import build, entry
from qtool.methods.base import Method, Plan
from qtool.methods.combined import Combined
from qtool.pruning import heads_json, shrink
from qtool.recipe import Recipe


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


def ended(stage: str, unit: Unit, index: int, total: int, started: float) -> Progress:
    """A unit that was begun at `started` (`time.perf_counter`)."""
    return Progress(stage, unit.name, index, total, time.perf_counter() - started, peak_bytes())
