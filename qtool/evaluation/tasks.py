"""The task table, and examples (texts and labels) from the rows of a task.

Adding a task of an existing kind is one entry in `TASKS`; other packages add theirs by the entry point `qtool.tasks`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import plugins
from qtool.errors import InputError, QtoolError, UnavailableError, UsageError, one_of
from qtool.rows import (
    Row,
    Split,
    Texts,
    find_text_columns,
    hub_name,
    hub_rows,
    read_rows,
    read_text,
    split_file,
    texts_of,
    unicode,
)

if TYPE_CHECKING:
    from qtool.evaluation.exams import Exam

Text = str | tuple[str, str]

LABEL_COLUMNS: tuple[str, ...] = ("label", "labels", "score")
"""Where a task that names no label column looks for it."""

GROUP = "qtool.tasks"
"""The entry point by which other packages add tasks."""


@dataclass(frozen=True)
class Task:
    """What is asked of a model, and where its data come from.

    `kind` is a key of `exams.EXAMS`, or an `Exam` class of one's own. `repo` and `config` name the data on the hub
    (None: local files only), `splits` its splits where they have other names than ours. `text_columns` are one column
    or a pair; empty means that they are looked for, as a `label_column` of None does. `labels` are the class names in
    the order of the integer labels, None where the data or the model say. `metrics` are names in `metrics.METRICS`: the
    first is the score, the others are shown beside it. `max_length` replaces the kind's own.
    """

    name: str
    kind: "str | type[Exam]"
    description: str
    repo: str | None = None
    config: str | None = None
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    labels: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ("accuracy",)
    splits: Mapping[str, str] = field(default_factory=dict)
    default_split: Split = "validation"
    max_length: int | None = None

    @property
    def metric(self) -> str:
        """The score."""
        return self.metrics[0]


@dataclass(frozen=True)
class Examples:
    """Texts (or pairs of texts) with their labels, both in the order of the file.

    `labels` are all integers or all strings; `label_names` are the task's class names; `source` is a path or hub name.
    """

    texts: Texts
    labels: list[int] | list[str]
    label_names: tuple[str, ...] | None
    source: str

    def __len__(self) -> int:
        return len(self.texts)


def _glue(
    name: str, description: str, columns: tuple[str, ...], labels: tuple[str, ...] | None, *metrics: str, **more: Any
) -> Task:
    """A task of GLUE (Wang et al. 2019) with the label order of its hub data."""
    kind = "sequence-classification" if labels else "regression"
    known = {"repo": "nyu-mll/glue", "config": name, "label_column": "label", **more}
    return Task(name, kind, f"{description} (GLUE)", text_columns=columns, labels=labels, metrics=metrics, **known)


_NLI = ("entailment", "neutral", "contradiction")
_WIKITEXT: dict[str, Any] = {
    "repo": "Salesforce/wikitext",
    "config": "wikitext-2-raw-v1",
    "text_columns": ("text",),
    "default_split": "test",
}
_TABLE = (
    _glue("sst2", "sentiment of film reviews", ("sentence",), ("negative", "positive"), "accuracy"),
    _glue("cola", "grammatical or not", ("sentence",), ("unacceptable", "acceptable"), "matthews_correlation",
          "accuracy"),
    _glue("mrpc", "do two sentences say the same", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "f1",
          "accuracy"),
    _glue("qqp", "do two questions ask the same", ("question1", "question2"), ("not_duplicate", "duplicate"), "f1",
          "accuracy"),
    _glue("stsb", "how alike two sentences are, 0 to 5", ("sentence1", "sentence2"), None, "pearson", "spearman"),
    _glue("mnli", "does one sentence follow from another", ("premise", "hypothesis"), _NLI, "accuracy",
          splits={"validation": "validation_matched", "test": "test_matched"}),
    _glue("mnli-mm", "MNLI on genres that were not trained on", ("premise", "hypothesis"), _NLI, "accuracy",
          config="mnli", splits={"validation": "validation_mismatched", "test": "test_mismatched"}),
    _glue("qnli", "does a sentence answer a question", ("question", "sentence"), ("entailment", "not_entailment"),
          "accuracy"),
    _glue("rte", "does one sentence follow from another", ("sentence1", "sentence2"), ("entailment", "not_entailment"),
          "accuracy"),
    _glue("wnli", "what a pronoun refers to", ("sentence1", "sentence2"), ("not_entailment", "entailment"), "accuracy"),
    Task("classification", "sequence-classification", "any labelled texts"),
    Task("regression", "regression", "any texts with numbers", metrics=("pearson", "spearman")),
    Task("squad", "question-answering", "answers in a paragraph (SQuAD v1.1)", repo="rajpurkar/squad",
         text_columns=("question", "context"), label_column="answers", metrics=("squad_f1", "exact_match")),
    Task("token-classification", "token-classification", "any words with tags: jsonl, parquet, CoNLL columns",
         metrics=("entity_f1", "entity_precision", "entity_recall")),
    Task("wikitext-2", "perplexity", "perplexity on WikiText-2", metrics=("perplexity",), **_WIKITEXT),
    Task("perplexity", "perplexity", "perplexity on any text", metrics=("perplexity",)),
    Task("masked-lm", "masked-lm", "masked tokens guessed in any texts (WikiText-2 if no data are given)",
         metrics=("token_accuracy",), **{**_WIKITEXT, "text_columns": ()}),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _TABLE}
"""qtool's own tasks by name."""


