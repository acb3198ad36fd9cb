"""Variants of a float model: the same numbers as the evaluation of two models."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qtool.errors import InputError, UsageError
from qtool.evaluation import runner, variants
from qtool.evaluation.exams import Request
from qtool.evaluation.tasks import task
from qtool.evaluation.variants import Variants

NUMBERS = ("n", "drop", "interval", "agreement", "kl")


def scaled(model: Any, factor: float) -> Any:
    """A context in which the classifier's weights are multiplied."""

    @contextmanager
    def altered(batch: Any) -> Iterator[None]:
        weight = model.classifier.weight
        kept = weight.clone()
        weight.mul_(factor)
        try:
            yield
        finally:
            weight.copy_(kept)

    return altered


@pytest.mark.parametrize("room", [1 << 30, 0, 300])
def test_a_variant_is_evaluated_as_a_model_of_its_own(
    tiny: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """Also where logits of the float model are not kept, or only some."""
    import transformers

    monkeypatch.setattr(variants, "KEPT_BYTES", room)
    other = transformers.AutoModelForSequenceClassification.from_pretrained(tiny.model)
    with torch.no_grad():
        other.classifier.weight *= -0.25
    other.save_pretrained(tmp_path / "other")
    transformers.AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path / "other")
    data = str(tiny.data)
    expected = runner.evaluate(tmp_path / "other", task("sst2"), data=data, baseline=tiny.model, batch_size=8)
    asked = Variants(tiny.model, task("sst2"), Request(data=data, batch_size=8))
    with torch.no_grad():
        found = asked.evaluate(scaled(asked.model, -0.25))
        again = asked.evaluate(scaled(asked.model, 1.0))
    assert found.drop != 0
    for name in NUMBERS:
        assert getattr(found, name) == pytest.approx(getattr(expected, name)), name
    assert found.candidate.value == expected.candidate.value
    assert found.baseline is not None and found.baseline.value == asked.baseline().candidate.value
    assert (again.drop, again.agreement, again.kl) == (0.0, 100.0, 0.0)


def test_a_model_of_its_own_needs_the_same_tokens(tiny: Any, zoo: Any) -> None:
    other = zoo.make("other", labels=("negative", "positive"), words=[f"w{index}" for index in range(30)])
    asked = Variants(tiny.model, task("sst2"), Request(data=str(tiny.data)))
    assert asked.evaluate_artifact(tiny.model).kl == 0.0
    with pytest.raises(InputError, match="cuts text into other tokens"):
        asked.evaluate_artifact(other)


def test_perplexity_of_variants(zoo: Any) -> None:
    model = zoo.causal("gpt2")
    text = zoo.write("text.jsonl", zoo.sentences(60), [0] * 60)
    asked = Variants(model, task("perplexity"), Request(data=str(text), max_length=8), allow_weak=True)
    plain = runner.evaluate(model, task("perplexity"), data=text, max_length=8)
    assert asked.baseline().candidate.value == plain.candidate.value
    assert set(asked.lengths) == {8}


def test_the_digest_is_of_the_data(tiny: Any) -> None:
    def digest(**options: Any) -> str:
        return Variants(tiny.model, task("sst2"), Request(data=str(tiny.data), **options)).digest()

    assert digest() == digest(batch_size=4)
    assert len({digest(), digest(limit=5), digest(max_length=4)}) == 3


def test_what_cannot_be_studied(tiny: Any, zoo: Any) -> None:
    with pytest.raises(UsageError, match="--limit must be at least 1"):
        Variants(tiny.model, task("sst2"), Request(data=str(tiny.data), limit=0))
    texts = zoo.sentences(20)
    wrong = zoo.write("wrong.jsonl", texts, [1 - answer for answer in zoo.plain(tiny.model, texts).argmax(1).tolist()])
    asked = Variants(tiny.model, task("sst2"), Request(data=str(wrong)))
    with pytest.raises(InputError, match="no better than knowing nothing"):
        asked.baseline()
