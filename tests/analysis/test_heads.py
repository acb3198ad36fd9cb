"""What a model loses without heads, measured by hooks, against zeroed weights, finite differences and other ways."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qtool.analysis import heads as heads_module
from qtool.analysis.heads import Judge, gradient_ranking, points
from qtool.analysis.kept import Kept
from qtool.analysis.search import Heads
from qtool.errors import InputError
from qtool.evaluation.exams import Exam, Request, exam_class
from qtool.evaluation.models import subject
from qtool.evaluation.sides import Side, load_sides
from qtool.evaluation.tasks import task

SIZES: dict[str, Any] = {"num_attention_heads": 4, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def model(shelf: Any) -> Path:
    folder: Path = shelf.make("judged", labels=("negative", "positive"), **SIZES)
    texts = shelf.sentences(40, seed=3)
    answers = shelf.plain(folder, texts).argmax(1).tolist()
    labels = [1 - answer if index % 5 == 0 else answer for index, answer in enumerate(answers)]
    shelf.write("judged-data/validation.jsonl", texts, labels)
    return folder


@pytest.fixture
def asked(model: Path, shelf: Any) -> Callable[..., tuple[Exam, Side]]:
    """A model before an exam."""

    def make(name: str = "sst2", data: str = "judged-data", source: Path = model, **options: Any) -> tuple[Exam, Side]:
        exam = exam_class(task(name))(task(name), Request(str(shelf.folder / data), batch_size=8, **options))
        with torch.inference_mode():
            side = load_sides([subject(source, task(name))], exam, "float32")[0]
            exam.prepare([side], lambda stage, done, total: None)
        side.model.requires_grad_(False)
        return exam, side

    return make


def zeroed(folder: Path, gone: Heads, architecture: str = "BertForSequenceClassification") -> Any:
    """The model with columns of its output projections set to zero, where they read these heads of 8 channels."""
    network = getattr(transformers, architecture).from_pretrained(folder).eval()
    with torch.no_grad():
        for layer, head in gone:
            network.bert.encoder.layer[layer].attention.output.dense.weight[:, 8 * head : 8 * head + 8] = 0
    return network


GONE = frozenset({(0, 3), (1, 0), (2, 2)})


def test_score_is_that_of_zeroed_weights(asked: Callable[..., Any], model: Path, shelf: Any) -> None:
    exam, side = asked()
    judge = Judge(exam, side, "score")
    rows = [json.loads(line) for line in (shelf.folder / "judged-data/validation.jsonl").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for gone in (frozenset(), GONE, frozenset({(2, 0), (2, 1), (2, 2), (2, 3)})):
        network, right = zeroed(model, gone), 0
        for row in rows:
            logits = network(**tokenizer(row["sentence"], return_tensors="pt")).logits
            right += int(logits.argmax()) == row["label"]
        assert judge(gone) == pytest.approx(100 * right / len(rows))


def test_kl_and_agreement_are_those_of_zeroed_weights(asked: Callable[..., Any], model: Path, shelf: Any) -> None:
    exam, side = asked()
    kl, agreement = Judge(exam, side, "kl"), Judge(exam, side, "agreement")
    tokenizer, off, same = transformers.AutoTokenizer.from_pretrained(model), [], []
    networks = [zeroed(model, gone) for gone in (frozenset(), GONE)]
    for text in shelf.sentences(40, seed=3):
        with torch.no_grad():
            p, q = (net(**tokenizer(text, return_tensors="pt")).logits[0].double().log_softmax(0) for net in networks)
        off.append(float((p.exp() * (p - q)).sum()))
        same.append(int(p.argmax()) == int(q.argmax()))
    assert kl(GONE) == pytest.approx(-sum(off) / len(off), rel=1e-4)
    assert kl(frozenset()) == 0.0 and math.copysign(1, kl(frozenset())) == 1
    assert agreement(GONE) == pytest.approx(100 * sum(same) / len(same))
    assert agreement(frozenset()) == 100.0


@pytest.mark.parametrize("kind", ["score", "kl"])
def test_what_is_kept_of_the_whole_model_changes_nothing(
    kind: Any, asked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    exam, side = asked()
    sets = [GONE, frozenset({(2, 1)}), frozenset({(1, 1), (1, 2), (1, 3), (1, 0)})]
    kept = Judge(exam, side, kind)
    found = [kept(gone) for gone in sets]
    monkeypatch.setattr(heads_module, "KEPT_VALUES", 0)
    again = Judge(exam, side, kind)
    assert [again(gone) for gone in sets] == found
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    block = side.model.bert.encoder.layer[0].attention.output.dense
    handle = block.register_forward_hook(count)
    kept(frozenset({(2, 1)}))
    assert not calls  # blocks before the first that loses a head are not run
    again(frozenset({(2, 1)}))
    handle.remove()
    assert calls
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in side.model.modules())


def test_gradients_are_those_of_finite_differences(asked: Callable[..., Any], model: Path) -> None:
    """E|∂L/∂m| of a head by central differences in float64: its output columns a little larger and smaller."""
    exam, side = asked(limit=6)
    ranking = gradient_ranking(exam, side)
    assert set(ranking) == {(layer, head) for layer in range(3) for head in range(4)}
    step = 1e-4
    for layer, head in [(0, 1), (1, 3), (2, 0)]:
        losses = []
        for sign in (1, -1):
            network = transformers.BertForSequenceClassification.from_pretrained(model).double().eval()
            with torch.no_grad():
                dense = network.bert.encoder.layer[layer].attention.output.dense.weight
                dense[:, 8 * head : 8 * head + 8] *= 1 + sign * step
                rows = [
                    torch.nn.functional.cross_entropy(
                        network(**{key: torch.tensor([value]) for key, value in row.items()}).logits,
                        torch.tensor([exam.references[index]]),
                    )
                    for index, row in enumerate(side.rows)
                ]
            losses.append(torch.stack(rows))
        wanted = ((losses[0] - losses[1]) / (2 * step)).abs().mean()
        assert ranking[layer, head] == pytest.approx(float(wanted), rel=1e-3)
    assert all(weight.grad is None for weight in side.model.parameters())


def test_language_models_are_judged_by_perplexity(asked: Callable[..., Any], shelf: Any) -> None:
    source = shelf.causal("judged-gpt2", initializer_range=0.1, **SIZES)
    (shelf.folder / "corpus.txt").write_text(" ".join(shelf.sentences(30)))
    exam, side = asked("perplexity", "corpus.txt", source, max_length=16)
    judge = Judge(exam, side, "score")
    assert judge(frozenset()) == 100.0
    found = judge.measure(GONE)
    assert judge(GONE) == 100 * judge.whole.score / found.score == points(exam, found.score, judge.whole.score)
    ranking = gradient_ranking(exam, side)
    assert len(ranking) == 12 and all(value > 0 for value in ranking.values())
    assert Judge(exam, side, "kl")(GONE) < 0


def test_metrics_that_a_task_lacks_are_refused(asked: Callable[..., Any], shelf: Any) -> None:
    source = shelf.make("judged-number", num_labels=1, **SIZES)
    rows = [{"sentence": text, "score": len(text)} for text in shelf.sentences(9)]
    shelf.table("numbers/validation.jsonl", rows)
    exam, side = asked("regression", "numbers", source)
    for kind in ("kl", "agreement"):
        with pytest.raises(InputError, match="use --metric score"):
            Judge(exam, side, kind)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no loss to take gradients of"):
        gradient_ranking(exam, side)


def test_kept_values_are_not_measured_again(tmp_path: Path) -> None:
    calls: list[Heads] = []

    def metric(gone: Heads) -> float:
        calls.append(gone)
        return math.nan if len(gone) == 2 else 1 / 3 - len(gone)

    file = tmp_path / "evaluated.jsonl"
    first = Kept(file, {"model": "a", "rows": 3}, metric)
    with pytest.raises(InputError, match="another qtool process is writing"):
        Kept(file, {"model": "a", "rows": 3}, metric)
    values = [first(gone) for gone in (frozenset(), GONE, frozenset({(0, 1), (0, 2)}))]
    first.close()
    file.write_text(file.read_text() + '{"heads": [[0, ')  # killed while it wrote
    second = Kept(file, {"model": "a", "rows": 3}, metric)
    again = [second(gone) for gone in (frozenset(), GONE, frozenset({(0, 1), (0, 2)}))]
    assert again[:2] == values[:2] and math.isnan(again[2]) and len(calls) == 3
    second(frozenset({(5, 5)}))
    second.close()
    assert [json.loads(line) for line in file.read_text().splitlines()][-1]["heads"] == [[5, 5]]
    with pytest.raises(InputError, match="different model"):
        Kept(file, {"model": "b", "rows": 3}, metric)


DAMAGES = [
    b"no json\n", b"\xff\xfe\n", b"[]\n", b"{}\n", b'{"fingerprint": 3}\n', b'{"fingerprint": null}\n',
    b'{"fingerprint": {}}\n{"heads": [[0, 1]]}\n', b'{"fingerprint": {}}\n{"heads": 3, "value": 1}\n',
    b'{"fingerprint": {}}\n{"heads": [], "value": "x"}\n',
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_sets_is_said_and_left(damage: bytes, tmp_path: Path) -> None:
    file = tmp_path / "evaluated.jsonl"
    file.write_bytes(damage)
    with pytest.raises(InputError, match=r"evaluated\.jsonl is damaged .*--overwrite"):
        Kept(file, {}, len)
    assert file.read_bytes() == damage
    fresh = Kept(file, {}, len, fresh=True)
    assert fresh(frozenset({(0, 1)})) == 1
    fresh.close()
