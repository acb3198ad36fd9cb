"""The models under measurement, side by side: each batch goes through one, then the other, in the same process.

Models may be on a GPU; what is read of their outputs comes back to the host, behind the clock.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from qtool import ranks
from qtool.device import CPU, mover, on_host, synchronize
from qtool.errors import InputError
from qtool.evaluation.batches import collate, cut, longest
from qtool.evaluation.divergence import Floats, row_divergences
from qtool.evaluation.exams.base import Batch, Exam, Progress, Tokens
from qtool.evaluation.models import Subject, load_for, load_tokenizer


@dataclass
class Side:
    """A model loaded on `device`, its rows of tokens (cut to `max_length`) with what is known about each, and what came
    of them.

    `collected` has an entry a row, `seconds` is the time in the model's forward; `reading` belongs to the exam: what it
    needs to read this model's outputs. `divergences` has the KL divergences of each row from the baseline's
    distributions; it is empty where there are none to compare.
    """

    subject: Subject
    model: Any
    tokenizer: Any
    max_length: int | None
    rows: list[Tokens]
    about: list[Any]
    collected: list[Any] = field(default_factory=list)
    reading: Any = None
    divergences: list[Floats] = field(default_factory=list)
    seconds: float = 0.0
    device: torch.device = CPU

    def forward(self, batch: Batch) -> Any:
        """The model's output, on the host."""
        return on_host(self.model(**self._there(batch), return_dict=True))

    def timed(self, batch: Batch) -> Any:
        """`forward`, the model's time added to `seconds`: not that of tensors on their way."""
        batch = self._there(batch)
        synchronize(self.device)
        start = time.perf_counter()
        output = self.model(**batch, return_dict=True)
        synchronize(self.device)
        self.seconds += time.perf_counter() - start
        return on_host(output)

    def _there(self, batch: Batch) -> Batch:
        found: Batch = mover(self.device)(batch)
        return found

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows at `indices`, padded together."""
        return collate(self.tokenizer, [self.rows[index] for index in indices])


def load_sides(subjects: Sequence[Subject], exam: Exam, dtype: str, device: torch.device = CPU) -> list[Side]:
    """Load the models on `device` and tokenise the examples for each, cut to one length that all of them can take.

    Rows are shared where the tokenizers agree on every text, as they do for an artifact and its source.
    """
    tokenizers = [load_tokenizer(item.path) for item in subjects]
    limits = [longest(item.config, own, exam.length) for item, own in zip(subjects, tokenizers, strict=True)]
    length = min((limit for limit in limits if limit is not None), default=None)
    sides: list[Side] = []
    for item, tokenizer in zip(subjects, tokenizers, strict=True):
        rows, about = exam.encode(tokenizer, item.config, length, item.name)
        if sides and rows == sides[0].rows:
            rows, about = sides[0].rows, sides[0].about
        elif sides and exam.same_tokens:
            raise InputError(
                f"{item.name} and {sides[0].subject.name} cut text into different tokens: their scores on "
                f"{exam.task.name} cannot be compared"
            )
        model = load_for(item, dtype)
        if device.type != "cpu":
            with torch.inference_mode(False), torch.no_grad():  # gradients may flow through the model later
                model.to(device)
        model.config.use_cache = False  # nobody reads what a decoder would keep for its next token
        if getattr(model.config, "pad_token_id", None) is None:  # a decoder's classifier looks for the last other token
            model.config.pad_token_id = tokenizer.pad_token_id
        sides.append(Side(item, model, tokenizer, length, rows, about, device=device))
    return sides


def measure(sides: Sequence[Side], exam: Exam, progress: Progress) -> None:
    """Run every batch through every side, and keep what the exam collects in the order of each side's rows.

    Ranks share the batches, which are cut over all rows; afterwards each has everything.
    Sides with rows of their own (another tokenizer) have batches of their own, as many as there are. Where their
    distributions can be compared the logits of one batch are kept until the other side has seen it.
    """
    plans = [cut(side.rows, exam.batch_size()) for side in sides]
    for side, plan in zip(sides, plans, strict=True):
        side.collected = [None] * len(side.rows)
        side.forward(side.batch(plan[-1]))  # warm-up, on the longest rows
    total, compared = max(map(len, plans)), exam.comparable(sides)
    if compared:
        sides[-1].divergences = [np.empty(0)] * len(sides[-1].rows)
    mine = ranks.current().share(total)
    for done, number in enumerate(mine, start=1):
        if compared:
            _compare(sides, exam, plans[0][number])
        else:
            for side, plan in zip(sides, plans, strict=True):
                if number < len(plan):
                    _run(side, exam, plan[number])
        progress("evaluate", done, len(mine))
    for side, plan in zip(sides, plans, strict=True):
        put_together(side, [index for number in mine if number < len(plan) for index in plan[number]])


def put_together(side: Side, mine: Sequence[int]) -> None:
    """Let every rank have what came of all rows; `mine` are those of this rank."""
    if ranks.current().size == 1:
        return
    collected = ranks.gathered("answers", {index: side.collected[index] for index in mine})
    side.collected = [collected[index] for index in range(len(side.rows))]
    if side.divergences:
        divergences = ranks.gathered("divergences", {index: side.divergences[index] for index in mine})
        side.divergences = [divergences[index] for index in range(len(side.rows))]
    side.seconds = sum(ranks.gathered("seconds", {ranks.current().rank: side.seconds}).values())


def _run(side: Side, exam: Exam, indices: Sequence[int]) -> tuple[Any, Batch, list[Any]]:
    """Collect a batch; returns what `exam.logits` reads."""
    batch, about = side.batch(indices), [side.about[index] for index in indices]
    output = side.timed(batch)
    for index, value in zip(indices, exam.collect(side, output, batch, about), strict=True):
        side.collected[index] = value
    return output, batch, about


def _compare(sides: Sequence[Side], exam: Exam, indices: Sequence[int]) -> None:
    """Collect a batch of the baseline and the candidate, and how far their distributions are apart."""
    theirs, own = (exam.logits(side, *_run(side, exam, indices)) for side in sides)
    for index, value in zip(indices, row_divergences(theirs, own), strict=True):
        sides[-1].divergences[index] = value
