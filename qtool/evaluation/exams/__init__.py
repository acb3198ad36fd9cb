"""The kinds of tasks: how a model is asked and its answers are read. Adding a kind is one file and one row here."""

from typing import TYPE_CHECKING

from qtool.evaluation.exams.answering import QuestionAnswering
from qtool.evaluation.exams.base import Exam, Request
from qtool.evaluation.exams.classification import Classification, Regression
from qtool.evaluation.exams.language import MaskedLanguage, Perplexity
from qtool.evaluation.exams.tagging import TokenClassification

if TYPE_CHECKING:
    from qtool.evaluation.tasks import Task

EXAMS: dict[str, type[Exam]] = {
    "sequence-classification": Classification,
    "regression": Regression,
    "question-answering": QuestionAnswering,
    "token-classification": TokenClassification,
    "perplexity": Perplexity,
    "masked-lm": MaskedLanguage,
}
"""What examines a task, by its kind."""

__all__ = ["EXAMS", "Exam", "Request", "exam_class"]


def exam_class(task: "Task") -> type[Exam]:
    """The kind of a task, or the class that it brings along."""
    return EXAMS[task.kind] if isinstance(task.kind, str) else task.kind
