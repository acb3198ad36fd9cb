import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qtool.errors import InputError, UnavailableError, UsageError
from qtool.evaluation.metrics import METRICS
from qtool.evaluation.tasks import TASKS, canonical, load_examples, load_rows, load_texts, task


def table(tmp_path: Path, *rows: dict[str, Any], name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_table_is_sound() -> None:
    for name, entry in TASKS.items():
        assert entry.name == name and entry.metric in METRICS
        assert task(name) is entry


def test_unknown_tasks_get_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="unknown task 'sst'; did you mean sst2"):
        task("sst")


def test_case_dashes_and_underscores_of_a_name_do_not_count() -> None:
    spellings = {"wikitext2": "wikitext-2", "WikiText_2": "wikitext-2", "SST-2": "sst2", "mnli_mm": "mnli-mm"}
    for spelling, name in spellings.items():
        assert task(spelling) is TASKS[name]
        assert canonical(spelling) == name
    assert task("mnli") is TASKS["mnli"] and canonical("sst3") == "sst3"
    assert len({name.replace("-", "").replace("_", "").lower() for name in TASKS}) == len(TASKS)


def test_sst2_rows(tmp_path: Path) -> None:
    data = table(tmp_path, {"sentence": "a", "label": 1, "idx": 0}, {"sentence": "b", "label": 0, "idx": 1})
    examples = load_examples(task("sst2"), data, "validation")
    assert (examples.texts, examples.labels) == (["a", "b"], [1, 0])
    assert examples.label_names == ("negative", "positive")
    assert (len(examples), examples.source) == (2, str(data))


def test_folders_limits_and_texts_alone(tmp_path: Path) -> None:
    table(tmp_path, *({"sentence": str(i), "label": i % 2} for i in range(5)), name="train.jsonl")
    table(tmp_path, {"sentence": "v", "label": 1}, name="dev.jsonl")
    assert load_examples(task("sst2"), tmp_path, "train", limit=2).texts == ["0", "1"]
    assert load_examples(task("sst2"), str(tmp_path), "validation").texts == ["v"]
    with pytest.raises(InputError, match="no data for test"):
        load_examples(task("sst2"), tmp_path, "test")
    unlabelled = table(tmp_path, {"text": "t"}, name="plain.jsonl")
    assert load_texts(task("classification"), unlabelled, "train") == ["t"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a", "label": 0}, "a"),
        ({"sentence": "a", "labels": 0}, "a"),
        ({"id": "9", "label": 0, "text": "a", "title": "t"}, "a"),
        ({"premise": "a", "hypothesis": "b", "label": 0}, ("a", "b")),
        ({"sentence1": "a", "sentence2": "b", "text": "c", "label": 0}, ("a", "b")),
    ],
)
def test_usual_column_names_are_found(tmp_path: Path, row: dict[str, Any], text: Any) -> None:
    assert load_examples(task("classification"), table(tmp_path, row), "validation").texts == [text]


def test_columns_may_be_given(tmp_path: Path) -> None:
    data = table(tmp_path, {"q": "a", "r": "b", "text": "c", "y": "no", "label": 3})
    given = load_examples(task("classification"), data, "validation", text_columns=["q", "r"], label_column="y")
    assert (given.texts, given.labels, given.label_names) == ([("a", "b")], ["no"], None)
    with pytest.raises(UsageError, match="at most two"):
        load_examples(task("classification"), data, "validation", text_columns=["q", "r", "text"])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sst2", {}, ["sentence", "text, label", "--text-column"]),
        ("classification", {"text_columns": ["txt"]}, ["txt", "text, label", "--text-column"]),
        ("classification", {"label_column": "stars"}, ["stars", "text, label", "--label-column"]),
    ],
)
def test_wrong_column_names(tmp_path: Path, name: str, options: dict[str, Any], words: list[str]) -> None:
    data = table(tmp_path, {"text": "a", "label": 1})
    with pytest.raises(InputError) as error:
        load_examples(task(name), data, "validation", **options)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_a_file_without_usual_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--label-column"):
        load_examples(task("classification"), table(tmp_path, {"text": "a", "class": 1}), "validation")
    with pytest.raises(InputError, match="--text-column"):
        load_examples(task("classification"), table(tmp_path, {"body": "a", "label": 1}), "validation")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 2, 1], [0, 2, 1]),
        (["0", "1", " 1 "], [0, 1, 1]),
        ([False, True, True], [0, 1, 1]),
        ([0.0, 1.0, 2.0], [0, 1, 2]),
        (["pos", "neg", "pos"], ["pos", "neg", "pos"]),
        (["1", "2", "many"], ["1", "2", "many"]),
    ],
)
def test_spellings_of_labels(tmp_path: Path, labels: list[Any], expected: list[Any]) -> None:
    data = table(tmp_path, *({"text": "a", "label": label} for label in labels))
    assert load_examples(task("classification"), data, "validation").labels == expected


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1, -1], ["row 2", "hides", "--split"]),
        (["-1"], ["row 1", "hides"]),
        ([1, None], ["row 2", "no label"]),
        ([""], ["no label"]),
        ([0.5], ["0.5", "no class label"]),
        ([[1]], ["no class label"]),
        ([-3], ["-3", "count from 0"]),
        ([0, "pos"], ["mixes"]),
    ],
)
def test_labels_that_cannot_be(tmp_path: Path, labels: list[Any], words: list[str]) -> None:
    data = table(tmp_path, *({"text": "a", "label": label} for label in labels))
    with pytest.raises(InputError) as error:
        load_examples(task("classification"), data, "validation")
    assert all(word in str(error.value) for word in [str(data), *words])