def tasks() -> dict[str, Task]:
    """All tasks: qtool's own and those of other packages."""
    return {**TASKS, **{name: plugin.value for name, plugin in plugged().good.items()}}


@cache
def plugged() -> plugins.Found:
    """What other packages offer."""
    return plugins.found(GROUP, _check_task, TASKS)


def _check_task(value: Any) -> None:
    from qtool.evaluation.exams import EXAMS, Exam
    from qtool.evaluation.metrics import METRICS

    if not isinstance(value, Task):
        raise TypeError(f"is a {type(value).__name__}, not a qtool.evaluation.tasks.Task")
    if value.kind not in EXAMS and not (isinstance(value.kind, type) and issubclass(value.kind, Exam)):
        raise ValueError(f"has the kind {value.kind!r}; kinds are {', '.join(EXAMS)} and subclasses of Exam")
    if unknown := [name for name in value.metrics if name not in METRICS]:
        raise ValueError(one_of(unknown[0], list(METRICS), "metric"))


def task(name: str) -> Task:
    """The task called `name`; case, dashes and underscores do not count (`wikitext2`, `SST-2`, `mnli_mm`).

    Raises UsageError with the nearest names for one that does not exist.
    """
    if name in TASKS:  # without importing other packages
        return TASKS[name]
    known = tasks()
    alike = [key for key in known if _spoken(key) == _spoken(name)]
    if name not in known and len(alike) == 1:
        return known[alike[0]]
    if name not in known:
        plugged().refuse_broken(name, "task")
        raise UsageError(one_of(name, list(known), "task"))
    return known[name]


def _spoken(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "")


def canonical(name: str) -> str:
    """The name that the table has for a task; `name` itself where there is none."""
    try:
        return task(name).name
    except QtoolError:
        return name


