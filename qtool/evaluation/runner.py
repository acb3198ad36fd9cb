"""One evaluation: a model, and usually its float baseline, on the same batches in the same process."""

import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qtool import __version__
from qtool.errors import InputError, UsageError, one_of
from qtool.evaluation import metrics
from qtool.evaluation.labels import data_names, head_names, head_order, ids_of, reference_names
from qtool.evaluation.models import DTYPES, Subject, subject
from qtool.evaluation.probe import MAX_ROWS, Probe
from qtool.evaluation.result import INTERVAL_LEVEL, Evaluation, Prediction, ProbeInfo, Score
from qtool.evaluation.sides import Decide, Progress, Side, features, load_sides, measure
from qtool.evaluation.tasks import Examples, Task, load_examples
from qtool.rows import Split


def evaluate(
    model: str | Path,
    task: Task,
    *,
    data: str | Path | None = None,
    split: Split = "validation",
    baseline: str | Path | None = None,
    batch_size: int = 32,
    max_length: int | None = 128,
    limit: int | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    allow_weak_baseline: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Score `model` on `task`, and compare it with `baseline` when one is given.

    A model without a classification head (a bare encoder, or the encoder of a masked-LM checkpoint) is scored by a
    linear probe, fitted on the training split with the baseline, or with `model` itself when it is float and alone.

    Args:
        model: folder or hub name of a float model or an artifact of qtool; `revision` is its branch, tag or commit.
        task: what to score, from `qtool.evaluation.tasks.task`.
        data: file (the split itself) or folder with one file a split; None fetches the task's data from the hub.
        split: train, validation or test.
        baseline: folder or hub name of the model that the drop is measured against, float or (said as `quantized` in
            its score) an artifact.
        batch_size: texts in a batch; batches are cut once, over all examples sorted by length.
        max_length: tokens to which texts are cut; None leaves the limits of tokenizer and model, which always hold.
        limit: how many examples, from the start of the split; None for all.
        text_columns: one or two columns of the data that replace the task's.
        label_column: the column that replaces the task's.
        dtype: of float weights, one of `DTYPES`.
        threads: of torch during the evaluation; None leaves them as they are.
        allow_weak_baseline: go on with a baseline that is no better than the most frequent label.
        progress: called with a stage, batches done and batches in all.

    Raises:
        InputError: unusable model, data or labels, a head for another task, a weak baseline, a baseline that gives NaN.
        UsageError: an argument that means nothing.
        UnavailableError: the hub is needed and not reachable, or a package is missing.
    """
    _check_arguments(batch_size, max_length, threads, dtype)
    examples = load_examples(task, data, split, limit, text_columns, label_column)
    subjects = _subjects(model, baseline, task, revision)
    training = None
    if subjects[0].probed:
        _check_probed(subjects, data)
        training = load_examples(task, data, "train", MAX_ROWS, text_columns, label_column)
        _check_kinds(training, examples)
    report = progress or (lambda stage, done, total: None)
    with _threads(threads), torch.inference_mode():
        sides = load_sides(subjects, task, examples.texts, max_length, dtype)
        if training is None:
            probe, (names, decide) = None, _by_heads(sides, examples)
        else:
            names = data_names(examples.label_names, (*training.labels, *examples.labels))
            ids = ids_of(training.labels, names, training.source)
            probe = Probe(features(sides[0], training.texts, batch_size, report), ids, training.source)
            decide = [probe.predict] * len(sides)
        references = ids_of(examples.labels, names, examples.source)
        measure(sides, decide, batch_size, report)
        settings = _settings(batch_size, sides[0].max_length, dtype, probe is not None)
    _check_baseline(sides, task, references, allow_weak_baseline)
    return _evaluation(task, split, examples, names, references, sides, probe.info if probe else None, settings)


def _check_arguments(batch_size: int, max_length: int | None, threads: int | None, dtype: str) -> None:
    for name, value in (("batch size", batch_size), ("maximum length", max_length), ("number of threads", threads)):
        if value is not None and value < 1:
            raise UsageError(f"the {name} must be at least 1, not {value}")
    if dtype not in DTYPES:
        raise UsageError(one_of(dtype, DTYPES, "dtype"))


def _subjects(model: str | Path, baseline: str | Path | None, task: Task, revision: str | None) -> list[Subject]:
    """The baseline, if any, then the candidate: the order in which batches go through them."""
    candidate = subject(model, task, revision)
    if baseline is None:
        return [candidate]
    other = subject(baseline, task)
    if other.probed != candidate.probed:
        headless = other if other.probed else candidate
        raise InputError(f"{model} and {baseline} cannot be compared: {headless.name} has no classification head")
    return [other, candidate]


def _check_probed(subjects: Sequence[Subject], data: str | Path | None) -> None:
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


def _by_heads(sides: Sequence[Side], examples: Examples) -> tuple[tuple[str, ...], list[Decide]]:
    """The class names, and for each side what turns its logits into indices of them."""
    heads = [head_names(side.subject.config) for side in sides]
    names = reference_names(examples.label_names, heads)
    orders = [head_order(head, names, side.subject.name) for head, side in zip(heads, sides, strict=True)]
    return names, [_largest(order) for order in orders]


def _largest(order: list[int]) -> Decide:
    """The class of the largest logit; −1 for a row with NaN."""
    classes = np.asarray(order, dtype=np.int64)

    def decide(logits: NDArray[np.float32]) -> NDArray[np.int64]:
        return np.where(np.isnan(logits).any(axis=1), -1, classes[logits.argmax(axis=1)])

    return decide


def _check_baseline(sides: Sequence[Side], task: Task, references: Sequence[int], allow_weak: bool) -> None:
    """Stop where a comparison would mean nothing."""
    if len(sides) == 1:
        return
    name = sides[0].subject.name
    value = metrics.points(task.metric, sides[0].predictions, references)
    if math.isnan(value):
        raise InputError(f"the baseline {name} gives NaN on {task.name}; its checkpoint is damaged")
    floor = metrics.majority(references)
    if value <= floor and not allow_weak:
        raise InputError(
            f"the baseline {name} scores {value:.2f} on {task.name}, no more than always answering the most frequent "
            f"label ({floor:.2f}): its labels are in another order or it was not trained for this; "
            "--allow-weak-baseline goes on"
        )


def _evaluation(
    task: Task,
    split: Split,
    examples: Examples,
    names: Sequence[str],
    references: Sequence[int],
    sides: Sequence[Side],
    probe: ProbeInfo | None,
    settings: dict[str, Any],
) -> Evaluation:
    scores = [
        Score(
            side.subject.name,
            metrics.points(task.metric, side.predictions, references),
            side.seconds,
            side.subject.size_bytes,
            side.subject.quantized,
        )
        for side in sides
    ]
    paired = len(sides) > 1
    return Evaluation(
        task=task.name,
        split=split,
        data=examples.source,
        n=len(references),
        metric=task.metric,
        candidate=scores[-1],
        baseline=scores[0] if paired else None,
        # The scores are quotients of integers; rounding takes away what their difference adds in the last bits.
        drop=round(scores[0].value - scores[-1].value, 9) if paired else None,
        interval=_interval(sides, references) if paired else None,
        agreement=metrics.agreement(sides[-1].predictions, sides[0].predictions) if paired else None,
        speed_ratio=scores[0].seconds / scores[-1].seconds if paired else None,
        probe=probe,
        settings=settings,
        predictions=_predictions(names, references, sides),
    )


def _interval(sides: Sequence[Side], references: Sequence[int]) -> metrics.Interval:
    """The paired interval of the drop; NaN where a prediction is missing."""
    if any(min(side.predictions) < 0 for side in sides):
        return math.nan, math.nan
    baseline, candidate = (np.equal(side.predictions, references) for side in sides)
    return metrics.paired_interval(candidate, baseline, INTERVAL_LEVEL)


def _predictions(names: Sequence[str], references: Sequence[int], sides: Sequence[Side]) -> list[Prediction]:
    def named(label: int) -> str | None:
        return names[label] if label >= 0 else None

    theirs = sides[0].predictions if len(sides) > 1 else [-1] * len(references)
    rows = zip(references, theirs, sides[-1].predictions, strict=True)
    return [
        {"index": index, "label": names[truth], "baseline": named(other), "candidate": named(own)}
        for index, (truth, other, own) in enumerate(rows)
    ]


def _settings(batch_size: int, max_length: int | None, dtype: str, probed: bool) -> dict[str, Any]:
    packages = ["torch", "transformers", "tokenizers", "numpy", *(["scikit-learn"] if probed else [])]
    installed = {name: metadata.version(name) for name in packages}
    return {
        "batch_size": batch_size,
        "max_length": max_length,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "qtool": __version__, **installed},
    }


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
