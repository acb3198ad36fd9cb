"""Every class of every family, and some that nobody listed, from float to scores: quantize, load, eval."""

import math
from pathlib import Path
from typing import Any

import pytest

import qtool
from qtool.evaluation.runner import evaluate
from qtool.evaluation.tasks import task

GROUPED = {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
ENDS = {"bos_token_id": 2, "eos_token_id": 3}
DECODERS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": ENDS,
    "OPTForCausalLM": {**ENDS, "ffn_dim": 48, "init_std": 0.4, "word_embed_proj_dim": 16},
    "GPTNeoXForCausalLM": ENDS,
    "GPTJForCausalLM": {**ENDS, "rotary_dim": 8},
    "LlamaForCausalLM": {**GROUPED, "tie_word_embeddings": True},
    "MistralForCausalLM": GROUPED,
    "Qwen2ForCausalLM": GROUPED,
    "LlamaForSequenceClassification": GROUPED,
    "GPT2ForTokenClassification": {**ENDS, "num_labels": 3},
    "GPTNeoXForQuestionAnswering": ENDS,
}
HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
ENCODERS = [f"{family}{head}" for family in ("Bert", "Roberta", "DistilBert", "Electra") for head in HEADS]
UNLISTED: dict[str, dict[str, Any]] = {"PhiForCausalLM": ENDS, "MPNetForMaskedLM": {}, "FalconForCausalLM": ENDS}
WORDS = [f"w{index}" for index in range(50)]
TASKS = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "squad",
    "ForMaskedLM": "masked-lm",
    "ForCausalLM": "perplexity",
    "LMHeadModel": "perplexity",
}


def data(zoo: Any, kind: str) -> Path:
    """A file that suits a task."""
    texts = zoo.sentences(40)
    if kind == "squad":
        rows = [{"question": "w1 w2", "context": text, "answers": {"text": [text.split()[0]]}} for text in texts]
    elif kind == "token-classification":
        rows = [{"tokens": text.split(), "tags": ["B-X"] + ["O"] * text.count(" ")} for text in texts]
    elif kind == "classification":
        rows = [{"sentence": text, "label": index % 2} for index, text in enumerate(texts)]
    else:
        rows = [{"text": text} for text in texts]
    path: Path = zoo.table(f"{kind}.jsonl", rows)
    return path


@pytest.mark.parametrize("architecture", [*ENCODERS, *DECODERS, *UNLISTED])
def test_quantize_load_eval(architecture: str, zoo: Any, desk: Path) -> None:
    kind = next(kind for head, kind in TASKS.items() if architecture.endswith(head))
    options = dict(DECODERS.get(architecture, UNLISTED.get(architecture, {})))
    if kind == "token-classification":
        options = {**options, "id2label": {0: "O", 1: "B-X", 2: "I-X"}, "label2id": {"O": 0, "B-X": 1, "I-X": 2}}
        options.pop("num_labels", None)
    if architecture == "Qwen2ForCausalLM":  # transformers reads its tokenizer as bytes, whatever is in the file
        folder = zoo.byte_level("float", architecture, " ".join(WORDS), **{**options, "vocab_size": 300})
    else:
        folder = zoo.make("float", architecture, words=WORDS, **options)
    made = qtool.quantize(str(folder), method="zeroquant", output="out", set=["calibration.num_samples=8"])
    found = evaluate(made.path, task(kind), data=data(zoo, kind), baseline=folder, allow_weak_baseline=True)
    assert found.baseline is not None and found.candidate.quantized and not found.baseline.quantized
    assert math.isfinite(found.candidate.value) and found.n > 30
    # Random weights leave many close calls: what is asserted is that the quantized model is no other model.
    assert found.agreement is not None and found.agreement > 70, found
    if kind == "perplexity":
        assert found.drop == pytest.approx(0, abs=10)
