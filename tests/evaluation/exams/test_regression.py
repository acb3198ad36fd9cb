"""Numbers for texts against scipy."""

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from qtool.errors import InputError, UsageError
from qtool.evaluation.gate import Gate
from qtool.evaluation.result import Evaluation, write_predictions
from qtool.evaluation.runner import evaluate, options_for
from qtool.evaluation.tasks import task

ANY, STSB = task("regression"), task("stsb")


@pytest.fixture
def pairs(zoo: Any) -> list[tuple[str, str]]:
    return list(zip(zoo.sentences(80), zoo.sentences(80, seed=1), strict=True))


def about(values: list[float]) -> list[float]:
    """The same numbers, moved somewhat; some of them equal."""
    draw = random.Random(2)
    spread = stats.tstd(values)
    return [round(value + draw.gauss(0, spread), 1) for value in values]


def plain(zoo: Any, folder: Path, texts: Any) -> list[float]:
    found: list[float] = zoo.plain(folder, texts).double()[:, 0].tolist()
    return found


def rows_of(pairs: Any, numbers: list[Any]) -> list[dict[str, Any]]:
    both = enumerate(zip(pairs, numbers, strict=True))
    return [{"sentence1": a, "sentence2": b, "label": number, "idx": i} for i, ((a, b), number) in both]


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_numbers_are_those_of_scipy(zoo: Any, pairs: Any, architecture: str) -> None:
    model = zoo.make("m", architecture, num_labels=1)
    other = zoo.make("noisy", architecture, num_labels=1, change=zoo.noise(0.02))
    theirs, ours = plain(zoo, model, pairs), plain(zoo, other, pairs)
    truth = about(theirs)
    data = zoo.table("data.jsonl", rows_of(pairs, truth))
    found = [evaluate(other, STSB, data=data, baseline=model, batch_size=size) for size in (1, 9, 100)]
    for result in found:
        assert (result.n, result.metric, result.agreement) == (80, "pearson", None)
        for score, values in ((result.baseline, theirs), (result.candidate, ours)):
            assert score is not None
            assert score.value == pytest.approx(100 * stats.pearsonr(values, truth).statistic, abs=1e-4)
            assert score.others == {"spearman": pytest.approx(100 * stats.spearmanr(values, truth).statistic, abs=1e-4)}
        # Batches of other shapes, in float32.
        assert [row["candidate"] for row in result.predictions] == pytest.approx(ours, abs=1e-4)
        assert [row["label"] for row in result.predictions] == truth
        # On the numbers that the run itself wrote down, to the last bits.
        written = [row["candidate"] for row in result.predictions]
        assert result.candidate.value == pytest.approx(100 * stats.pearsonr(written, truth).statistic, abs=1e-9)
        assert result.drop is not None and result.interval is not None
        assert result.interval[0] < result.drop < result.interval[1]


def test_any_texts_with_numbers(zoo: Any, pairs: Any, tmp_path: Path) -> None:
    model = zoo.make("m", num_labels=1)
    texts = [first for first, _ in pairs]
    truth = about(plain(zoo, model, texts))
    wanted = 100 * stats.pearsonr(plain(zoo, model, texts), truth).statistic
    for column in ("label", "score", "points"):
        path = tmp_path / f"{column}.csv"
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([["text", column], *zip(texts, truth, strict=True)])
        given = {"label_column": "points"} if column == "points" else {}
        assert evaluate(model, ANY, data=path, **given).candidate.value == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(("value", "why"), [("good", "holds 'good'"), (None, "holds None"), (math.inf, "holds inf")])
def test_labels_that_are_no_numbers(zoo: Any, value: Any, why: str) -> None:
    model = zoo.make("m", num_labels=1)
    data = zoo.table("data.jsonl", rows_of([("w1", "w2"), ("w3", "w4")], [1.5, value]))
    with pytest.raises(InputError, match=rf"data\.jsonl: row 2, column label {why}, which is no number"):
        evaluate(model, STSB, data=data)


