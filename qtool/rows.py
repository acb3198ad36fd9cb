"""Rows of labelled or plain data: local jsonl, csv, parquet and text files, and data sets of the hub.

A row is a dict from column name to value. Local files are read directly, so that no cache files and no locks appear
beside them; only hub data goes through `datasets`. No code of a data set is ever run.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from qtool.errors import InputError, UnavailableError, UsageError

Row = dict[str, Any]
Texts = list[str] | list[tuple[str, str]]
Split = Literal["train", "validation", "test"]

SPLIT_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "dev", "val"),
    "test": ("test",),
}
"""The file names (without suffix) that hold a split inside a data folder."""

TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
    ("text",),
    ("sentence",),
    ("content",),
    ("review",),
    ("sentence1",),
    ("question",),
    ("premise",),
    ("tokens",),
)
"""Where text is looked for when nobody says where, in this order: pairs before single texts."""

WORD_COLUMNS: tuple[str, ...] = ("tokens", "words")
"""Where sentences are that come as lists of words."""

_HUB_SECONDS = 5.0


def read_rows(path: Path) -> list[Row]:
    """All rows of one file, by its suffix: .jsonl (one object a line), .json (that, a list of objects, or SQuAD's own),
    .csv, .parquet, .txt (column `text`), .conll (columns `tokens` and `tags`).

    Values of a csv are strings; blank lines of a text file are left out. Raises InputError, with the line where that is
    known, for a file that is missing, empty, of another kind, not UTF-8, not parseable, or with rows that differ in
    their columns.
    """
    reader = READERS.get(path.suffix.lower())
    if path.is_dir():
        raise InputError(f"{path} is a folder; pass one file of {', '.join(READERS)}")
    if not path.is_file():
        raise InputError(f"no data at {path}: the file does not exist")
    if reader is None:
        raise InputError(f"{path}: files that can be read end in {', '.join(READERS)}")
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: line {_line_of(path, error)} is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if not rows:
        raise InputError(f"{path} is empty: it holds no rows")
    return rows


def _line_of(path: Path, error: UnicodeDecodeError) -> int:
    """The first line that does not decode. Readers decode in pieces, so the error's own offset says nothing."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            return number
    raise error


def _json_lines(path: Path) -> list[Row]:
    rows: list[Row] = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(_json_row(line, f"{path}: line {number}"))
                _same_columns(rows, f"{path}: line {number}")
    return rows


def _json(path: Path) -> list[Row]:
    """One object a line, a list of objects, or SQuAD's own nesting: data → paragraphs → questions."""
    text = path.read_text("utf-8-sig")
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return _json_lines(path)
    if isinstance(whole, dict) and isinstance(whole.get("data"), list):
        try:
            return [_question(p, qa) for item in whole["data"] for p in item["paragraphs"] for qa in p["qas"]]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} is neither rows nor SQuAD's JSON (data, paragraphs, qas)") from error
    rows = whole if isinstance(whole, list) else [whole]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path}: entry {number} is not a JSON object")
        _same_columns([rows[0], row], f"{path}: entry {number}")
    return rows


def _question(paragraph: Row, question: Row) -> Row:
    """A row of SQuAD as the hub has it."""
    answers = question["answers"]
    texts = {"text": [answer["text"] for answer in answers], "answer_start": [a["answer_start"] for a in answers]}
    return {"context": paragraph["context"], "question": question["question"], "answers": texts}


def _json_row(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); a .jsonl file holds one object a line") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object; a .jsonl file holds one object a line")
    return row


def _same_columns(rows: list[Row], where: str) -> None:
    first, last = rows[0], rows[-1]
    if last.keys() != first.keys():
        raise InputError(f"{where} has the columns {_listed(last)}, the first row has {_listed(first)}")


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names) or "none"


def _csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise InputError(f"{path}: line 1 names a column twice: {_listed(header)}")
            return [dict(zip(header, cells, strict=True)) for cells in _full_cells(path, reader, len(header))]
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num} is not csv ({error}); is a quote left open?") from error


def _full_cells(path: Path, reader: Any, columns: int) -> Iterator[list[str]]:
    for cells in reader:
        if cells and len(cells) != columns:
            raise InputError(f"{path}: line {reader.line_num} has {len(cells)} cells, the header has {columns}")
        if cells:
            yield cells


