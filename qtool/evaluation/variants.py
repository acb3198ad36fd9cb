"""One float model, and variants of it that compute otherwise, on the same batches.

A variant is a context: what is altered inside it (an attention function, modules without some heads) is what runs. The
model and its rows are loaded once, and the float model goes through the batches once: its logits are kept for the
variants that follow, as far as `KEPT_BYTES` goes; beyond, it runs again beside each.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtool.device import usable
from qtool.errors import InputError
from qtool.evaluation.batches import cut
from qtool.evaluation.divergence import row_divergences
from qtool.evaluation.exams import Request, exam_class
from qtool.evaluation.exams.base import Batch, Progress
from qtool.evaluation.models import subject
from qtool.evaluation.result import Evaluation
from qtool.evaluation.runner import check_baseline, check_request, evaluation_of, settings_of
from qtool.evaluation.sides import Side, load_sides
from qtool.evaluation.tasks import Task

KEPT_BYTES = 1 << 30
"""Logits of the float model that are kept at most."""

Altered = Callable[[Batch], AbstractContextManager[Any]]
"""Alters the model while the batch that it is given runs."""


def _unaltered(batch: Batch) -> AbstractContextManager[Any]:
    return nullcontext()


class Variants:
    """A float model on a task, loaded and its rows made; `evaluate` compares variants of it with itself.

    `model` is the loaded model, `lengths` the tokens of each of its rows.
    """

    def __init__(
        self,
        model: str | Path,
        task: Task,
        request: Request,
        *,
        revision: str | None = None,
        allow_weak: bool = False,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """Raises what `runner.evaluate` raises, and InputError for a quantized model."""
        self.device = usable(device)
        check_request(task, request)
        item = subject(model, task, revision)
        if item.quantized:
            raise InputError(f"{item.name} is quantized; study the float model that it was made from")
        self._exam, self._allow_weak = exam_class(task)(task, request), allow_weak
        self._exam.check_subjects([item, item])
        self._report = progress or (lambda stage, done, total: None)
        with torch.inference_mode():
            (self._side,) = load_sides([item], self._exam, "float32", self.device)
            self._exam.prepare([self._side], self._report)
        self.model, self.lengths = self._side.model, [len(row["input_ids"]) for row in self._side.rows]
        self.settings = settings_of(self._exam, [self._side], "float32")
        self._plan = cut(self._side.rows, self._exam.batch_size())
        self._kept: list[list[torch.Tensor] | None] = []

    def digest(self) -> str:
        """SHA-256 of the tokens and of what is right: of everything that the data decide."""
        rows = json.dumps([self._side.rows, self._exam.references], default=str)
        return hashlib.sha256(rows.encode()).hexdigest()

    def about(self) -> dict[str, Any]:
        """What is measured, on what, and how, as JSON values."""
        exam = self._exam
        return {
            "model": self._side.subject.name,
            "task": exam.task.name,
            "split": exam.said_split,
            "data": exam.source,
            "n": exam.n,
            "unit": exam.unit,
            "metric": exam.task.metric,
            "settings": self.settings,
        }

    def baseline(self) -> Evaluation:
        """The float model alone; it goes through the batches when it is first asked for.

        Raises InputError for one that gives NaN, or (unless `allow_weak`) is no better than guessing.
        """
        if not self._kept:
            with torch.inference_mode():
                self._kept = self._run_float()
        found = evaluation_of(self._exam, [self._side], self.settings, allow_weak=self._allow_weak)
        check_baseline(self._exam, self._side, found.candidate.value, self._allow_weak)
        return found

    def _run_float(self) -> list[list[torch.Tensor] | None]:
        """Collects every batch of the float model. Returns its logits, a list a batch; None where they are too many."""
        side, room = self._side, KEPT_BYTES
        kept: list[list[torch.Tensor] | None] = []
        side.collected = [None] * len(side.rows)
        side.forward(side.batch(self._plan[-1]))  # warm-up, on the longest rows
        for done, indices in enumerate(self._plan, start=1):
            logits = self._collect(side, indices, _unaltered)
            room -= sum(row.numel() * row.element_size() for row in logits or ())
            # Copies: a row may be a view of logits of which most are not scored.
            kept.append([row.clone() for row in logits] if logits is not None and room >= 0 else None)
            self._report("float", done, len(self._plan))
        return kept

    def _collect(self, side: Side, indices: list[int], altered: Altered) -> list[torch.Tensor] | None:
        """Runs a batch and keeps what the exam reads. Returns its logits, where they can be compared."""
        batch, about = side.batch(indices), [side.about[index] for index in indices]
        with altered(batch):
            output = side.timed(batch)
        for index, value in zip(indices, self._exam.collect(side, output, batch, about), strict=True):
            side.collected[index] = value
        return self._exam.logits(side, output, batch, about) if self._exam.distributes else None

    def evaluate(self, altered: Altered, stage: str = "evaluate") -> Evaluation:
        """The model inside `altered(batch)`, batch by batch, against the float model. Raises what `altered` raises."""
        return self._go_through(replace(self._side, seconds=0.0), altered, stage)

    def evaluate_artifact(self, path: str | Path, stage: str = "evaluate") -> Evaluation:
        """A model of its own, such as one that was quantized from this one, against the float model.

        Raises InputError for one that cannot do the task or cuts texts into other tokens.
        """
        with torch.inference_mode():
            (side,) = load_sides([subject(path, self._exam.task)], self._exam, "float32", self.device)
            self._exam.prepare([self._side, side], self._report)
        if side.rows != self._side.rows:
            raise InputError(
                f"{path} cuts text into other tokens than {self._side.subject.name}; it was not made of it"
            )
        return self._go_through(side, _unaltered, stage)

    def _go_through(self, own: Side, altered: Altered, stage: str) -> Evaluation:
        self.baseline()
        own.collected = [None] * len(own.rows)
        own.divergences = [np.empty(0)] * len(own.rows) if self._exam.distributes else []
        with torch.inference_mode():
            for done, (indices, kept) in enumerate(zip(self._plan, self._kept, strict=True), start=1):
                logits = self._collect(own, indices, altered)
                if logits is not None:
                    self._compare(own, indices, kept, logits)
                self._report(stage, done, len(self._plan))
        return evaluation_of(self._exam, [self._side, own], self.settings, allow_weak=self._allow_weak)

    def _compare(
        self, own: Side, indices: list[int], kept: list[torch.Tensor] | None, logits: list[torch.Tensor]
    ) -> None:
        if kept is None:
            side, about = self._side, [self._side.about[index] for index in indices]
            batch = side.batch(indices)
            kept = self._exam.logits(side, side.forward(batch), batch, about)
        for index, value in zip(indices, row_divergences(kept, logits), strict=True):
            own.divergences[index] = value
