import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from qtool.errors import InputError, UsageError
from qtool.evaluation.gate import Gate
from qtool.evaluation.metrics import paired_interval
from qtool.evaluation.runner import evaluate
from qtool.evaluation.tasks import task

SST2, ANY = task("sst2"), task("classification")
NAMES = ("negative", "positive")
Find = Callable[[str], Path]


def predicted(zoo: Any, folder: Path, texts: Any, tokens: int = 38) -> list[int]:
    """Classes of the texts by plain transformers, one text at a time."""
    found: list[int] = zoo.plain(folder, texts, tokens).argmax(1).tolist()
    return found


def mostly(ids: list[int], classes: int = 2) -> list[int]:
    """The same labels, but every tenth moved to the next class."""
    return [(label + (index % 10 == 0)) % classes for index, label in enumerate(ids)]


def divergence(theirs: Any, ours: Any) -> float:
    """Mean over rows of Σ p (log p − log q), in float64."""
    first, second = (log_softmax(np.asarray(side, dtype=np.float64), axis=1) for side in (theirs, ours))
    return float((np.exp(first) * (first - second)).sum(1).mean())


@pytest.fixture
def pair(zoo: Any) -> tuple[Path, Path, Path]:
    """A float model, a noisy copy, and a file that the float model gets right in nine of ten rows."""
    baseline = zoo.make("float", labels=NAMES)
    candidate = zoo.make("noisy", labels=NAMES, change=zoo.noise(0.03))
    texts = zoo.sentences(150)
    return baseline, candidate, zoo.write("data.jsonl", texts, mostly(predicted(zoo, baseline, texts)))


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1000])
def test_numbers_are_those_of_plain_transformers(zoo: Any, pair: tuple[Path, Path, Path], batch_size: int) -> None:
    baseline, candidate, data = pair
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts, labels = [row["sentence"] for row in rows], [row["label"] for row in rows]
    theirs, ours = predicted(zoo, baseline, texts), predicted(zoo, candidate, texts)
    assert 0 < sum(a != b for a, b in zip(ours, theirs, strict=True)) < 75, "the test needs models that differ somewhat"

    found = evaluate(candidate, SST2, data=data, baseline=baseline, batch_size=batch_size)
    assert found.baseline is not None and found.n == 150
    assert found.candidate.value == pytest.approx(100 * accuracy_score(labels, ours), abs=1e-9)
    assert found.baseline.value == pytest.approx(100 * accuracy_score(labels, theirs), abs=1e-9)
    assert found.drop == pytest.approx(found.baseline.value - found.candidate.value, abs=1e-9)
    assert found.agreement == pytest.approx(100 * accuracy_score(theirs, ours), abs=1e-9)
    wanted = divergence(*(zoo.plain(folder, texts) for folder in (baseline, candidate)))
    assert wanted > 1e-3 and found.kl == pytest.approx(wanted, rel=1e-4)
    right = [np.equal(side, labels) for side in (ours, theirs)]
    assert found.interval == paired_interval(right[0], right[1])
    assert [row["index"] for row in found.predictions] == list(range(150))
    for key, ids in (("label", labels), ("baseline", theirs), ("candidate", ours)):
        assert [row[key] for row in found.predictions] == [NAMES[index] for index in ids]
    assert found.candidate.seconds > 0 and found.speed_ratio == found.baseline.seconds / found.candidate.seconds
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_a_model_against_itself(zoo: Any, architecture: str) -> None:
    model = zoo.make("m", architecture, labels=NAMES)
    texts = zoo.sentences(60)
    data = zoo.write("data.jsonl", texts, predicted(zoo, model, texts))
    found = evaluate(model, SST2, data=data, baseline=model)
    assert (found.candidate.value, found.drop, found.agreement, found.kl) == (100.0, 0.0, 100.0, 0.0)
    assert found.interval is not None and found.interval[0] < 0 < found.interval[1]
    assert Gate(max_drop=0, min_score=100, min_agreement=100, max_kl=0).failures(found) == []


