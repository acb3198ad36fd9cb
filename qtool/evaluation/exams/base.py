"""What every kind of task has in common.

An exam holds a task's examples, turns them into rows of tokens, collects from a model's outputs what it needs, and says
what the model answered. Scores, agreement and intervals follow from the answers alone (`evaluation.metrics`).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from qtool.errors import InputError, UsageError
from qtool.evaluation import metrics
from qtool.rows import Split

if TYPE_CHECKING:
    from qtool.evaluation.sides import Side
    from qtool.evaluation.tasks import Task

Tokens = dict[str, list[int]]
Batch = dict[str, torch.Tensor]
Progress = Callable[[str, int, int], None]

PURPOSES = {
    "ForSequenceClassification": "classifying texts",
    "ForQuestionAnswering": "finding answers in a text",
    "ForTokenClassification": "labelling every token",
    "ForMultipleChoice": "choosing among answers",
    "ForNextSentencePrediction": "telling whether two sentences follow each other",
    "ForPreTraining": "pretraining",
    "ForMaskedLM": "filling gaps in a text",
    "ForCausalLM": "generating text",
    "LMHeadModel": "generating text",
    "ForConditionalGeneration": "generating text from text",
    "DoubleHeadsModel": "something else",
    "Model": "features of texts (it has no head)",
}
"""What a class is made for, by the end of its name."""


@dataclass(frozen=True)
class Request:
    """What is asked besides models and task; None leaves an option to the task.

    `stride` is by how many tokens a window of text moves, `doc_stride` how many tokens neighbouring windows of a
    context share (0: one window, the rest is cut), `n_best` how many answers of a question are kept.
    """

    data: str | Path | None = None
    split: Split | None = None
    limit: int | None = None
    text_columns: Sequence[str] | None = None
    label_column: str | None = None
    batch_size: int | None = None
    max_length: int | None = None
    stride: int | None = None
    doc_stride: int | None = None
    n_best: int | None = None


MAX_N_BEST = 1000

OWN_OPTIONS = ("stride", "doc_stride", "n_best")
"""Options of a request that only some kinds of tasks have."""


class Exam(ABC):
    """See the module. A subclass reads its examples in `__init__` and sets `source` and `references`.

    `heads` are the ends of class names that it takes, `loader` the Auto class that loads them, `takes` the own options
    that have a meaning, `columns` how many columns of text at most, `labelled` whether there is one of labels, `agrees`
    whether two models can give the same answer, `distributes` whether `logits` tells the probabilities of what can be
    answered. `references` fit the task's metrics; where they depend on the tokenizer they are set by `encode`, and
    `same_tokens` says that all models must then share one. `said_split` is None for a file that is nobody's split;
    `used` holds the own options as they came out.
    """

    heads: ClassVar[tuple[str, ...]]
    loader: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset()
    columns: ClassVar[int] = 2
    labelled: ClassVar[bool] = True
    agrees: ClassVar[bool] = True
    distributes: ClassVar[bool] = False
    max_length: ClassVar[int] = 128
    unit: ClassVar[str] = "examples"
    same_tokens: ClassVar[bool] = False
    source: str
    references: list[Any]

    def __init__(self, task: "Task", request: Request) -> None:
        self.task, self.request = task, request
        self.split: Split = request.split or task.default_split
        whole = request.data is not None and Path(request.data).expanduser().is_file()
        self.said_split = request.split or (None if whole else task.default_split)
        self.used: dict[str, Any] = {}

    @classmethod
    def check_options(cls, task: "Task", request: Request) -> None:
        """Raises UsageError for an option that has no meaning here, or a number that is too small."""
        for name in OWN_OPTIONS:
            value = getattr(request, name)
            if value is not None and name not in cls.takes:
                raise UsageError(f"--{name.replace('_', '-')} has no meaning for task '{task.name}'")
            least = 0 if name == "doc_stride" else 1
            if name == "n_best" and value is not None and value > MAX_N_BEST:
                raise UsageError(f"--n-best must be at most {MAX_N_BEST}, not {value}")
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if request.label_column is not None and not cls.labelled:
            raise UsageError(f"--label-column has no meaning for task '{task.name}'")
        if len(request.text_columns or ()) > cls.columns:
            raise UsageError(
                f"task '{task.name}' reads {cls.columns} --text-column, not {len(request.text_columns or ())}"
            )

    @classmethod
    def loader_for(cls, architecture: str, task: "Task", model: str) -> str:
        """The Auto class for a model of class `architecture`. Raises InputError for one that cannot do the task."""
        if architecture.endswith(cls.heads) and not architecture.endswith(("DoubleHeadsModel",)):
            return cls.loader
        raise wrong_head(architecture, task, model, " or ".join(f"…{head}" for head in cls.heads))

    @property
    def length(self) -> int:
        """Tokens of a row at most, before the limits of tokenizer and model."""
        return self.request.max_length or self.task.max_length or self.max_length

    def batch_size(self) -> int:
        """Rows in a batch."""
        return self.request.batch_size or 32

    @property
    def n(self) -> int:
        """How many of `unit` are scored."""
        return len(self.references)

    def check_subjects(self, subjects: Sequence[Any]) -> None:  # noqa: B027 (nothing to check is the usual case)
        """Refuse models that cannot be compared, before anything is loaded. Raises InputError."""

    @abstractmethod
    def encode(self, tokenizer: Any, config: Any, length: int | None, model: str) -> tuple[list[Tokens], list[Any]]:
        """Rows of tokens, unpadded, and beside each row what is needed to read the outputs for it."""

    def prepare(self, sides: "Sequence[Side]", report: Progress) -> None:  # noqa: B027 (as above)
        """Align the classes of the models by name, or fit what reads their features. Raises InputError."""

    @abstractmethod
    def collect(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[Any]:
        """What is kept of the model's output, one entry a row of the batch."""

    def comparable(self, sides: "Sequence[Side]") -> bool:
        """Whether there are two models that give the same choices probabilities, at the same tokens."""
        return self.distributes and len(sides) > 1 and sides[0].rows is sides[-1].rows

    def logits(self, side: "Side", output: Any, batch: Batch, about: list[Any]) -> list[torch.Tensor]:
        """Of each row of the batch the logits `[places, choices]` of what is scored; only kinds that say `distributes`.

        The choices are in one order for all models.
        """
        raise NotImplementedError(f"{type(self).__name__} says that it distributes and has no logits")

    def divergences(self, side: "Side") -> list[float]:
        """Of everything scored the KL divergence from the baseline's distribution, in nats; NaN where logits are."""
        return [value for places in side.divergences for value in places.tolist()]

    def answers(self, side: "Side") -> list[Any]:
        """What the model answered, in the order of `references`, as the metrics take it; missing ones as they say."""
        return side.collected

    def choices(self, side: "Side") -> list[Any] | None:
        """What agreement compares; None where two models cannot be said to agree."""
        return self.answers(side)

    def floor(self) -> float:
        """The score of a model that knows nothing: a baseline that is no better stops the run."""
        return 0.0

    def rows(self, sides: "Sequence[Side]") -> list[dict[str, Any]]:
        """The file of predictions, a row a reference; `baseline` is None without one."""
        own = self.answers(sides[-1])
        theirs = self.answers(sides[0]) if len(sides) > 1 else [None] * len(own)
        triples = zip(self.references, theirs, own, strict=True)
        return [
            {
                "index": index,
                "label": self.shown(truth),
                "baseline": None if other is None else self.shown(other),
                "candidate": None if mine is None else self.shown(mine),
            }
            for index, (truth, other, mine) in enumerate(triples)
        ]

    def shown(self, answer: Any) -> Any:
        """An answer or a reference as users know it; None for a missing one."""
        return None if isinstance(answer, float) and not math.isfinite(answer) else answer

    def constant_floor(self, answers: Sequence[Any]) -> float:
        """The best score that one and the same answer to everything would get."""
        scores = (metrics.points(self.task.metric, [answer] * self.n, self.references) for answer in answers)
        return max((score for score in scores if not math.isnan(score)), default=0.0)


def scores_at(side: "Side", output: Any, batch: Batch, places: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Of each row of the batch the logits `[places, choices]` at these places, counted without padding."""
    mask = batch["attention_mask"]
    # A tokenizer that pads on the left moves the tokens of shorter rows to the right.
    shifts = (mask.shape[1] - mask.sum(1)) * (side.tokenizer.padding_side == "left")
    rows = zip(output.logits, places, shifts, strict=True)
    return [logits[torch.tensor(own, dtype=torch.int64) + shift] for logits, own, shift in rows]


def wrong_head(architecture: str, task: "Task", model: str, wanted: str) -> InputError:
    """The error for a model whose class cannot do the task."""
    purpose = next((text for suffix, text in PURPOSES.items() if architecture.endswith(suffix)), "something else")
    return InputError(
        f"wrong task for the head: {model} is a {architecture}, made for {purpose}; task '{task.name}' takes a {wanted}"
    )
