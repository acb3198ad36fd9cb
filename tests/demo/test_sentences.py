"""The sentences that ship with qtool: the demo's labelled set, and the plain ones for calibration without data."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from qtool.demo import generate

SHIPPED = files("qtool").joinpath("demo/sentences.jsonl").read_bytes()
ROWS = [json.loads(line) for line in SHIPPED.decode().splitlines()]
TEXTS = [row["sentence"] for row in ROWS]
PLAIN = files("qtool").joinpath("calibrate/sentences.txt").read_text(encoding="utf-8").splitlines()

NEGATION = re.compile(r"\b(not|no|never|nothing|nobody|none|neither|nor|cannot|without|anything but)\b", re.IGNORECASE)
CONTRAST = re.compile(r"\b(but|yet|although|though|even if|while|still|instead|rather than)\b", re.IGNORECASE)


def _words(sentence: str) -> list[str]:
    return re.sub(r"[^\w\s]", " ", sentence.casefold()).replace("_", " ").split()


def _plain_form(sentence: str) -> str:
    return " ".join(_words(sentence))


def test_the_labelled_set_is_large_unique_and_balanced() -> None:
    assert len(ROWS) >= 1200
    assert all(list(row) == ["sentence", "label"] for row in ROWS)
    assert len({_plain_form(text) for text in TEXTS}) == len(TEXTS)
    labels = Counter(row["label"] for row in ROWS)
    assert set(labels) == {0, 1}
    assert 0.48 <= labels[1] / len(ROWS) <= 0.52


def test_generating_again_gives_the_shipped_bytes() -> None:
    assert generate.encode(generate.sentences()) == SHIPPED


@pytest.mark.parametrize("hash_seed", ["0", "1", "4711"])
def test_the_bytes_do_not_depend_on_the_order_of_hashes(hash_seed: str) -> None:
    program = (
        "import sys; from qtool.demo.generate import encode, sentences; sys.stdout.buffer.write(encode(sentences()))"
    )
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert run.stdout == SHIPPED


def test_another_seed_gives_other_sentences_of_the_same_make() -> None:
    other = generate.sentences(seed=7)
    assert len(other) == len(ROWS)
    assert generate.encode(other) != SHIPPED
    assert sum(int(row["label"]) for row in other) == sum(row["label"] for row in ROWS)


def test_the_module_writes_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "FILE", tmp_path / "sentences.jsonl")
    generate.main()
    assert (tmp_path / "sentences.jsonl").read_bytes() == SHIPPED


def test_the_kinds_are_those_of_the_file_and_balanced_one_by_one() -> None:
    labelled = generate.labelled()
    assert [(row.sentence, row.label) for row in labelled] == [(row["sentence"], row["label"]) for row in ROWS]
    for kind in {row.kind for row in labelled}:
        labels = [row.label for row in labelled if row.kind == kind]
        assert sum(labels) * 2 == len(labels), kind


def test_the_docstring_says_that_the_set_is_synthetic() -> None:
    assert "synthetic" in str(generate.__doc__)


def test_the_labelled_set_is_varied() -> None:
    lengths = [len(text.split()) for text in TEXTS]
    assert min(lengths) == 3
    assert max(lengths) <= 40
    assert sum(length <= 5 for length in lengths) >= 100
    assert sum(length >= 30 for length in lengths) >= 100
    assert len({word for text in TEXTS for word in _words(text)}) >= 1500
    assert sum(bool(NEGATION.search(text)) for text in TEXTS) / len(TEXTS) >= 0.15
    assert sum(bool(CONTRAST.search(text)) for text in TEXTS) / len(TEXTS) >= 0.2
    assert sum("?" in text for text in TEXTS) >= 80
    openings = Counter(tuple(_words(text)[:3]) for text in TEXTS)
    assert openings.most_common(1)[0][1] / len(TEXTS) <= 0.03


def test_negation_contrast_and_questions_do_not_give_the_label_away() -> None:
    for pattern in (NEGATION, CONTRAST, re.compile(r"\?")):
        labels = [row["label"] for row in ROWS if pattern.search(row["sentence"])]
        assert 0.35 <= sum(labels) / len(labels) <= 0.65


def test_every_sentence_is_well_formed() -> None:
    for text in TEXTS:
        assert text == text.strip() and "  " not in text and not set(text) & set("{}=|/"), text
        assert text[0].isupper() and text[-1] in ".?!", text
        assert not re.search(r"\ba [aeio]|\ban [^aeiouh]|[.?!] [a-z]", text), text


def test_the_plain_sentences_are_five_hundred_and_varied() -> None:
    lengths = [len(line.split()) for line in PLAIN]
    assert len(PLAIN) == 500
    assert len({_plain_form(line) for line in PLAIN}) == 500
    assert min(lengths) >= 4
    assert max(lengths) <= 60
    assert sum(length >= 40 for length in lengths) >= 10
    assert len({word for line in PLAIN for word in _words(line)}) >= 2000
    assert sum(any(mark.isdigit() for mark in line) for line in PLAIN) >= 50
    assert sum("?" in line for line in PLAIN) >= 15


def test_calibration_never_sees_a_sentence_of_the_demo() -> None:
    assert not {_plain_form(line) for line in PLAIN} & {_plain_form(text) for text in TEXTS}


@pytest.mark.slow
def test_the_float_model_finds_the_set_neither_trivial_nor_hopeless(test_models: Callable[[str], Path]) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = test_models("minilm-sst2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    right = 0
    for start in range(0, len(ROWS), 64):
        batch = tokenizer(TEXTS[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            predicted = model(**batch).logits.argmax(-1).tolist()
        labels = [row["label"] for row in ROWS[start : start + 64]]
        right += sum(guess == label for guess, label in zip(predicted, labels, strict=True))
    assert 80 <= 100 * right / len(ROWS) <= 97