def test_a_model_alone(zoo: Any, pair: tuple[Path, Path, Path]) -> None:
    _, model, data = pair
    found = evaluate(model, SST2, data=data)
    assert found.baseline is found.drop is found.interval is found.agreement is found.speed_ratio is found.kl is None
    assert {row["baseline"] for row in found.predictions} == {None}
    assert len(Gate(max_drop=1, min_agreement=1, max_kl=9).failures(found)) == 3


def test_limit_threads_progress_and_settings(pair: tuple[Path, Path, Path]) -> None:
    _, model, data = pair
    torch.set_num_threads(2)
    seen: list[tuple[str, int, int]] = []
    found = evaluate(
        model,
        SST2,
        data=data,
        limit=20,
        batch_size=8,
        threads=1,
        max_length=None,
        progress=lambda *step: seen.append(step),
    )
    assert found.n == 20 and torch.get_num_threads() == 2
    assert seen == [("evaluate", 1, 3), ("evaluate", 2, 3), ("evaluate", 3, 3)]
    assert found.settings["threads"] == 1 and found.settings["batch_size"] == 8
    assert found.settings["max_length"] == 40  # the model's positions
    assert found.settings["versions"]["torch"] == torch.__version__


def test_texts_are_cut(zoo: Any) -> None:
    model = zoo.make("m", labels=NAMES)
    texts = [f"{text} {text} {text} {text} {text}" for text in zoo.sentences(80, seed=3)]
    assert predicted(zoo, model, texts, 6) != predicted(zoo, model, texts)
    data = zoo.write("data.jsonl", texts, predicted(zoo, model, texts, 6))
    assert evaluate(model, SST2, data=data, max_length=6).candidate.value == 100.0


