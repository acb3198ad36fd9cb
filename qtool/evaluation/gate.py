"""The quality gate: limits that an evaluation must keep, for a CI job to act on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qtool.errors import UsageError
from qtool.evaluation.result import Evaluation
from qtool.evaluation.tasks import Task


@dataclass(frozen=True)
class Gate:
    """Limits in points (`max_drop`, `min_score`), percent (`min_agreement`) and nats (`max_kl`); None asks nothing.

    For perplexity, drop and score are percent of the baseline's.

    Point estimates are compared, and a value that equals its limit holds. Only losses count: a candidate that beats its
    baseline passes any `max_drop` that is not negative.
    """

    max_drop: float | None = None
    min_score: float | None = None
    min_agreement: float | None = None
    max_kl: float | None = None

    def needs_baseline(self, metric: str) -> bool:
        """Whether a limit is about the difference to a baseline."""
        relative = metric == "perplexity" and self.min_score is not None
        return relative or any(limit is not None for limit in (self.max_drop, self.min_agreement, self.max_kl))

    def check(self, tasks: Sequence[Task]) -> None:
        """Raises UsageError for a limit on something that a task does not have."""
        from qtool.evaluation.exams import exam_class  # imports torch, which reading limits does not need

        for task in tasks:
            if self.min_agreement is not None and not exam_class(task).agrees:
                raise UsageError(f"agreement has no meaning for task '{task.name}'; leave out min-agreement")
            if self.max_kl is not None and not exam_class(task).distributes:
                raise UsageError(f"KL divergence has no meaning for task '{task.name}'; leave out max-kl")

    def failures(self, evaluation: Evaluation) -> list[str]:
        """One line for each limit that does not hold: gate, measured value, limit. Empty when the gate holds.

        A value that is NaN or was not measured fails its gate.
        """
        drop, agreement = evaluation.drop, evaluation.agreement
        unit = "% of the baseline's" if evaluation.relative else "points"
        # Answers that are numbers (regression) have none although there is a baseline.
        absent = _NO_BASELINE if evaluation.baseline is None else f"has no meaning for task '{evaluation.task}'"
        incomparable = absent if evaluation.baseline is None else _INCOMPARABLE
        checks = [
            _above("max-drop", "drop", drop, self.max_drop, unit),
            _below("min-score", evaluation.metric, evaluation.points, self.min_score, unit),
            _below("min-agreement", "agreement", agreement, self.min_agreement, "%", absent),
            _above("max-kl", "KL divergence", evaluation.kl, self.max_kl, "nats", incomparable, ".3g"),
        ]
        return [line for line in checks if line is not None]


_NO_BASELINE = "was not measured (no baseline)"
_INCOMPARABLE = "was not measured (nothing to compare: other tokens, tags or vocabulary than the baseline's)"


def _above(
    gate: str,
    what: str,
    value: float | None,
    limit: float | None,
    unit: str,
    absent: str = _NO_BASELINE,
    style: str = ".2f",
) -> str | None:
    if limit is None or (value is not None and value <= limit):
        return None
    return f"{gate}: {what} {_shown(value, limit, absent, style)}, limit {limit:g} {unit}"


def _below(
    gate: str, what: str, value: float | None, limit: float | None, unit: str, absent: str = _NO_BASELINE
) -> str | None:
    if limit is None or (value is not None and value >= limit):
        return None
    return f"{gate}: {what} {_shown(value, limit, absent)}, limit {limit:g} {unit}"


def _shown(value: float | None, limit: float, absent: str = _NO_BASELINE, style: str = ".2f") -> str:
    """The value with as many decimals as it takes to tell it from the limit."""
    if value is None:
        return absent
    if math.isnan(value):
        return "is NaN"
    short = f"{value:{style}}"
    return f"is {short}" if float(short) != limit else f"is {value!r}"
