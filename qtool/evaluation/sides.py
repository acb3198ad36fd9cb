"""The models under measurement, side by side: each batch goes through one, then the other, in the same process."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qtool.evaluation.batches import Batch, Tokens, collate, cut, encode, longest
from qtool.evaluation.models import Subject, load_for, load_tokenizer
from qtool.evaluation.probe import pooled
from qtool.evaluation.tasks import Task, Text

Progress = Callable[[str, int, int], None]
Decide = Callable[[NDArray[np.float32]], NDArray[np.int64]]


@dataclass
class Side:
    """A loaded model, its rows of tokens (cut to `max_length`), what it predicted and its seconds in `forward`."""

    subject: Subject
    model: Any
    tokenizer: Any
    max_length: int | None
    rows: list[Tokens]
    predictions: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def forward(self, batch: Batch) -> NDArray[np.float32]:
        """Logits `[batch, classes]` of a head, or mean features `[batch, features]` of a probed encoder."""
        output = self.model(**batch, return_dict=True)
        if self.subject.probed:
            return pooled(output.last_hidden_state, batch["attention_mask"]).numpy()
        logits: NDArray[np.float32] = output.logits.float().numpy()
        return logits

    def timed(self, indices: Sequence[int]) -> NDArray[np.float32]:
        """`forward` of the rows at `indices`, its time (and not that of padding) added to `seconds`."""
        batch = self.batch(indices)
        start = time.perf_counter()
        values = self.forward(batch)
        self.seconds += time.perf_counter() - start
        return values

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows at `indices`, padded together."""
        return collate(self.tokenizer, [self.rows[index] for index in indices])


def load_sides(
    subjects: Sequence[Subject], task: Task, texts: Sequence[Text], max_length: int | None, dtype: str
) -> list[Side]:
    """Load the models and tokenise the texts for each, cut to one length that all of them can take.

    Rows are shared where the tokenizers agree on every text, as they do for an artifact and its source.
    """
    tokenizers = [load_tokenizer(item.path) for item in subjects]
    limits = [longest(item.config, own, max_length) for item, own in zip(subjects, tokenizers, strict=True)]
    length = min((limit for limit in limits if limit is not None), default=None)
    sides: list[Side] = []
    for item, tokenizer in zip(subjects, tokenizers, strict=True):
        rows = encode(tokenizer, item.config, texts, length, item.name)
        if sides and rows == sides[0].rows:
            rows = sides[0].rows
        sides.append(Side(item, load_for(item.path, task, dtype), tokenizer, length, rows))
    return sides


def features(side: Side, texts: Sequence[Text], batch_size: int, progress: Progress) -> NDArray[np.float32]:
    """Mean features `[texts, features]` of other texts than the side's own, in their order."""
    rows = encode(side.tokenizer, side.subject.config, texts, side.max_length, side.subject.name)
    batches = cut(rows, batch_size)
    found = np.empty((len(rows), side.subject.config.hidden_size), dtype=np.float32)
    for done, indices in enumerate(batches, start=1):
        found[indices] = side.forward(collate(side.tokenizer, [rows[index] for index in indices]))
        progress("fit probe", done, len(batches))
    return found


def measure(sides: Sequence[Side], decide: Sequence[Decide], batch_size: int, progress: Progress) -> None:
    """Run every batch through every side, and put the predictions (−1: none) in the order of the texts."""
    batches = cut(sides[-1].rows, batch_size)
    for side in sides:
        side.predictions = [-1] * len(side.rows)
        side.forward(side.batch(batches[-1]))  # warm-up, on the longest rows
    for done, indices in enumerate(batches, start=1):
        for side, decision in zip(sides, decide, strict=True):
            for index, label in zip(indices, decision(side.timed(indices)), strict=True):
                side.predictions[index] = int(label)
        progress("evaluate", done, len(batches))
