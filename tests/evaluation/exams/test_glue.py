"""The table of GLUE's tasks against the features of its hub data, and their scores against scikit-learn."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sklearn import metrics

from qtool.errors import InputError, UsageError
from qtool.evaluation import tasks
from qtool.evaluation.exams import EXAMS
from qtool.evaluation.result import Evaluation
from qtool.evaluation.runner import evaluate, options_for
from qtool.evaluation.tasks import TASKS, load_examples, task

# Columns, names of the `ClassLabel` in their order (None: a float), and config, as the data set card of nyu-mll/glue on
# the hub gives them (https://huggingface.co/datasets/nyu-mll/glue); scores as in Wang et al. 2019, table 1.
HUB: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None, str, str]] = {
    "sst2": (("sentence",), ("negative", "positive"), "sst2", "accuracy"),
    "cola": (("sentence",), ("unacceptable", "acceptable"), "cola", "matthews_correlation"),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "mrpc", "f1"),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), "qqp", "f1"),
    "stsb": (("sentence1", "sentence2"), None, "stsb", "pearson"),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "mnli", "accuracy"),
    "mnli-mm": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "mnli", "accuracy"),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment"), "qnli", "accuracy"),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment"), "rte", "accuracy"),
    "wnli": (("sentence1", "sentence2"), ("not_entailment", "entailment"), "wnli", "accuracy"),
}
CLASSES = [name for name, entry in HUB.items() if entry[1]]
SKLEARN = {
    "accuracy": metrics.accuracy_score,
    "matthews_correlation": metrics.matthews_corrcoef,
    "f1": metrics.f1_score,
}


@pytest.mark.parametrize("name", HUB)
def test_the_table_is_that_of_the_hub(name: str) -> None:
    columns, labels, config, metric = HUB[name]
    entry = task(name)
    assert (entry.repo, entry.config, entry.label_column) == ("nyu-mll/glue", config, "label")
    assert (entry.text_columns, entry.labels, entry.metric) == (columns, labels, metric)
    assert entry.kind == ("sequence-classification" if labels else "regression")


def test_nothing_of_glue_is_forgotten() -> None:
    assert {entry.name for entry in TASKS.values() if entry.repo == "nyu-mll/glue"} == set(HUB)
    assert {entry.kind for entry in TASKS.values()} == set(EXAMS)


@pytest.mark.parametrize(
    ("name", "split", "asked"),
    [
        ("mnli", "validation", "validation_matched"),
        ("mnli", "test", "test_matched"),
        ("mnli", "train", "train"),
        ("mnli-mm", "validation", "validation_mismatched"),
        ("mnli-mm", "test", "test_mismatched"),
        ("mnli-mm", "train", "train"),
        ("rte", "validation", "validation"),
    ],
)
def test_splits_are_asked_for_by_the_hubs_names(
    monkeypatch: pytest.MonkeyPatch, name: str, split: Any, asked: str
) -> None:
    calls: list[tuple[Any, ...]] = []

    def stand_in(*arguments: Any) -> list[dict[str, Any]]:
        calls.append(arguments)
        return [{column: "w1" for column in HUB[name][0]} | {"label": 1, "idx": 0}]

    monkeypatch.setattr(tasks, "hub_rows", stand_in)
    examples = load_examples(task(name), None, split, 7)
    assert calls == [("nyu-mll/glue", HUB[name][2], asked, 7)]
    assert (examples.source, examples.labels) == (f"nyu-mll/glue/{HUB[name][2]}", [1])
    # Another data set of the hub has names of its own.
    load_examples(task(name), "someone/other:config", split)
    assert calls[1] == ("someone/other", "config", split, None)


def test_local_files_may_have_the_hubs_names(zoo: Any) -> None:
    row = {"premise": "w1", "hypothesis": "w2", "label": 0}
    for place, name in enumerate(("validation_matched", "validation_mismatched", "train")):
        zoo.table(f"mnli/{name}.jsonl", [row] * (place + 1))
    folder = zoo.folder / "mnli"
    assert [len(load_examples(task(name), folder, "validation")) for name in ("mnli", "mnli-mm")] == [1, 2]
    assert [len(load_examples(task(name), folder, "train")) for name in ("mnli", "mnli-mm")] == [3, 3]
    zoo.table("plain/validation.jsonl", [row] * 5)
    assert len(load_examples(task("mnli-mm"), zoo.folder / "plain", "validation")) == 5
    with pytest.raises(InputError, match="no data for validation"):
        load_examples(task("rte"), folder, "validation")


def rows_of(name: str, texts: Any, labels: list[int]) -> list[dict[str, Any]]:
    columns = HUB[name][0]
    cells = [(text,) if isinstance(text, str) else text for text in texts]
    triples = enumerate(zip(cells, labels, strict=True))
    return [{**dict(zip(columns, cell, strict=True)), "label": label, "idx": i} for i, (cell, label) in triples]


@pytest.mark.parametrize("name", CLASSES)
def test_scores_are_those_of_scikit_learn(zoo: Any, name: str) -> None:
    columns, labels, _, _ = HUB[name]
    assert labels is not None
    entry, size = task(name), len(labels)
    model, other = zoo.make("m", labels=labels), zoo.make("noisy", labels=labels, change=zoo.noise(0.02))
    one, two = zoo.sentences(90), zoo.sentences(90, seed=1)
    texts = one if len(columns) == 1 else list(zip(one, two, strict=True))
    theirs, ours = (zoo.plain(folder, texts).argmax(1).tolist() for folder in (model, other))
    truth = [(label + (index % 7 == 0)) % size for index, label in enumerate(theirs)]
    data = zoo.table("data.jsonl", rows_of(name, texts, truth))
    result = evaluate(other, entry, data=data, baseline=model)
    assert result.baseline is not None and result.interval is not None and result.metric == entry.metric
    for score, ids in ((result.baseline, theirs), (result.candidate, ours)):
        values = {entry.metric: score.value, **score.others}
        assert list(values) == list(entry.metrics)
        for metric, value in values.items():
            assert value == pytest.approx(100 * SKLEARN[metric](truth, ids), abs=1e-9)
    assert result.agreement == pytest.approx(100 * metrics.accuracy_score(theirs, ours), abs=1e-9)
    assert result.drop == pytest.approx(result.baseline.value - result.candidate.value, abs=1e-9)
    assert result.interval[0] <= result.drop <= result.interval[1]
    assert [row["candidate"] for row in result.predictions] == [labels[index] for index in ours]
    again = Evaluation.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert again.to_json() == result.to_json() and again.candidate == result.candidate
    named = zoo.table("named.jsonl", rows_of(name, texts, [labels[index] for index in truth]))  # type: ignore[misc]
    assert evaluate(other, entry, data=named).candidate.value == result.candidate.value


@pytest.mark.parametrize("architecture", ["GPT2ForSequenceClassification", "LlamaForSequenceClassification"])
def test_decoders_classify_by_their_last_token(zoo: Any, architecture: str) -> None:
    """Also when neither config nor tokenizer has a padding token, as theirs usually have none."""

    def spread(model: Any) -> None:
        ids = torch.randint(5, 65, (200, 8), generator=torch.Generator().manual_seed(0))
        weights = model.score.weight
        # Two opposite rows: about as many texts on either side.
        weights[1] = -weights[0]
        last = model(input_ids=ids).logits[:, 0]
        assert 20 < int((last > 0).sum()) < 180

    model = zoo.causal("m", architecture, labels=("negative", "positive"), change=spread)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    texts = zoo.sentences(40)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    own = transformers.AutoTokenizer.from_pretrained(model)
    with torch.no_grad():
        wanted = [int(plain(**own(text, return_tensors="pt")).logits[0].argmax()) for text in texts]
    data = zoo.table("data.jsonl", rows_of("sst2", texts, [0] * 40))
    for size in (1, 7, 32):
        found = evaluate(model, task("sst2"), data=data, batch_size=size).predictions
        assert [row["candidate"] for row in found] == [("negative", "positive")[index] for index in wanted]


@pytest.mark.parametrize("name", CLASSES)
def test_options_of_other_tasks_are_refused(name: str, tmp_path: Path) -> None:
    for option in ("stride", "doc_stride", "n_best"):
        with pytest.raises(UsageError, match=f"^--{option.replace('_', '-')} has no meaning for task '{name}'$"):
            options_for([task(name), task("rte")], {option: 2})
        with pytest.raises(UsageError, match="has no meaning"):  # before the model is looked for
            evaluate(tmp_path / "nowhere", task(name), data=tmp_path, **{option: 2})
    for option in ("batch_size", "max_length", "limit", "threads"):
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} must be at least 1, not 0"):
            evaluate(tmp_path / "nowhere", task(name), data=tmp_path, **{option: 0})
