"""Where calibration text comes from, and how it becomes batches."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from qtool.api import calibration_batches, open_job, resolve_recipe
from qtool.calibrate.sources import builtin_sentences, file_texts, random_tokens, tokenize, windows
from qtool.errors import InputError
from qtool.evaluation.tasks import load_texts, task
from qtool.job import Job
from qtool.rows import TEXT_COLUMNS

ROWS = [{"id": index, "body": f"w{index} w1", "label": index % 2} for index in range(7)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_parquet,
}  # fmt: skip


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_text_column_of_a_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path, ROWS)
    assert file_texts(path, "body") == [row["body"] for row in ROWS]
    with pytest.raises(InputError, match=r"no column that holds text; it has id, body, label: name .* --text-column"):
        file_texts(path)
    with pytest.raises(InputError, match=r"no column text; it has id, body, label"):
        file_texts(path, "text")


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("columns", TEXT_COLUMNS)
def test_usual_columns_are_those_of_a_task(suffix: str, columns: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    rows = [("a b", "d"), ("c", "e")]
    WRITERS[suffix](path, [{"label": 1, **dict(zip(columns, row, strict=False))} for row in rows])
    assert file_texts(path) == (rows if len(columns) == 2 else ["a b", "c"])
    assert load_texts(task("classification"), path, "train") == file_texts(path)


def test_lines_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_text("one\n\n  \ntwo three\nfour")
    assert file_texts(path) == ["one", "two three", "four"]


def test_missing_cells_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [{"text": "a"}, {"text": None}, {"text": "b"}])
    assert file_texts(path) == load_texts(task("classification"), path, "train") == ["a", "b"]


@pytest.mark.parametrize("value", [5, 1.5, True, ["a"], {"a": "b"}])
def test_a_cell_without_text_is_refused_with_its_row(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [{"text": None}, {"text": "a"}, {"text": value}])
    for texts in (lambda: file_texts(path), lambda: load_texts(task("classification"), path, "train")):
        with pytest.raises(InputError, match=rf"row 3, column text holds {type(value).__name__}, not text"):
            texts()


def test_half_a_character_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "a \\ud83d b"}\n')
    with pytest.raises(InputError, match=r"data\.jsonl: row 2, column text holds \\ud83d, half a character") as error:
        file_texts(path)
    assert "\n" not in str(error.value) and str(error.value).isascii()


@pytest.fixture(scope="session")
def tokenizer(shelf: Any) -> Any:
    return transformers.AutoTokenizer.from_pretrained(shelf.make("for-tokens"))


def test_batches_hold_the_first_samples_in_order(tokenizer: Any, shelf: Any) -> None:
    texts = shelf.sentences(25)
    found = tokenize(tokenizer, texts, num_samples=10, batch_size=4, max_length=8, description="things")
    assert [len(batch["input_ids"]) for batch in found.batches] == [4, 4, 2]
    assert sum(len(batch["input_ids"]) for batch in found.batches) == 10
    assert found.description == "10 of things"
    rows = [row for batch in found.batches for row in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    for text, (ids, mask) in zip(texts, rows, strict=False):
        expected = tokenizer(text, truncation=True, max_length=8)["input_ids"]
        assert ids[mask.bool()].tolist() == expected
        assert ids[~mask.bool()].eq(tokenizer.pad_token_id).all()
    assert found.num_tokens == sum(len(tokenizer(t, truncation=True, max_length=8)["input_ids"]) for t in texts[:10])


def test_blank_texts_are_no_samples(tokenizer: Any) -> None:
    found = tokenize(
        tokenizer, ["", "w1", "  ", "w2", "w3"], num_samples=2, batch_size=8, max_length=8, description="things"
    )
    assert tokenizer.batch_decode(found.batches[0]["input_ids"], skip_special_tokens=True) == ["w1", "w2"]


@pytest.mark.parametrize("texts", [[], ["", "   "], [("", "w1")]])
def test_empty_data_is_refused(tokenizer: Any, texts: list[Any]) -> None:
    with pytest.raises(InputError, match="calibration data is empty: things"):
        tokenize(tokenizer, texts, num_samples=4, batch_size=4, max_length=8, description="things")


def test_pairs_become_one_input(tokenizer: Any) -> None:
    pairs = [("w1 w2", "w3"), ("w4", "w5 w6 w7")]
    found = tokenize(tokenizer, pairs, num_samples=9, batch_size=9, max_length=16, description="pairs")
    (batch,) = found.batches
    for row, (first, second) in enumerate(pairs):
        mask = batch["attention_mask"][row].bool()
        alone = tokenizer(first, second)
        assert batch["input_ids"][row][mask].tolist() == alone["input_ids"]
        assert batch["token_type_ids"][row][mask].tolist() == alone["token_type_ids"]


@pytest.mark.parametrize("text", ["w1 w2 w3", ("w1 w2", "w3 w4")])
def test_a_length_without_room_for_text_is_refused(tokenizer: Any, text: Any) -> None:
    least = 3 if isinstance(text, str) else 4
    for length in range(1, 6):
        arguments = {"num_samples": 1, "batch_size": 1, "max_length": length, "description": "things"}
        if length < least:
            with pytest.raises(InputError, match=f"maximum length of {length} leaves no room .* at least {least}"):
                tokenize(tokenizer, [text], **arguments)
        else:
            (batch,) = tokenize(tokenizer, [text], **arguments).batches
            assert batch["input_ids"].shape == (1, min(length, 5 if least == 3 else 7))


@pytest.mark.parametrize(("types", "kept"), [(None, True), (2, True), (1, False), (0, False)])
def test_token_types_that_the_model_does_not_have_are_dropped(tokenizer: Any, types: int | None, kept: bool) -> None:
    found = tokenize(
        tokenizer,
        [("w1", "w2")],
        num_samples=1,
        batch_size=1,
        max_length=8,
        description="things",
        type_vocab_size=types,
    )
    assert ("token_type_ids" in found.batches[0]) == kept


def test_the_digest_is_of_the_tokens(tokenizer: Any) -> None:
    def digest(texts: list[str], size: int = 4, length: int = 8) -> str:
        return tokenize(
            tokenizer, texts, num_samples=9, batch_size=size, max_length=length, description="things"
        ).digest  # fmt: skip

    texts = ["w1 w2", "w3 w4 w5 w6", "w7"]
    assert digest(texts) == digest(list(texts))
    others = [digest(texts[::-1]), digest(texts, size=2), digest(texts, length=4), digest([*texts, "w8"])]
    assert len({digest(texts), *others}) == 5


def test_a_small_batch_from_the_front(tokenizer: Any) -> None:
    texts = ["w1 w2 w3 w4 w5 w6", "w1", "w2"]
    found = tokenize(tokenizer, texts, num_samples=3, batch_size=3, max_length=16, description="things")
    small = found.first(2, 4)
    assert small["input_ids"].shape == (2, 4)
    assert torch.equal(small["input_ids"], found.batches[0]["input_ids"][:2, :4])
    assert small.keys() == found.batches[0].keys()


def test_random_tokens_are_in_range_and_seeded() -> None:
    arguments = {"num_samples": 50, "batch_size": 16, "max_length": 20}
    found = random_tokens(30, **arguments, seed=1, first_id=10)
    assert [tuple(batch["input_ids"].shape) for batch in found.batches] == [(16, 20)] * 3 + [(2, 20)]
    ids = torch.cat([batch["input_ids"] for batch in found.batches])
    assert (int(ids.min()), int(ids.max())) == (10, 29)
    assert all(batch["attention_mask"].all() for batch in found.batches)
    assert random_tokens(30, **arguments, seed=1, first_id=10).digest == found.digest
    assert random_tokens(30, **arguments, seed=2, first_id=10).digest != found.digest


def test_our_own_sentences() -> None:
    sentences = builtin_sentences()
    assert len(sentences) == len(set(sentences)) == 500
    assert all(sentence == sentence.strip() and sentence for sentence in sentences)


def job(model: Path, *sets: str, task: str | None = None, data: Path | None = None) -> Job:
    flags = {"task": task, "data": data} if task else {}
    return open_job(str(model), resolve_recipe(methods=["zeroquant"], sets=sets, flags=flags))


def decoded(model: Path, found: Any) -> list[str]:
    own = transformers.AutoTokenizer.from_pretrained(model)
    texts: list[str] = []
    for batch in found.batches:
        texts += own.batch_decode(batch["input_ids"], skip_special_tokens=True)
    return texts


def test_the_training_split_of_a_task(tiny: Any) -> None:
    found = calibration_batches(job(tiny.model, "calibration.num_samples=20", task="sst2", data=tiny.data))
    lines = (tiny.data / "train.jsonl").read_text().splitlines()
    assert decoded(tiny.model, found) == [json.loads(line)["sentence"] for line in lines[:20]]
    assert found.description == "20 of the training split of sst2"


def test_without_data_our_own_sentences_are_used(tiny: Any) -> None:
    found = calibration_batches(job(tiny.model))
    assert found.description == "256 of qtool's own 500 sentences"
    assert sum(len(batch["input_ids"]) for batch in found.batches) == 256


def test_a_file_and_a_folder(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("w1 w2\nw3\n")
    (tmp_path / "notes.md").write_text("w4")
    for source in (tmp_path, tmp_path / "train.txt"):
        found = calibration_batches(job(tiny.model, f"calibration.source={source}"))
        assert decoded(tiny.model, found) == ["w1 w2", "w3"]
        assert found.description == "2 of the rows of train.txt"
    (tmp_path / "train.txt").unlink()
    with pytest.raises(InputError, match="has no train file"):
        calibration_batches(job(tiny.model, f"calibration.source={tmp_path}"))
    with pytest.raises(InputError, match="no data at"):
        calibration_batches(job(tiny.model, f"calibration.source={tmp_path / 'absent.jsonl'}"))


def test_random_tokens_on_request(tiny: Any, shelf: Any) -> None:
    found = calibration_batches(job(tiny.model, "calibration.source=random", "calibration.max_length=9"))
    vocabulary = transformers.AutoConfig.from_pretrained(tiny.model).vocab_size
    ids = torch.cat([batch["input_ids"] for batch in found.batches])
    assert ids.shape == (256, 9)
    assert int(ids.max()) < vocabulary
    bare = shelf.make("no-tokenizer", words=None)
    made = calibration_batches(job(bare, "calibration.source=random")).batches
    assert sum(len(batch["input_ids"]) for batch in made) == 256
    with pytest.raises(InputError, match="has no tokenizer files"):
        calibration_batches(job(bare))


@pytest.mark.parametrize(("architecture", "longest"), [("BertModel", 40), ("RobertaModel", 39)])
def test_texts_are_cut_to_the_positions_of_the_model(architecture: str, longest: int, zoo: Any) -> None:
    """RoBERTa counts positions from the padding index + 1, so its table of 40 takes one token less."""
    model = zoo.make("short", architecture)
    (zoo.folder / "long.txt").write_text(" ".join(["w1"] * 200))
    for source in (str(zoo.folder / "long.txt"), "random"):
        found = calibration_batches(job(model, f"calibration.source={source}"))
        assert found.batches[0]["input_ids"].shape[1] == longest
        loaded = getattr(transformers, architecture).from_pretrained(model)
        with torch.no_grad():
            loaded(**found.first(2, longest))


def test_a_tokenizer_of_another_model(shelf: Any) -> None:
    model = shelf.make("too-small", words=[f"w{index}" for index in range(200)])
    with pytest.raises(InputError, match="the tokenizer has 205 tokens, the model only 65"):
        calibration_batches(job(model))


def test_a_tokenizer_that_cannot_pad_is_refused(zoo: Any) -> None:
    own = transformers.AutoTokenizer.from_pretrained(zoo.make("m"))
    own.pad_token = None
    with pytest.raises(InputError, match="neither a padding nor an end-of-text token"):
        tokenize(own, ["w1"], num_samples=1, batch_size=1, max_length=8, description="d")


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(("num_samples", "max_length", "shape"), [(3, 4, (3, 4)), (9, 5, (4, 5)), (2, 99, (1, 24))])
def test_windows_are_cut_from_one_running_text(num_samples: int, max_length: int, shape: tuple[int, int]) -> None:
    texts = ["one two\n", ("three", "four"), "", "five"]
    found = windows(
        Letters(), texts, num_samples=num_samples, batch_size=2, max_length=max_length, description="letters"
    )
    assert [len(batch["input_ids"]) for batch in found.batches] == [2] * (shape[0] // 2) + [1] * (shape[0] % 2)
    ids = torch.cat([batch["input_ids"] for batch in found.batches])
    assert ids.shape == shape and found.num_tokens == ids.numel()
    assert "one two\nthree\nfour\n\nfive".startswith("".join(map(chr, ids.flatten())))
    assert found.description == f"{shape[0]} windows of {shape[1]} tokens of letters"


@pytest.mark.parametrize("texts", [[], ["", " \n"]])
def test_windows_of_nothing_are_refused(texts: list[str]) -> None:
    with pytest.raises(InputError, match="calibration data is empty: blanks"):
        windows(Letters(), texts, num_samples=1, batch_size=1, max_length=4, description="blanks")
