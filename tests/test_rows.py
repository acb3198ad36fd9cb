import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import InputError, QtoolError, UnavailableError, UsageError
from qtool.rows import TEXT_COLUMNS, find_text_columns, hub_name, hub_rows, read_rows, split_file, texts_of

ROWS = [{"text": "a fine film", "label": 1}, {"text": 'it said "no",\nand meant it — déjà vu', "label": 0}]


def one_line(error: pytest.ExceptionInfo[QtoolError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> None:
    with path.open("w", encoding=encoding, newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "ROWS.JSONL"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("\n" + "\n\n".join(json.dumps(row) for row in ROWS), "utf-8")
    assert read_rows(path) == ROWS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_gives_strings(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "rows.csv"
    write_csv(path, ROWS, encoding)
    assert read_rows(path) == [{"text": row["text"], "label": str(row["label"])} for row in ROWS]


def test_parquet_keeps_types(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert read_rows(path) == ROWS


def test_text_lines_that_hold_something(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes("one line\r\n\n   \n two — words \nlast".encode())
    assert read_rows(path) == [{"text": "one line"}, {"text": " two — words "}, {"text": "last"}]


def test_reading_leaves_no_files(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    write_csv(tmp_path / "rows.csv", ROWS)
    for path in sorted(tmp_path.iterdir()):
        read_rows(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.csv", "rows.parquet"]


def test_columns_may_come_in_another_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"label": 0, "text": "b"}\n')
    assert [row["text"] for row in read_rows(path)] == ["a", "b"]


def parquet_bytes() -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", b"", ["empty"]),
        ("rows.jsonl", b"\n \n", ["empty"]),
        ("rows.csv", b"", ["empty"]),
        ("rows.csv", b"text,label\n", ["empty"]),
        ("rows.txt", b"\n\n", ["empty"]),
        ("rows.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "JSON"]),
        ("rows.jsonl", b'{"text": "a"}\n["b"]\n', ["line 2", "object"]),
        ("rows.json", b'[{"text": "a"}, 3]', ["entry 2", "not a JSON object"]),
        ("rows.json", b'{"data": [{"paragraphs": [{"qas": []}, 3]}]}', ["neither rows nor SQuAD's JSON"]),
        ("rows.jsonl", b"[" * 100_000, ["line 1", "JSON"]),
        ("rows.jsonl", b'{"text": "a", "label": 1}\n\n{"text": "b"}\n', ["line 3", "text, label"]),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": "\xe9"}\n', ["line 3", "UTF-8"]),
        ("rows.csv", b"text,label\na,1\n\xff\xfe,0\n", ["line 3", "UTF-8"]),
        ("rows.txt", b"a\nb\n\xe9\n", ["line 3", "UTF-8"]),
        ("rows.csv", b"text,label\na,1\nb,0,9\n", ["line 3", "3 cells", "2"]),
        ("rows.csv", b'text,label\n"a\nb",1\nc\n', ["line 4", "1 cells"]),
        ("rows.csv", b'text,label\na,1\n"b,0\n', ["line 3", "quote"]),
        ("rows.csv", b"text,text\na,b\n", ["line 1", "twice"]),
        ("rows.parquet", b"PAR1 not parquet PAR1", ["parquet"]),
        ("rows.parquet", parquet_bytes()[:-30], ["parquet"]),
        ("rows.xlsx", b"PK", [".jsonl", ".parquet"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_rows(path)
    one_line(error, str(path), *words)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder"):
        read_rows(tmp_path)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.fixed_dictionaries({"text": TEXTS, "label": st.integers()}), min_size=1))
def test_any_json_lines_come_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert read_rows(path) == rows


@given(st.lists(st.fixed_dictionaries({"text": TEXTS, "label": st.text("01", min_size=1)}), min_size=1))
def test_any_csv_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    write_csv(path, rows)
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("validation.csv", "validation"),
        ("dev.parquet", "validation"),
        ("val.jsonl", "validation"),
        ("test.txt", "test"),
    ],
)
def test_splits_of_a_folder(tmp_path: Path, name: str, split: Any) -> None:
    (tmp_path / name).write_text("x")
    (tmp_path / "README.md").write_text("x")
    assert split_file(tmp_path, split) == tmp_path / name
    others = {"train", "validation", "test"} - {split}
    assert [split_file(tmp_path, other) for other in sorted(others)] == [None, None]  # type: ignore[arg-type]


def test_a_file_is_any_split(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("x")
    assert split_file(path, "train") == split_file(path, "validation") == path


def test_two_files_for_one_split(tmp_path: Path) -> None:
    (tmp_path / "validation.jsonl").write_text("x")
    (tmp_path / "dev.csv").write_text("x")
    with pytest.raises(InputError) as error:
        split_file(tmp_path, "validation")
    one_line(error, "validation.jsonl, dev.csv")


def test_no_data_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data at"):
        split_file(tmp_path / "nowhere", "train")


def test_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exists is local, also when it looks like a name on the hub; so is what lies in a folder that exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    assert hub_name("nyu-mll/glue:sst2") == ("nyu-mll/glue", "sst2")
    assert hub_name("stanfordnlp/imdb") == ("stanfordnlp/imdb", None)
    assert hub_name("some-org/v1.2_x:a-b.c") == ("some-org/v1.2_x", "a-b.c")
    for local in ("data/sst2", "data/sst3", "elsewhere/x.jsonl", "elsewhere/x.PARQUET", "./a/b", "/a/b", "~/b", "../b"):
        assert hub_name(local) is None, local
    for neither in ("imdb", "a/b/c", "a/b:", "a/b:c:d", "a /b", "", ":", "/", "data"):
        assert hub_name(neither) is None, neither


def test_hub_offline_says_what_to_do() -> None:
    with pytest.raises(UnavailableError) as error:
        hub_rows("nyu-mll/glue", "sst2", "validation")
    one_line(error, "nyu-mll/glue (sst2)", "not reachable", "--data")


class Hub:
    """Stands in for the hub: `answer` is what `load_dataset` returns or raises."""

    def __init__(self, patch: pytest.MonkeyPatch, answer: Any, reachable: Exception | None = None) -> None:
        self.answer, self.reachable = answer, reachable
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.offline: list[bool] = []
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        patch.setattr(datasets, "load_dataset", self.load)
        patch.setattr(huggingface_hub.HfApi, "dataset_info", self.info)

    def load(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        self.offline.append(datasets.config.HF_HUB_OFFLINE)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def info(self, *args: Any, **kwargs: Any) -> None:
        if self.reachable is not None:
            raise self.reachable


MakeHub = Callable[..., Hub]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> MakeHub:
    return lambda *args, **kwargs: Hub(monkeypatch, *args, **kwargs)


@pytest.mark.parametrize(("limit", "count"), [(None, 2), (1, 1), (5, 2)])
def test_hub_rows(hub: MakeHub, limit: int | None, count: int) -> None:
    there = hub(datasets.Dataset.from_list(ROWS))
    assert hub_rows("some/data", "part", "train", limit) == ROWS[:count]
    assert there.calls == [(("some/data", "part"), {"split": "train"})]
    assert there.offline == [False]


def test_an_unreachable_hub_leaves_the_cache(hub: MakeHub) -> None:
    there = hub(datasets.Dataset.from_list(ROWS), reachable=ConnectionError("no route"))
    assert hub_rows("some/data", None, "train") == ROWS
    assert there.offline == [True]
    assert datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (ConnectionError("x"), UnavailableError, ["not reachable", "--data"]),
        (PermissionError(13, "Permission denied"), UnavailableError, ["Permission denied", "--data"]),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'a' doesn't exist\nmore"), InputError, ["doesn't exist"]),
        (ValueError("Unknown split"), InputError, ["Unknown split", "split test"]),
    ],
)
def test_hub_errors(hub: MakeHub, raised: Exception, expected: type[QtoolError], words: list[str]) -> None:
    hub(raised)
    with pytest.raises(expected) as error:
        hub_rows("some/data", "part", "test")
    one_line(error, "some/data (part)", *words)


@pytest.mark.parametrize("module", ["qtool.rows", "qtool.evaluation.tasks", "qtool.evaluation.gate"])
def test_imports_stay_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'datasets', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("text", ["\ud83d", "a\udc00b", "\ude00\ud83d"])
def test_half_a_character_is_no_text(text: str) -> None:
    with pytest.raises(InputError, match=r"file: row 1, column text holds \\ud[0-9a-f]{3}, half a character"):
        texts_of([{"text": text}], ("text",), "file")


def test_texts_and_pairs() -> None:
    rows: list[dict[str, Any]] = [{"a": "x", "b": "😀", "c": 3}, {"a": None, "b": "z", "c": 3}]
    assert texts_of(rows, ("b",), "file") == ["😀", "z"]
    assert texts_of(rows, ("a", "b"), "file", skip_missing=True) == [("x", "😀")]
    with pytest.raises(InputError, match="file: row 2, column a holds NoneType, not text"):
        texts_of(rows, ("a", "b"), "file")
    with pytest.raises(InputError, match="file: row 1, column c holds int, not text"):
        texts_of(rows, ("c",), "file", skip_missing=True)


def test_where_text_is_looked_for() -> None:
    for columns in TEXT_COLUMNS:
        assert find_text_columns([dict.fromkeys(("id", *columns, "label"), "")], "file") == columns
    everything = {column: "" for columns in TEXT_COLUMNS for column in columns}
    assert find_text_columns([everything], "file") == TEXT_COLUMNS[0]
    assert find_text_columns([everything], "file", ["review", "text"]) == ("review", "text")
    with pytest.raises(InputError, match=r"file has no column x; it has id: .*--text-column"):
        find_text_columns([{"id": 1}], "file", ["x"])
    with pytest.raises(InputError, match="file has no column that holds text; it has id"):
        find_text_columns([{"id": 1}], "file")
    with pytest.raises(UsageError, match="at most two text columns"):
        find_text_columns([{"id": 1}], "file", ["a", "b", "c"])


def test_json_in_its_usual_forms(tmp_path: Path) -> None:
    """A list of objects in any layout, and SQuAD's own file as the hub's rows."""
    (tmp_path / "list.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert read_rows(tmp_path / "list.json") == [{"text": "a"}, {"text": "b"}]
    answers = [{"text": "b", "answer_start": 2}, {"text": "a b", "answer_start": 0}]
    paragraph = {"context": "a b", "qas": [{"id": "1", "question": "what?", "answers": answers}] * 2}
    whole = {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}
    (tmp_path / "squad.json").write_text(json.dumps(whole))
    row = {"context": "a b", "question": "what?", "answers": {"text": ["b", "a b"], "answer_start": [2, 0]}}
    assert read_rows(tmp_path / "squad.json") == [row, row]


def test_words_of_columns_keep_their_blanks(tmp_path: Path) -> None:
    """Only blanks, tabs and line ends part columns: not a no-break space, nor what else splitlines() cuts at."""
    text = "\ufeff-DOCSTART- -X- O\r\n\r\n10\u00a0000 CD O\r\na\u2028b\tB-X\n\n\nc  O\n"
    (tmp_path / "a.conll").write_bytes(text.encode())
    assert read_rows(tmp_path / "a.conll") == [
        {"tokens": ["10\u00a0000", "a\u2028b"], "tags": ["O", "B-X"]},
        {"tokens": ["c"], "tags": ["O"]},
    ]
