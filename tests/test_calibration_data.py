"""Where calibration text comes from: files of every kind and data sets of the hub give the same model."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest

from qtool.api import resolve_recipe
from qtool.api.data import calibration_texts

Command = Callable[..., Any]
STATIC = ("-c", "zeroquant-w8a8-static", "--num-samples", "20", "-q")


@pytest.fixture
def rows(tiny: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tiny.data / "train.jsonl").read_text().splitlines()]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


class Hub:
    """Stands in for the hub, as far as `datasets` is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | None) -> None:
        self.rows, self.asked = rows, []
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets, "load_dataset", self.load)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)

    def load(self, repo: str, config: str | None, split: str) -> Any:
        self.asked.append((repo, config, split))
        if self.rows is None:
            raise ConnectionError("no route to the hub")
        return datasets.Dataset.from_list(self.rows)


def test_every_source_gives_the_same_model(
    rows: list[dict[str, Any]], tiny: Any, desk: Path, monkeypatch: pytest.MonkeyPatch, qtool_command: Command
) -> None:
    write_csv(Path("texts.csv"), rows)
    write_parquet(Path("texts.parquet"), rows)
    Path("folder").mkdir()
    write_parquet(Path("folder/train.parquet"), rows)
    Path("texts.txt").write_text("".join(row["sentence"] + "\n" for row in rows))
    hub = Hub(monkeypatch, rows)
    sources = [str(tiny.data / "train.jsonl"), "texts.csv", "texts.parquet", "folder", "texts.txt", "org/texts:part"]
    made = {}
    for index, source in enumerate(sources):
        ended = qtool_command(
            "quantize", tiny.model, *STATIC, "--set", f"calibration.source={source}", "-o", f"out{index}"
        )
        assert ended.code == 0, ended.err
        made[source] = Path(f"out{index}/model.safetensors").read_bytes()
    assert hub.asked == [("org/texts", "part", "train")]
    assert set(made.values()) == {made[sources[0]]}
    assert qtool_command("quantize", tiny.model, *STATIC, "-o", "other").code == 0
    assert Path("other/model.safetensors").read_bytes() != made[sources[0]], "the data decide the scales"
    assert "source: org/texts:part" in Path("out5/README.md").read_text()
    assert "20 of the training split of org/texts:part" in Path("out5/README.md").read_text()


def test_what_exists_here_wins(desk: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> None:
    hub = Hub(monkeypatch, rows)
    Path("org/texts").mkdir(parents=True)
    write_csv(Path("org/texts/train.csv"), [{"text": "from the folder"}])
    recipe = resolve_recipe(methods=["zeroquant"], sets=["calibration.source=org/texts"])
    assert calibration_texts(recipe) == (["from the folder"], "the rows of train.csv")
    assert hub.asked == []


def test_empty_rows_of_a_corpus_do_not_count(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["", " = Title = ", "", "One.", None, "Two."]
    Hub(monkeypatch, [{"text": line} for line in lines])
    sets = ["calibration.source=org/corpus", "calibration.num_samples=2"]
    texts, _ = calibration_texts(resolve_recipe(methods=["zeroquant"], sets=sets))
    assert [text for text in texts if text.strip()] == [" = Title = ", "One.", "Two."]


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("org/texts", 4, "no file or folder org/texts here, and hub data org/texts cannot be fetched"),
        ("missing.csv", 3, "no data at missing.csv"),
        ("here/missing", 3, "no data at here/missing"),
    ],
)
def test_sources_that_cannot_be_read(
    source: str, code: int, words: str, tiny: Any, desk: Path, monkeypatch: pytest.MonkeyPatch, qtool_command: Command
) -> None:
    Hub(monkeypatch, None)
    Path("here").mkdir()
    ended = qtool_command("quantize", tiny.model, *STATIC, "--set", f"calibration.source={source}", "-o", "out")
    assert (ended.code, len(ended.errors)) == (code, 1), ended.err
    assert words in ended.errors[0]
    assert not Path("out").exists()