@pytest.mark.parametrize("label", [2, "neutral"])
def test_labels_outside_the_task(tmp_path: Path, label: Any) -> None:
    data = table(tmp_path, {"sentence": "a", "label": label})
    with pytest.raises(InputError, match="0 negative, 1 positive"):
        load_examples(task("sst2"), data, "validation")


def test_names_as_labels_of_a_task(tmp_path: Path) -> None:
    data = table(tmp_path, {"sentence": "a", "label": "Positive"}, {"sentence": "b", "label": "negative"})
    assert load_examples(task("sst2"), data, "validation").labels == ["Positive", "negative"]


@pytest.mark.parametrize("value", [None, 5, ["a"]])
def test_cells_that_hold_no_text(tmp_path: Path, value: Any) -> None:
    data = table(tmp_path, {"sentence": "a", "label": 1}, {"sentence": value, "label": 1})
    with pytest.raises(InputError, match="row 2, column sentence holds"):
        load_examples(task("sst2"), data, "validation")


def test_half_a_character_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"sentence": "a", "label": 1}\n{"sentence": "a \\ud83d b", "label": 1}\n')
    with pytest.raises(InputError, match=r"row 2, column sentence holds \\ud83d, half a character"):
        load_examples(task("sst2"), path, "validation")
    path.write_text('{"text": "a", "label": "\\udc00"}\n')
    with pytest.raises(InputError, match=r"row 1, column label holds \\udc00, half a character"):
        load_examples(task("classification"), path, "validation")


def test_calibration_leaves_empty_cells_out_and_scores_need_them(tmp_path: Path) -> None:
    data = table(tmp_path, {"sentence": None, "label": 1}, {"sentence": "a", "label": 1})
    assert load_texts(task("sst2"), data, "train") == ["a"]
    with pytest.raises(InputError, match="row 1, column sentence holds NoneType"):
        load_examples(task("sst2"), data, "train")


def test_formats_agree(tmp_path: Path) -> None:
    rows = [{"sentence": "a, b", "label": 1}, {"sentence": "c", "label": 0}]
    jsonl = table(tmp_path, *rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    (tmp_path / "data.csv").write_text('sentence,label\n"a, b",1\nc,0\n')
    loaded = [load_examples(task("sst2"), jsonl.with_suffix(s), "validation") for s in (".jsonl", ".parquet", ".csv")]
    assert [(e.texts, e.labels) for e in loaded] == [(["a, b", "c"], [1, 0])] * 3


def test_where_data_come_from(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--data"):
        load_rows(task("classification"), None, "validation")
    with pytest.raises(UnavailableError, match="--data"):
        load_rows(task("sst2"), None, "validation")
    with pytest.raises(UsageError, match="at least 1"):
        load_rows(task("sst2"), table(tmp_path, {"sentence": "a", "label": 1}), "validation", limit=0)


def test_hub_rows_are_asked_for_by_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answer(*args: Any) -> list[dict[str, Any]]:
        asked.append(args)
        return [{"sentence": "a", "label": 1, "idx": 0}]

    monkeypatch.setattr("qtool.evaluation.tasks.hub_rows", answer)
    examples = load_examples(task("sst2"), None, "train", limit=7)
    assert asked == [("nyu-mll/glue", "sst2", "train", 7)]
    assert examples.source == "nyu-mll/glue/sst2"
