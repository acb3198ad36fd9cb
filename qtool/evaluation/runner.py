"""One evaluation: a model, and usually its float baseline, on the same batches in the same process."""

import hashlib
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtool import __version__, ranks
from qtool.device import described, usable
from qtool.errors import InputError, UsageError, one_of
from qtool.evaluation import metrics
from qtool.evaluation.exams import Exam, Request, exam_class
from qtool.evaluation.exams.base import OWN_OPTIONS, Progress
from qtool.evaluation.exams.classification import Classification
from qtool.evaluation.models import DTYPES, Subject, subject
from qtool.evaluation.result import INTERVAL_LEVEL, Evaluation, Score
from qtool.evaluation.sides import Side, load_sides, measure
from qtool.evaluation.tasks import Task
from qtool.rows import Split


def evaluate(
    model: str | Path,
    task: Task,
    *,
    data: str | Path | None = None,
    split: Split | None = None,
    baseline: str | Path | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    doc_stride: int | None = None,
    n_best: int | None = None,
    limit: int | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    device: str = "cpu",
    allow_weak_baseline: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score `model` on `task`, and compare it with `baseline` when one is given.

    What a model needs for a task, and how its answers are read, is said by the task's kind (`qtool.evaluation.exams`).

    Args:
        model: folder or hub name of a float model or an artifact of qtool; `revision` is its branch, tag or commit.
        task: what to score, from `qtool.evaluation.tasks.task`.
        data: file (the split itself), folder with one file a split, or `org/name[:config]` of a hub data set; None
            fetches the task's own data from the hub.
        split: train, validation or test; None: the task's usual one.
        baseline: folder or hub name of the model that the drop is measured against, float or (said as `quantized` in
            its score) an artifact.
        batch_size: rows in a batch; None: 32, and fewer long ones. Batches are cut once, over all rows by length.
        max_length: tokens to which texts are cut, or of a window; None: what is usual for the task. The limits of
            tokenizer and model always hold.
        stride: by how many tokens a window of running text moves; None: by its length.
        doc_stride: tokens that windows of a long context share; None: 128; 0: one window, the rest is not read.
        n_best: answers of a question that are kept in the predictions.
        limit: how many examples (windows of running text), from the start of the split; None for all.
        text_columns: one or two columns of the data that replace the task's.
        label_column: the column that replaces the task's.
        dtype: of float weights, one of `DTYPES`.
        threads: of torch during the evaluation; None leaves them as they are.
        device: where both models compute: cpu, cuda or cuda:N.
        allow_weak_baseline: go on with a baseline that knows nothing of the task.
        progress: called with a stage, batches done and batches in all.

    Raises:
        InputError: unusable model, data or labels, a head for another task, a weak baseline, a baseline that gives NaN.
        UsageError: an argument that means nothing, or nothing for this task.
        UnavailableError: the hub is needed and not reachable, a package is missing, or the device cannot be used.
    """
    where = usable(device)
    if dtype not in DTYPES:
        raise UsageError(one_of(dtype, DTYPES, "dtype"))
    request = Request(
        data, split, limit, text_columns, label_column, batch_size, max_length, stride, doc_stride, n_best
    )
    check_request(task, request, threads)
    subjects = _subjects(model, baseline, task, revision)
    exam = exam_class(task)(task, request)
    exam.check_subjects(subjects)
    report = progress or (lambda stage, done, total: None)
    with torch_threads(threads), torch.inference_mode():
        sides = load_sides(subjects, exam, dtype, where)
        exam.prepare(sides, report)
        agree(sides, exam)
        measure(sides, exam, report)
        settings = settings_of(exam, sides, dtype)
    return evaluation_of(exam, sides, settings, allow_weak=allow_weak_baseline)


def agree(sides: Sequence[Side], exam: Exam) -> None:
    """Raises InputError where ranks that share an evaluation have other rows, models or ways to compute."""
    if ranks.current().size == 1:
        return
    from qtool.job import instruction_set, versions

    rows = json.dumps([[side.rows for side in sides], exam.references], default=str)
    facts = {
        "data": hashlib.sha256(rows.encode()).hexdigest(),
        "model": [[side.subject.size_bytes, side.subject.config.to_json_string()] for side in sides],
        "threads": torch.get_num_threads(),
        "instruction set": instruction_set(sides[0].device),
        "versions": versions(),
    }
    ranks.current().agree("evaluation", facts)


def options_for(tasks: Sequence[Task], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options for each of several tasks: one that only some kinds have goes to those tasks that take it.

    Raises UsageError, before anything is scored, for one that no task takes, or that means nothing for a task.
    """
    taken = set().union(*(exam_class(task).takes for task in tasks))
    shares = []
    for task in tasks:
        foreign = [name for name in OWN_OPTIONS if name in taken - exam_class(task).takes]
        own = {**options, **dict.fromkeys(foreign)}
        known = {name: own[name] for name in Request.__dataclass_fields__ if name in own}
        exam_class(task).check_options(task, Request(**known))
        shares.append(own)
    return shares


def check_request(task: Task, request: Request, threads: int | None = None) -> None:
    """Raises UsageError for a number that is too small, or an option that means nothing for the task."""
    counts = {name: getattr(request, name) for name in ("batch_size", "max_length", "limit")}
    for name, value in {**counts, "threads": threads}.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    exam_class(task).check_options(task, request)


def _subjects(model: str | Path, baseline: str | Path | None, task: Task, revision: str | None) -> list[Subject]:
    """The baseline, if any, then the candidate: the order in which batches go through them."""
    candidate = subject(model, task, revision)
    return [candidate] if baseline is None else [subject(baseline, task), candidate]


def check_baseline(exam: Exam, side: Side, value: float, allow_weak: bool) -> None:
    """Raises InputError where a comparison with the model of `side`, which scores `value`, would mean nothing."""
    name, task = side.subject.name, exam.task
    if math.isnan(value):
        raise InputError(f"the baseline {name} gives NaN on {task.name}; its checkpoint is damaged")
    floor = exam.floor()
    # Rounding alone puts the perplexity of a model that knows nothing a little below the size of its vocabulary.
    weak = value >= 0.999 * floor if task.metric == "perplexity" else value <= floor
    if weak and not allow_weak:
        raise InputError(
            f"the baseline {name} scores {value:.2f} on {task.name}, no better than knowing nothing, such as always "
            f"answering the most frequent label ({floor:.2f}): its labels are in another order or it was not trained "
            "for this, or texts are cut too short or are too few; --allow-weak-baseline goes on"
        )


def evaluation_of(exam: Exam, sides: Sequence[Side], settings: dict[str, Any], *, allow_weak: bool) -> Evaluation:
    """What came of sides that have been through every batch. Raises InputError for a baseline that means nothing."""
    task, paired = exam.task, len(sides) > 1
    answers = [exam.answers(side) for side in sides]
    scores = [_score(exam, side, own) for side, own in zip(sides, answers, strict=True)]
    if paired:
        check_baseline(exam, sides[0], scores[0].value, allow_weak)
    probe = exam.probe if isinstance(exam, Classification) else None
    return Evaluation(
        task=task.name,
        split=exam.said_split,
        data=exam.source,
        n=exam.n,
        metric=task.metric,
        candidate=scores[-1],
        baseline=scores[0] if paired else None,
        # Rounding takes away what the difference of two quotients adds in the last bits.
        drop=round(metrics.drop(task.metric, scores[-1].value, scores[0].value), 9) if paired else None,
        interval=interval(exam, answers) if paired else None,
        agreement=_agreement(exam, sides) if paired else None,
        kl=_kl(exam, sides[-1]),
        speed_ratio=scores[0].seconds / scores[-1].seconds if paired else None,
        probe=probe.info if probe else None,
        settings=settings,
        predictions=exam.rows(sides),
        unit=exam.unit,
    )


def _score(exam: Exam, side: Side, answers: Sequence[Any]) -> Score:
    values = {name: metrics.points(name, answers, exam.references) for name in exam.task.metrics}
    subject = side.subject
    others = {name: value for name, value in values.items() if name != exam.task.metric}
    return Score(subject.name, values[exam.task.metric], side.seconds, subject.size_bytes, subject.quantized, others)


def interval(exam: Exam, answers: Sequence[Sequence[Any]]) -> metrics.Interval:
    """The paired interval of the drop from the first to the second `answers`; NaN where a prediction is missing."""
    theirs, own = answers
    metric, references = exam.task.metric, exam.references
    if any(math.isnan(metrics.points(metric, side, references)) for side in answers):
        return math.nan, math.nan
    if metric == "accuracy":
        return metrics.paired_interval(np.equal(own, references), np.equal(theirs, references), INTERVAL_LEVEL)
    return metrics.paired_bootstrap(metric, own, theirs, references, level=INTERVAL_LEVEL)


def _agreement(exam: Exam, sides: Sequence[Side]) -> float | None:
    """Percent of equal choices; NaN where one is missing, None where choices cannot be equal."""
    theirs, own = exam.choices(sides[0]), exam.choices(sides[-1])
    if theirs is None or own is None:
        return None
    return metrics.agreement(own, theirs)


def _kl(exam: Exam, candidate: Side) -> float | None:
    """Mean KL divergence from the baseline's distributions; NaN where logits are, None where none were compared."""
    found = exam.divergences(candidate) if candidate.divergences else []
    return math.fsum(found) / len(found) if found else None


def settings_of(exam: Exam, sides: Sequence[Side], dtype: str) -> dict[str, Any]:
    """How the sides are measured, in numbers, and by which versions."""
    packages = ["torch", "transformers", "tokenizers", "numpy", *(["scikit-learn"] if sides[0].subject.probed else [])]
    installed = {name: metadata.version(name) for name in packages}
    return {
        "batch_size": exam.batch_size(),
        "max_length": min((exam.length, sides[0].max_length or exam.length)),
        **exam.used,
        "dtype": dtype,
        "device": described(sides[0].device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "qtool": __version__, **installed},
    }


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many threads of torch, for a while; None leaves them as they are."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