def test_hidden_labels(zoo: Any) -> None:
    """As in the test split of GLUE's stsb; a −1 among others is a number."""
    model = zoo.make("m", num_labels=1)
    pairs = [("w1", "w2"), ("w3", "w4"), ("w5", "w6")]
    with pytest.raises(InputError, match=r"column label is -1 throughout: this split hides its labels"):
        evaluate(model, STSB, data=zoo.table("hidden.jsonl", rows_of(pairs, [-1.0, -1.0, -1.0])))
    assert evaluate(model, ANY, data=zoo.table("data.jsonl", rows_of(pairs, [-1.0, 1.0, -1.0]))).n == 3


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "b", "c")])
def test_heads_with_classes_are_refused(zoo: Any, labels: tuple[str, ...]) -> None:
    model, right = zoo.make("classes", labels=labels), zoo.make("m", num_labels=1)
    data = zoo.table("data.jsonl", rows_of([("w1", "w2")], [1.0]))
    why = rf"classes has {len(labels)} classes, and task 'stsb' wants a head with one output"
    for models in ({"model": model}, {"model": right, "baseline": model}):
        with pytest.raises(InputError, match=why):
            evaluate(task=STSB, data=data, **models)
    with pytest.raises(InputError, match="task 'regression' takes a …ForSequenceClassification"):
        evaluate(zoo.make("bare", "BertModel"), ANY, data=data)
    with pytest.raises(InputError, match="a regression head"):
        evaluate(right, task("mrpc"), data=zoo.table("classes.jsonl", rows_of([("w1", "w2")], [1])))
    for option in ("stride", "doc_stride", "n_best"):
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} has no meaning for task 'stsb'"):
            options_for([STSB], {option: 3})


def test_gates(zoo: Any, pairs: Any) -> None:
    model = zoo.make("m", num_labels=1)
    data = zoo.table("data.jsonl", rows_of(pairs, about(plain(zoo, model, pairs))))
    result = evaluate(model, STSB, data=data, baseline=model)
    assert Gate(max_drop=0, min_score=result.candidate.value).failures(result) == []
    assert result.kl is None
    with pytest.raises(UsageError, match="KL divergence has no meaning for task 'stsb'; leave out max-kl"):
        Gate(max_kl=1).check([STSB])
    assert Gate(min_agreement=0).failures(result) == [
        "min-agreement: agreement has no meaning for task 'stsb', limit 0 %"
    ]
    alone = evaluate(model, STSB, data=data)
    assert Gate(min_agreement=0).failures(alone) == [
        "min-agreement: agreement was not measured (no baseline), limit 0 %"
    ]


def test_nan_and_weak_baselines(zoo: Any, pairs: Any) -> None:
    def spoil(broken: Any) -> None:
        broken.bert.embeddings.word_embeddings.weight[5 + 59] = math.nan

    model = zoo.make("m", num_labels=1)
    broken = zoo.make("broken", num_labels=1, change=spoil)
    truth = about(plain(zoo, model, pairs))
    data = zoo.table("data.jsonl", rows_of(pairs, truth))
    result = evaluate(broken, STSB, data=data, baseline=model)
    assert any("w59" in " ".join(pair).split() for pair in pairs)
    for row, pair in zip(result.predictions, pairs, strict=True):
        assert (row["candidate"] is None) == ("w59" in " ".join(pair).split())
    assert math.isnan(result.candidate.value) and len(Gate(100, 0).failures(result)) == 2
    opposite = zoo.table("opposite.jsonl", rows_of(pairs, [-value for value in truth]))
    with pytest.raises(InputError, match=r"scores -\d+\.\d\d on stsb, no better than knowing nothing"):
        evaluate(model, STSB, data=opposite, baseline=model)


def test_files_and_json(zoo: Any, pairs: Any, tmp_path: Path) -> None:
    model = zoo.make("m", num_labels=1)
    data = zoo.table("data.jsonl", rows_of(pairs, about(plain(zoo, model, pairs))))
    result = evaluate(model, STSB, data=data, baseline=model)
    again = Evaluation.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert again.to_json() == result.to_json() and again.candidate == result.candidate and again.agreement is None
    for name in ("p.jsonl", "p.csv"):
        write_predictions(result, tmp_path / name)
    lines = (tmp_path / "p.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.predictions
    with (tmp_path / "p.csv").open(newline="") as stream:
        cells = [{key: json.loads(cell) for key, cell in row.items()} for row in csv.DictReader(stream)]
    assert cells == result.predictions
