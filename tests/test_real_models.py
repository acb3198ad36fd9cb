"""What quantization costs real models: the limits that the documentation promises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qtool
from qtool.evaluation.runner import evaluate
from qtool.evaluation.tasks import task

Find = Callable[[str], Path]


def quantized(model: Path, desk: Path) -> Path:
    return qtool.quantize(str(model), method="zeroquant", output=desk / "out").path


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_answers(test_models: Find, shared_data: Find, desk: Path) -> None:
    model = test_models("minilm-qa")
    found = evaluate(quantized(model, desk), task("squad"), data=shared_data("xquad-en"), baseline=model, doc_stride=0)
    assert found.baseline is not None and found.baseline.value == pytest.approx(57.76, abs=0.005)
    assert found.drop is not None and found.drop <= 0.5
    assert found.agreement is not None and found.agreement >= 92


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_llama(test_models: Find, shared_data: Find, desk: Path) -> None:
    """Perplexity on 16,384 tokens, and text that does not depend on the cache."""
    source = test_models("smollm2-135m")
    out = quantized(source, desk)
    data = shared_data("wikitext-2")
    found = evaluate(out, task("wikitext-2"), data=data, baseline=source, limit=16)
    assert found.baseline is not None and found.baseline.value == pytest.approx(19.887, abs=0.0005)
    assert (found.n, found.settings["max_length"]) == (16 * 1023, 1024)
    assert found.drop is not None and found.drop <= 4
    model: Any = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    lines = [line for line in (data / "test.txt").read_text("utf-8").splitlines() if len(line) > 300][:3]
    for line in lines:
        prompt = tokenizer(line, return_tensors="pt").input_ids[:, :32]
        options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "min_new_tokens": 16}
        cached, uncached = (
            model.generate(prompt, max_new_tokens=16, use_cache=cache, **options) for cache in (True, False)
        )
        assert torch.equal(cached, uncached)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_encoders_on_integers_alone(test_models: Find, shared_data: Find, desk: Path) -> None:
    """One function in the clothes of two families: both integer models answer as float does, and as each other."""
    answers, data = [], shared_data("sst2")
    for name in ("minilm-sst2", "minilm-roberta-sst2"):
        model = test_models(name)
        out = qtool.quantize(str(model), method="ibert", output=desk / name, task="sst2", data=data).path
        found = evaluate(out, task("sst2"), data=data, baseline=model)
        assert found.n == 872
        assert found.baseline is not None and found.baseline.value == pytest.approx(88.99, abs=0.005)
        assert found.drop is not None and found.drop <= 0.5
        assert found.agreement is not None and found.agreement >= 98.5
        answers.append([row["candidate"] for row in found.predictions])
    same = sum(one == other for one, other in zip(*answers, strict=True))
    assert same >= 0.995 * len(answers[0])
