"""The task table, and examples (texts and labels) from the rows of a task.

Adding a task of an existing kind is one entry in `TASKS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qtool.errors import InputError, UsageError, one_of
from qtool.rows import Row, Split, Texts, find_text_columns, hub_rows, read_rows, split_file, texts_of, unicode

Text = str | tuple[str, str]

LABEL_COLUMNS: tuple[str, ...] = ("label", "labels")
"""Where a task that names no label column looks for it."""


@dataclass(frozen=True)
class Task:
    """What is asked of a model, and where its data come from.

    `repo` and `config` name the data on the hub (None: local files only). `text_columns` are one column or a pair;
    empty means that they are looked for, as a `label_column` of None does. `labels` are the class names in the order of
    the integer labels, None where the data or the model say. `metric` is a name in `metrics.METRICS`.
    """

    name: str
    kind: Literal["sequence-classification"]
    repo: str | None
    config: str | None
    text_columns: tuple[str, ...]
    label_column: str | None
    labels: tuple[str, ...] | None
    description: str
    metric: str = "accuracy"


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


TASKS: dict[str, Task] = {
    "sst2": Task(
        name="sst2",
        kind="sequence-classification",
        repo="nyu-mll/glue",
        config="sst2",
        text_columns=("sentence",),
        label_column="label",
        labels=("negative", "positive"),
        description="sentiment of film reviews (GLUE SST-2), accuracy",
    ),
    "classification": Task(
        name="classification",
        kind="sequence-classification",
        repo=None,
        config=None,
        text_columns=(),
        label_column=None,
        labels=None,
        description="any labelled file or folder given with --data, accuracy",
    ),
}


def task(name: str) -> Task:
    """The task called `name`. Raises UsageError with the nearest names for one that does not exist."""
    if name not in TASKS:
        raise UsageError(one_of(name, list(TASKS), "task"))
    return TASKS[name]


def load_rows(task: Task, data: str | Path | None, split: Split, limit: int | None = None) -> tuple[list[Row], str]:
    """The first `limit` rows of a split, and a word on where they are from: a local path, or the hub's name.

    Raises InputError for data that cannot be used, UnavailableError when the hub is needed and not reachable,
    UsageError for a task that has no hub data.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the number of rows must be at least 1, not {limit}")
    if data is None:
        if task.repo is None:
            raise UsageError(f"task '{task.name}' has no data of its own; pass a file or a folder with --data")
        rows = hub_rows(task.repo, task.config, split, limit)
        source = f"{task.repo}/{task.config}" if task.config else task.repo
    else:
        path = split_file(Path(data).expanduser(), split)
        if path is None:
            raise InputError(f"{data} has no data for {split}: put a file {split}.jsonl, .csv or .parquet there")
        rows, source = read_rows(path)[:limit], str(path)
    if not rows:
        raise InputError(f"{source} is empty: split {split} holds no rows")
    return rows, source


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
    rows, source = load_rows(task, data, split, limit)
    texts = texts_of(rows, find_text_columns(rows, source, text_columns or task.text_columns), source)
    column = find_label_column(task, rows, source, label_column)
    labels = labels_of(rows, column, source)
    _known(labels, task, f"{source}, column {column}")
    return Examples(texts, labels, task.labels, source)


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