def test_pairs_of_texts(zoo: Any, tmp_path: Path) -> None:
    model = zoo.make("m", labels=("a", "b", "c"))
    pairs = list(zip(zoo.sentences(60), zoo.sentences(60, seed=1), strict=True))
    ids = predicted(zoo, model, pairs)
    lines = [{"premise": p, "hypothesis": h, "label": "abc"[i]} for (p, h), i in zip(pairs, ids, strict=True)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate(model, ANY, data=tmp_path / "data.jsonl").candidate.value == 100.0


def swap_head(model: Any) -> None:
    for weight in (model.classifier.weight, model.classifier.bias):
        weight.copy_(weight.flip(0))


def test_labels_are_aligned_by_name(zoo: Any, pair: tuple[Path, Path, Path]) -> None:
    baseline, _, data = pair
    swapped = zoo.make("swapped", labels=("POSITIVE", "Negative"), change=swap_head)
    found = evaluate(swapped, SST2, data=data, baseline=baseline)
    assert (found.drop, found.agreement) == (0.0, 100.0)
    assert found.kl == pytest.approx(0, abs=1e-9)  # their outputs are compared by name too


def test_string_labels_meet_the_names_of_the_head(zoo: Any) -> None:
    names = ("sad", "glad", "mad")
    model = zoo.make("m", labels=names)
    texts = zoo.sentences(60)
    data = zoo.write("data.jsonl", texts, [names[index].upper() for index in predicted(zoo, model, texts)])
    found = evaluate(model, ANY, data=data)
    assert found.candidate.value == 100.0 and {row["label"] for row in found.predictions} <= set(names)


def test_generic_names_keep_their_order(zoo: Any) -> None:
    model = zoo.make("m")
    texts = zoo.sentences(60)
    data = zoo.write("data.jsonl", texts, predicted(zoo, model, texts))
    assert evaluate(model, SST2, data=data).candidate.value == 100.0
    assert evaluate(model, ANY, data=data).candidate.value == 100.0


def test_permuted_labels_stop_the_run(zoo: Any, pair: tuple[Path, Path, Path]) -> None:
    baseline, _, data = pair
    lying = zoo.make("lying", labels=NAMES, change=swap_head)
    with pytest.raises(InputError) as error:
        evaluate(baseline, SST2, data=data, baseline=lying)
    assert all(word in str(error.value) for word in (str(lying), "another order", "--allow-weak-baseline"))
    found = evaluate(baseline, SST2, data=data, baseline=lying, allow_weak_baseline=True)
    assert found.agreement == 0.0 and found.drop is not None and found.drop < 0


def test_wrong_task_for_the_head(zoo: Any, pair: tuple[Path, Path, Path]) -> None:
    baseline, _, data = pair
    for name, options, words in (
        ("three", {"labels": ("a", "b", "c")}, ["3 classes", "negative, positive"]),
        ("other", {"labels": ("spam", "ham")}, ["spam, ham"]),
        ("one", {"labels": ("score",)}, ["regression"]),
        ("qa", {"architecture": "BertForQuestionAnswering"}, ["BertForQuestionAnswering", "finding answers"]),
    ):
        with pytest.raises(InputError) as error:
            evaluate(zoo.make(name, **options), SST2, data=data)
        assert all(word in str(error.value) for word in ["wrong task for the head", *words])
    with pytest.raises(InputError, match="no classification head"):
        evaluate(zoo.make("bare", "BertModel"), SST2, data=data, baseline=baseline)


def test_labels_that_the_head_does_not_have(zoo: Any) -> None:
    model = zoo.make("m", labels=("a", "b"))
    for labels in ([0, 2], ["a", "c"]):
        with pytest.raises(InputError, match="wrong task for the head"):
            evaluate(model, ANY, data=zoo.write("data.jsonl", ["w1", "w2"], labels))


def poison(model: Any) -> None:
    model.classifier.weight[0, 0] = float("nan")


def test_nan_fails_closed(zoo: Any, pair: tuple[Path, Path, Path]) -> None:
    baseline, _, data = pair
    broken = zoo.make("broken", labels=NAMES, change=poison)
    found = evaluate(broken, SST2, data=data, baseline=baseline)
    values = (found.candidate.value, found.drop, found.agreement, found.kl, *(found.interval or ()))
    assert all(value is not None and math.isnan(value) for value in values) and len(values) == 6
    assert {row["candidate"] for row in found.predictions} == {None}
    assert len(Gate(max_drop=100, min_score=0, min_agreement=0, max_kl=1e9).failures(found)) == 4
    assert found.to_json()["candidate"]["score"] is None
    with pytest.raises(InputError, match="gives NaN"):
        evaluate(baseline, SST2, data=data, baseline=broken, allow_weak_baseline=True)


def test_each_side_has_its_own_tokenizer(zoo: Any) -> None:
    words = [f"w{index}" for index in range(60)]
    baseline = zoo.make("float", labels=NAMES)

    def reorder(model: Any) -> None:
        table = model.bert.embeddings.word_embeddings.weight
        table[5:] = table[5:].flip(0)

    candidate = zoo.make("same", labels=NAMES, words=words[::-1], change=reorder)
    texts = zoo.sentences(60)
    data = zoo.write("data.jsonl", texts, mostly(predicted(zoo, baseline, texts)))
    found = evaluate(candidate, SST2, data=data, baseline=baseline)
    assert (found.drop, found.agreement, found.kl) == (0.0, 100.0, None)
    assert Gate(max_kl=1e9).failures(found) == [
        "max-kl: KL divergence was not measured (nothing to compare: other tokens, tags or vocabulary than the "
        "baseline's), limit 1e+09 nats"
    ]


def exclude_the_second(model: Any) -> None:
    model.classifier.weight[1].zero_()
    model.classifier.bias[1] = -math.inf


def test_a_class_that_only_the_candidate_excludes(zoo: Any, pair: tuple[Path, Path, Path]) -> None:
    baseline, _, data = pair
    sure = zoo.make("sure", labels=NAMES, change=exclude_the_second)
    found = evaluate(sure, SST2, data=data, baseline=baseline)
    assert found.kl == math.inf and found.to_json()["kl"] is None
    assert Gate(max_kl=1e9).failures(found) == ["max-kl: KL divergence is inf, limit 1e+09 nats"]
    other = evaluate(baseline, SST2, data=data, baseline=sure, allow_weak_baseline=True)
    texts = [json.loads(row)["sentence"] for row in data.read_text().splitlines()]
    wanted = -log_softmax(zoo.plain(baseline, texts).double().numpy(), axis=1)[:, 0].mean()
    assert other.kl == pytest.approx(wanted, rel=1e-4)


def test_arguments_that_mean_nothing(pair: tuple[Path, Path, Path]) -> None:
    _, model, data = pair
    for options, word in (
        ({"batch_size": 0}, "batch-size"),
        ({"max_length": 0}, "max-length"),
        ({"threads": 0}, "threads"),
        ({"dtype": "float23"}, "float32"),
        ({"limit": 0}, "limit"),
    ):
        with pytest.raises(UsageError, match=word):
            evaluate(model, SST2, data=data, **options)  # type: ignore[arg-type]


def probe_data(zoo: Any, model: Path) -> tuple[Path, list[str], list[int]]:
    """A folder whose labels can mostly be read from the model's own features."""
    for split, count in (("train", 300), ("validation", 120)):
        texts = zoo.sentences(count, seed=count)
        feature = zoo.plain(model, texts)[:, 0]
        ids = mostly((feature > feature.median()).long().tolist())
        zoo.write(f"set/{split}.jsonl", texts, ids)
    return model.parent / "set", texts, ids


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM", "RobertaForMaskedLM"])
def test_the_probe_is_what_scikit_learn_makes_of_plain_features(zoo: Any, architecture: str) -> None:
    model = zoo.make("float", architecture)
    noisy = zoo.make("noisy", architecture, change=zoo.noise(0.1))
    data, texts, labels = probe_data(zoo, model)
    train = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    found = evaluate(noisy, SST2, data=data, baseline=model, batch_size=16)
    assert found.baseline is not None and found.probe is not None

    by_hand = make_pipeline(StandardScaler(), LogisticRegression(C=found.probe.c, max_iter=1000))
    by_hand.fit(zoo.plain(model, [row["sentence"] for row in train]).double(), [row["label"] for row in train])
    theirs, ours = (by_hand.predict(zoo.plain(folder, texts).double()) for folder in (model, noisy))
    assert (found.probe.rows, found.probe.features) == (300, 32)
    assert found.probe.source == str(data / "train.jsonl")
    assert found.baseline.value == pytest.approx(100 * accuracy_score(labels, theirs), abs=1e-9)
    assert found.candidate.value == pytest.approx(100 * accuracy_score(labels, ours), abs=1e-9)
    assert found.agreement == pytest.approx(100 * accuracy_score(theirs, ours), abs=1e-9)
    assert found.agreement < 100, "the test needs models that differ"
    odds = [by_hand.predict_proba(zoo.plain(folder, texts).double()) for folder in (model, noisy)]
    assert found.kl == pytest.approx(divergence(*np.log(odds)), rel=1e-3)

    alone = evaluate(model, SST2, data=data)
    assert alone.candidate.value == found.baseline.value and alone.baseline is None


def test_the_probe_takes_the_first_rows(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qtool.evaluation.exams.classification.MAX_ROWS", 50)
    model = zoo.make("float", "BertModel")
    data, _, _ = probe_data(zoo, model)
    few = evaluate(model, SST2, data=data)
    assert few.probe is not None and few.probe.rows == 50
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(lines[:50]))
    again = evaluate(model, SST2, data=data)
    assert again.predictions == few.predictions


def test_a_probe_on_string_labels(zoo: Any) -> None:
    model = zoo.make("float", "BertModel")
    data, _, _ = probe_data(zoo, model)
    numbers = evaluate(model, ANY, data=data)
    for path in data.iterdir():
        path.write_text(path.read_text().replace('"label": 0', '"label": "no"').replace('"label": 1', '"label": "yes"'))
    words = evaluate(model, ANY, data=data)
    assert words.candidate.value == numbers.candidate.value
    assert {row["candidate"] for row in words.predictions} == {"no", "yes"}
    assert {row["candidate"] for row in numbers.predictions} == {"LABEL_0", "LABEL_1"}


def test_two_files_that_name_their_classes_differently(zoo: Any) -> None:
    model = zoo.make("float", "BertModel")
    data, _, _ = probe_data(zoo, model)
    for name, own in (("validation", "train"), ("train", "validation")):
        path = data / f"{name}.jsonl"
        numbers = path.read_text()
        path.write_text(numbers.replace('"label": 0', '"label": "bad"').replace('"label": 1', '"label": "good"'))
        with pytest.raises(InputError) as error:
            evaluate(model, ANY, data=data, baseline=model)
        for words in (f"{name}.jsonl are words", f"{own}.jsonl are numbers", "in the same way"):
            assert words in str(error.value).replace("those of ", "").replace(f"{data}/", "")
        path.write_text(numbers)
    path = data / "train.jsonl"  # a task with names of its own connects the two
    path.write_text(path.read_text().replace('"label": 0', '"label": "negative"').replace(": 1", ': "positive"'))
    assert evaluate(model, SST2, data=data).n == 120


def test_each_score_says_whether_its_model_is_quantized(zoo: Any, pair: tuple[Path, Path, Path], desk: Path) -> None:
    import qtool

    baseline, _, data = pair
    artifact = qtool.quantize(
        str(baseline), method="zeroquant", output=zoo.folder / "int8", set=["calibration.source=random"]
    ).path
    found = evaluate(artifact, SST2, data=data, baseline=baseline)
    assert found.baseline is not None and (found.baseline.quantized, found.candidate.quantized) == (False, True)
    again = evaluate(artifact, SST2, data=data, baseline=artifact, allow_weak_baseline=True).to_json()
    assert (again["baseline"]["quantized"], again["candidate"]["quantized"]) == (True, True)


def test_what_a_probe_cannot_do(zoo: Any) -> None:
    model = zoo.make("float", "BertModel")
    data, _, _ = probe_data(zoo, model)
    with pytest.raises(InputError, match="needs training data"):
        evaluate(model, SST2, data=data / "validation.jsonl")
    other = zoo.make("wide", "BertModel", change=None, num_labels=2)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    with pytest.raises(InputError, match="hidden_size"):
        evaluate(other, SST2, data=data, baseline=model)
    (data / "train.jsonl").unlink()
    with pytest.raises(InputError, match="no data for train"):
        evaluate(model, SST2, data=data)


def test_a_quantized_encoder_alone_has_no_probe(zoo: Any) -> None:
    model = zoo.make("float", "BertModel")
    data, _, _ = probe_data(zoo, model)
    config = json.loads((model / "config.json").read_text())
    quantized = {"quant_method": "qtool", "version": 1, "modules": {}, "tensors": {}}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantized}))
    with pytest.raises(InputError, match="pass --baseline"):
        evaluate(model, SST2, data=data)


@pytest.mark.parametrize("name", ["minilm-sst2", "minilm-roberta-sst2"])
def test_real_float_score(test_models: Find, shared_data: Find, name: str) -> None:
    found = evaluate(test_models(name), SST2, data=shared_data("sst2"), threads=2)
    assert (found.n, found.candidate.value) == (872, 100 * 776 / 872)


@pytest.mark.slow
def test_real_models_agree(test_models: Find, shared_data: Find) -> None:
    """One function in two architectures' clothes."""
    models = test_models("minilm-sst2"), test_models("minilm-roberta-sst2")
    found = evaluate(models[0], SST2, data=shared_data("sst2"), baseline=models[1], threads=2)
    assert (found.drop, found.agreement) == (0.0, 100.0)


@pytest.mark.exhaustive
def test_real_probe(test_models: Find, shared_data: Find) -> None:
    model = test_models("minilm-base")
    found = evaluate(model, SST2, data=shared_data("sst2"), baseline=model, threads=2)
    assert found.probe is not None and found.probe.rows == 12_000 and found.probe.converged
    assert 79 < found.candidate.value < 81 and (found.drop, found.agreement) == (0.0, 100.0)