def load_rows(task: Task, data: str | Path | None, split: Split, limit: int | None = None) -> tuple[list[Row], str]:
    """The first `limit` rows of a split, and a word on where they are from: a local path, or the hub's name.

    Raises InputError for data that cannot be used, UnavailableError when the hub is needed and not reachable,
    UsageError for a task that has no hub data.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the number of rows must be at least 1, not {limit}")
    hub = None if data is None else hub_name(str(data))
    if data is None or hub is not None:
        if hub is None and task.repo is None:
            raise UsageError(f"task '{task.name}' has no data of its own; pass a file or a folder with --data")
        repo, config = hub or (str(task.repo), task.config)
        try:
            rows = hub_rows(repo, config, split if hub else task.splits.get(split, split), limit)
        except UnavailableError as error:
            raise UnavailableError(f"no file or folder {data} here, and {error}" if hub else str(error)) from error
        source = f"{repo}/{config}" if config else repo
    else:
        path = _split_path(task, Path(data).expanduser(), split)
        rows, source = read_rows(path)[:limit], str(path)
    if not rows:
        raise InputError(f"{source} is empty: split {split} holds no rows")
    return rows, source


def _split_path(task: Task, data: Path, split: Split) -> Path:
    """The file of a split, also under the name that the task's hub data give it (`validation_matched.jsonl`)."""
    path = split_file(data, split, task.splits.get(split))
    if path is None:
        raise InputError(f"{data} has no data for {split}: put a file {split}.jsonl, .csv or .parquet there")
    return path


def load_running_text(
    task: Task, data: str | Path | None, split: Split, text_columns: Sequence[str] | None
) -> tuple[str, str]:
    """The whole text of a split, and where it is from: a .txt file as it is, else the texts of all rows, in lines.

    Rows without text stay as empty lines, as they were in the file that was cut into rows.
    """
    path = None
    if data is not None and hub_name(str(data)) is None:
        path = _split_path(task, Path(data).expanduser(), split)
    if path is not None and path.suffix == ".txt":
        if text_columns:
            raise InputError(f"{path} is plain text: it has no column {text_columns[0]}; leave out --text-column")
        return read_text(path), str(path)
    rows, source = load_rows(task, data, split)
    columns = find_text_columns(rows, source, text_columns or task.text_columns)
    texts = texts_of(rows, columns[:1], source, skip_missing=True)
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in map(str, texts)), source


def load_single_texts(
    task: Task, data: str | Path | None, split: Split, limit: int | None, text_columns: Sequence[str] | None
) -> tuple[list[str], str]:
    """Single texts of a split that are not blank, without any labels, and where they are from."""
    rows, source = load_rows(task, data, split)
    columns = find_text_columns(rows, source, text_columns or task.text_columns)
    texts = texts_of(rows, columns[:1], source, skip_missing=True)
    kept = [text for text in texts if isinstance(text, str) and text.strip()][:limit]
    if not kept:
        raise InputError(f"{source} holds no text in column {columns[0]}")
    return kept, source


