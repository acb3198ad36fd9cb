"""Classes and numbers for whole texts: by a model's own head, or by a linear probe on an encoder without one."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qtool.errors import InputError
from qtool.evaluation.batches import collate, cut, encode
from qtool.evaluation.exams.base import Batch, Exam, Progress, Request, Tokens, wrong_head
from qtool.evaluation.labels import data_names, head_names, head_order, ids_of, reference_names
from qtool.evaluation.probe import MAX_ROWS, Probe, pooled
from qtool.evaluation.tasks import Examples, Task, load_examples, load_numbers

if TYPE_CHECKING:
    from qtool.evaluation.sides import Side

_ENCODER = re.compile(r"\w+(ForMaskedLM|(?<!LMHead)(?<!DoubleHeads)Model)")


class Classification(Exam):
    """A class for each text or pair of texts.

    A bare encoder, or the encoder of a masked-LM checkpoint, is scored by a linear probe, fitted on the training split
    with the float model's features.
    """

    heads = ("ForSequenceClassification",)
    loader = "AutoModelForSequenceClassification"
    distributes = True

    def __init__(self, task: Task, request: Request) -> None:
        """Errors of `load_examples`."""
        super().__init__(task, request)
        self.examples = self._load(self.split, request.limit)
        self.source = self.examples.source
        self.names: Sequence[str] = ()
        self.probe: Probe | None = None

    def _load(self, split: Any, limit: int | None) -> Examples:
        asked = self.request
        return load_examples(self.task, asked.data, split, limit, asked.text_columns, asked.label_column)

    @classmethod
    def loader_for(cls, architecture: str, task: Task, model: str) -> str:
        """The class with a head, or AutoModel for an encoder that is probed."""
        if architecture.endswith(cls.heads):
            return cls.loader
        if _ENCODER.fullmatch(architecture):
            return "AutoModel"
        raise wrong_head(architecture, task, model, "…ForSequenceClassification, a …ForMaskedLM or a bare encoder")

    @property
    def n(self) -> int:
        """Texts."""
        return len(self.examples)

    def check_subjects(self, subjects: Sequence[Any]) -> None:
        """Refuse what no probe can be fitted on; read the training split for one that can."""
        first, last = subjects[0], subjects[-1]
        if first.probed != last.probed:
            headless = first if first.probed else last
            raise InputError(
                f"{last.name} and {first.name} cannot be compared: {headless.name} has no classification head"
            )
        if first.probed:
            _check_probed(subjects, self.request.data)
            self.training = self._load("train", MAX_ROWS)
            _check_kinds(self.training, self.examples)

    def encode(self, tokenizer: Any, config: Any, length: int | None, model: str) -> tuple[list[Tokens], list[Any]]:
        """One row a text."""
        rows = encode(tokenizer, config, self.examples.texts, length, model)
        return rows, [None] * len(rows)

    def prepare(self, sides: "Sequence[Side]", report: Progress) -> None:
        """Class names, what turns each side's outputs into indices of them, and the references."""
        examples = self.examples
        if sides[0].subject.probed:
            training = self.training
            self.names = data_names(examples.label_names, (*training.labels, *examples.labels))
            ids = ids_of(training.labels, self.names, training.source)
            self.probe = Probe(_features(sides[0], training.texts, self.batch_size(), report), ids, training.source)
        else:
            heads = [head_names(side.subject.config) for side in sides]
            self.names = reference_names(examples.label_names, heads)
            for side, head in zip(sides, heads, strict=True):
                side.reading = np.asarray(head_order(head, self.names, side.subject.name), dtype=np.int64)
        self.references = ids_of(examples.labels, self.names, examples.source)

    def collect(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[Any]:
        """The class of the largest logit, or what the probe says; −1 for a row with NaN."""
        if self.probe is not None:
            features = pooled(output.last_hidden_state, batch["attention_mask"]).numpy()
            probed: list[int] = self.probe.predict(features).tolist()
            return probed
        logits = output.logits.float().numpy()
        ids: list[int] = np.where(np.isnan(logits).any(axis=1), -1, side.reading[logits.argmax(axis=1)]).tolist()
        return ids

    def logits(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[torch.Tensor]:
        """One place a text: the head's logits in the order of `names`, or the probe's."""
        if self.probe is not None:
            features = pooled(output.last_hidden_state, batch["attention_mask"]).numpy()
            found = torch.from_numpy(self.probe.logits(features))
        else:
            found = output.logits[:, np.argsort(side.reading)]
        return list(found.split(1))

    def floor(self) -> float:
        """Always the same class."""
        return self.constant_floor(range(len(self.names)))

    def shown(self, answer: Any) -> Any:
        """The name of the class."""
        return self.names[answer] if answer >= 0 else None


class Regression(Exam):
    """A number for each text or pair of texts, by a head with one output."""

    heads = ("ForSequenceClassification",)
    loader = "AutoModelForSequenceClassification"
    agrees = False

    def __init__(self, task: Task, request: Request) -> None:
        """Errors of `load_numbers`."""
        super().__init__(task, request)
        asked = request
        self.texts, self.references, self.source = load_numbers(
            task, asked.data, self.split, asked.limit, asked.text_columns, asked.label_column
        )

    def check_subjects(self, subjects: Sequence[Any]) -> None:
        """One output each."""
        for item in subjects:
            if item.config.num_labels != 1:
                raise InputError(
                    f"wrong task for the head: {item.name} has {item.config.num_labels} classes, and task "
                    f"'{self.task.name}' wants a head with one output"
                )

    def encode(self, tokenizer: Any, config: Any, length: int | None, model: str) -> tuple[list[Tokens], list[Any]]:
        """One row a text."""
        rows = encode(tokenizer, config, self.texts, length, model)
        return rows, [None] * len(rows)

    def collect(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[Any]:
        """The output; NaN stays."""
        values: list[float] = output.logits.double()[:, 0].tolist()
        return values

    def choices(self, side: "Side") -> list[Any] | None:
        """Numbers are never quite equal."""
        return None


def _check_probed(subjects: Sequence[Any], data: str | Path | None) -> None:
    """Refuse what no probe can be fitted on, before anything is loaded."""
    first = subjects[0]
    if first.quantized:
        raise InputError(f"a linear probe is fitted on the float model, and {first.name} is quantized; pass --baseline")
    if len({item.config.hidden_size for item in subjects}) > 1:
        raise InputError(f"{subjects[1].name} and {first.name} differ in hidden_size: one probe cannot read both")
    if data is not None and Path(data).expanduser().is_file():
        raise InputError(
            f"{first.name} has no classification head, and a linear probe needs training data besides {data}; "
            "pass a folder that holds train.* and validation.*"
        )


def _check_kinds(training: Examples, examples: Examples) -> None:
    """Numbers in one file and words in the other are two namings of classes; only a task's own names connect them."""
    first, second = training.labels[0], examples.labels[0]
    if examples.label_names is None and type(first) is not type(second):
        what = {int: "numbers", str: "words"}
        raise InputError(
            f"the labels of {training.source} are {what[type(first)]} (such as {first!r}), those of {examples.source} "
            f"are {what[type(second)]} ({second!r}); write both files in the same way"
        )


def _features(side: "Side", texts: Sequence[Any], batch_size: int, report: Progress) -> Any:
    """Mean features `[texts, features]` of other texts than the side's own, in their order."""
    rows = encode(side.tokenizer, side.subject.config, texts, side.max_length, side.subject.name)
    batches = cut(rows, batch_size)
    found = np.empty((len(rows), side.subject.config.hidden_size), dtype=np.float32)
    for done, indices in enumerate(batches, start=1):
        batch = collate(side.tokenizer, [rows[index] for index in indices])
        found[indices] = pooled(side.forward(batch).last_hidden_state, batch["attention_mask"]).numpy()
        report("fit probe", done, len(batches))
    return found