def _parquet(path: Path) -> list[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows: list[Row] = file.read().to_pylist()
    except ArrowException as error:
        raise InputError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from error
    return rows


def _text(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig") as lines:
        return [{"text": line.rstrip("\n")} for line in lines if line.strip()]


def _conll(path: Path) -> list[Row]:
    """Columns separated by white space: a word a line, its tag in the last column, a blank line between sentences."""
    rows: list[Row] = []
    words: list[str] = []
    tags: list[str] = []
    # Only blanks and tabs part columns, only line ends part words: a word may hold any other white space.
    for number, line in enumerate([*path.read_text("utf-8-sig").split("\n"), ""], start=1):
        cells = re.split(r"[ \t]+", text) if (text := line.strip(" \t\r")) else []
        if cells and cells[0] != "-DOCSTART-":
            if len(cells) < 2:
                raise InputError(f"{path}: line {number} has one column; CoNLL columns are a word … and its tag")
            words.append(cells[0])
            tags.append(cells[-1])
        elif words:
            rows.append({"tokens": words, "tags": tags})
            words, tags = [], []
    return rows


def read_text(path: Path) -> str:
    """A whole text file. Raises InputError when it is not UTF-8 or cannot be read."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: line {_line_of(path, error)} is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
    ".conll": _conll,
}
"""What reads a local file, by suffix."""


def find_text_columns(rows: Sequence[Row], source: str, asked: Sequence[str] = ()) -> tuple[str, ...]:
    """The column that holds the texts, or the two that hold pairs: those `asked` for, else the usual ones.

    Raises InputError naming the columns present, UsageError when more than two are asked for.
    """
    present = rows[0]
    if len(asked) > 2:
        raise UsageError(f"at most two text columns make an input, not {len(asked)}: {', '.join(asked)}")
    for columns in [tuple(asked)] if asked else TEXT_COLUMNS:
        if all(column in present for column in columns):
            return columns
    what = ", ".join(asked) or "that holds text"
    raise InputError(f"{source} has no column {what}; it has {_listed(present)}: name the text's with --text-column")


def texts_of(rows: Sequence[Row], columns: tuple[str, ...], source: str, *, skip_missing: bool = False) -> Texts:
    """The texts in one column, or the pairs in two.

    Raises InputError for a cell that holds no text; with `skip_missing`, rows with an empty cell (None) are left out.
    """
    texts = [
        [_cell(_joined(row[column], column), f"{source}: row {number}, column {column}") for column in columns]
        for number, row in enumerate(rows, start=1)
        if not (skip_missing and any(row[column] is None for column in columns))
    ]
    if len(columns) == 1:
        return [first for (first,) in texts]
    return [(first, second) for first, second in texts]


def _joined(value: Any, column: str) -> Any:
    """The words of a tagged sentence are a text too."""
    words = column in WORD_COLUMNS and isinstance(value, list) and all(isinstance(word, str) for word in value)
    return " ".join(value) if words else value


def _cell(value: Any, where: str) -> str:
    if isinstance(value, str):
        return unicode(value, where)
    raise InputError(f"{where} holds {type(value).__name__}, not text; name the text's column with --text-column")


def unicode(text: str, where: str) -> str:
    """`text` itself. Raises InputError where it holds half a character, as JSON can spell it: "\\ud83d" alone."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise InputError(f"{where} holds {half}, half a character (a lone surrogate); correct the file") from error
    return text


def split_file(data: Path, split: Split, other: str | None = None) -> Path | None:
    """The file of `split` in a data folder (`train.*`; `validation.*`, `dev.*` or `val.*`; `test.*`), or None.

    A file named `other` comes first: some tasks have several validation splits.

    A `data` that is a file is the split itself, whichever is asked for. Raises InputError when `data` does not exist or
    when several files of the folder could be the split.
    """
    if data.is_file():
        return data
    if not data.is_dir():
        raise InputError(f"no data at {data}: neither a file nor a folder")
    for names in [(other,)] * bool(other) + [SPLIT_NAMES[split]]:
        found = [path for name in names for suffix in READERS if (path := data / f"{name}{suffix}").is_file()]
        if found:
            break
    if len(found) > 1:
        raise InputError(f"{data} holds several files for {split}: {_listed(path.name for path in found)}; keep one")
    return found[0] if found else None


def hub_name(text: str) -> tuple[str, str | None] | None:
    """`org/name` or `org/name:config` as the names of a hub data set and of its config; None for a local path.

    What exists here is local, and so is what lies in a folder that exists, or ends like a file of rows.
    """
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w.-]+))?", text)
    path = Path(text)
    if match is None or path.exists() or Path(path.parts[0]).exists() or path.suffix.lower() in READERS:
        return None
    return match[1], match[2]


def hub_rows(repo: str, config: str | None, split: str, limit: int | None = None) -> list[Row]:
    """The first `limit` rows (all, when None) of a split of a hub data set, fetched into the hub's own cache.

    Without a connection the cache alone is asked. Raises UnavailableError when the data are in neither place,
    InputError when the hub has no such data set, config or split.
    """
    import datasets

    name = f"{repo} ({config})" if config else repo
    try:
        with _patience(repo):
            table = datasets.load_dataset(repo, config, split=split)
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise InputError(f"hub data {name} cannot be used for split {split}: {_first_line(error)}") from error
    except ConnectionError as error:
        raise UnavailableError(
            f"hub data {name} cannot be fetched: the hub is not reachable; pass local files with --data"
        ) from error
    except OSError as error:
        raise UnavailableError(
            f"hub data {name} cannot be stored: {_first_line(error)}; pass local files with --data"
        ) from error
    rows: list[Row] = table.select(range(min(len(table), len(table) if limit is None else limit))).to_list()
    return rows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _patience(repo: str) -> Iterator[None]:
    """One short question to the hub; while it does not answer, `datasets` is told to look in its cache only.

    `datasets` by itself asks six times over 23 seconds, with a line of log for each.
    """
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or not _answers(repo)
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _answers(repo: str) -> bool:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().dataset_info(repo, timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        return True
    except Exception:  # whatever a proxy, a resolver or a transport can raise means the same here
        return False
    return True