def load_numbers(
    task: Task,
    data: str | Path | None,
    split: Split,
    limit: int | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> tuple[Texts, list[float], str]:
    """Texts with a number each, and where they are from. Errors of `load_examples`."""
    rows, texts, column, source = _labelled(task, data, split, limit, text_columns, label_column)
    numbers = [_number(row[column], f"{source}: row {i}, column {column}") for i, row in enumerate(rows, 1)]
    if set(numbers) == {-1.0}:  # as in the test splits of GLUE
        raise InputError(f"{source}: column {column} is -1 throughout: this split hides its labels (--split)")
    return texts, numbers, source


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{where} holds {value!r}, which is no number; name the numbers' with --label-column")
    return number


def calibration_split(task: Task, data: str | Path | None) -> Split:
    """`train`; for tasks without labels `validation`, where local data have no training split and are scored on test.

    Texts of a language model's corpus come without one often enough, and no label can leak.
    """
    unlabelled = task.kind in ("perplexity", "masked-lm") and task.default_split == "test"
    if data is None or not unlabelled or not (folder := Path(data).expanduser()).is_dir():
        return "train"
    return "train" if split_file(folder, "train") or not split_file(folder, "validation") else "validation"


def load_texts(
    task: Task,
    data: str | Path | None,
    split: Split,
    limit: int | None = None,
    text_columns: Sequence[str] | None = None,
) -> Texts:
    """The texts of a split without its labels, as calibration wants them: empty cells are left out.

    Arguments and errors of `load_examples`.
    """
    rows, source = load_rows(task, data, split, limit)
    columns = find_text_columns(rows, source, text_columns or task.text_columns)
    return texts_of(rows, columns, source, skip_missing=True)


def load_examples(
    task: Task,
    data: str | Path | None,
    split: Split,
    limit: int | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
) -> Examples:
    """The first `limit` examples of a split, from the local file or folder `data`, or from the hub when it is None.

    `text_columns` (one or two) and `label_column` replace the task's own. Raises InputError for wrong column names,
    empty data and labels that are hidden, missing or unknown to the task, and the errors of `load_rows`.
    """
    rows, texts, column, source = _labelled(task, data, split, limit, text_columns, label_column)
    labels = labels_of(rows, column, source)
    _known(labels, task, f"{source}, column {column}")
    return Examples(texts, labels, task.labels, source)


def _labelled(
    task: Task,
    data: str | Path | None,
    split: Split,
    limit: int | None,
    text_columns: Sequence[str] | None,
    label_column: str | None,
) -> tuple[list[Row], Texts, str, str]:
    """Rows, their texts, the column of their labels, and where they are from."""
    rows, source = load_rows(task, data, split, limit)
    texts = texts_of(rows, find_text_columns(rows, source, text_columns or task.text_columns), source)
    return rows, texts, find_label_column(task, rows, source, label_column), source


def find_label_column(task: Task, rows: Sequence[Row], source: str, given: str | None) -> str:
    """The column that holds the labels: the `given` one, else the task's, else the usual names."""
    present = rows[0]
    asked = given or task.label_column
    for column in [asked] if asked else LABEL_COLUMNS:
        if column in present:
            return column
    what = asked or " or ".join(LABEL_COLUMNS)
    raise InputError(f"{source} has no column {what}; it has {_columns(present)}: name the labels' with --label-column")


def _columns(row: Row) -> str:
    return ", ".join(row) or "no columns"


def labels_of(rows: Sequence[Row], column: str, source: str) -> list[int] | list[str]:
    """The labels as integers where all of them are (also written as digits, booleans or whole floats), else as strings.

    Raises InputError for a label that is missing, hidden (-1, as in the test splits of GLUE), or of another type.
    """
    values = [_whole(row[column]) for row in rows]
    for number, value in enumerate(values, start=1):
        _usable(value, f"{source}: row {number}, column {column}")
    integers = [value for value in values if isinstance(value, int)]
    if len(integers) == len(values):
        return integers
    if integers and not all(isinstance(row[column], str) for row in rows):
        raise InputError(f"{source}: column {column} mixes numbers and words; labels must be all of one kind")
    return [str(row[column]) for row in rows]


def _whole(value: Any) -> Any:
    """Integers for the spellings that csv and parquet give them; anything else as it is."""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal():
        return int(value)
    return value


def _usable(value: Any, where: str) -> None:
    if value is None or value == "":
        raise InputError(f"{where} has no label")
    if value == -1:
        raise InputError(f"{where} is -1: this split hides its labels; use one that has them (--split)")
    if not isinstance(value, (int, str)):
        raise InputError(f"{where} holds {value!r}, which is no class label; name the labels' with --label-column")
    if isinstance(value, str):
        unicode(value, where)
    elif value < 0:
        raise InputError(f"{where} is {value}; integer labels count from 0")


def _known(labels: list[int] | list[str], task: Task, where: str) -> None:
    """Refuse labels that the task does not have."""
    if task.labels is None:
        return
    names = {name.casefold() for name in task.labels}
    for label in labels:
        known = label < len(names) if isinstance(label, int) else label.strip().casefold() in names
        if not known:
            raise InputError(f"{where}: label {label!r} is not one of task '{task.name}': {_numbered(task.labels)}")


def _numbered(names: Sequence[str]) -> str:
    return ", ".join(f"{index} {name}" for index, name in enumerate(names))
