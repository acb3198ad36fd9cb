"""Random models of two blocks by the names of their classes, without tokenizers; artifacts of them; what both say."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import qtool
from qtool import golden, pipeline

TIDY = {"bos_token_id": 1, "eos_token_id": 2}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, **TIDY}
ENCODERS: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": {},
    "RobertaForQuestionAnswering": {},
    "DistilBertForMaskedLM": {},
    "ElectraForTokenClassification": {},
}
DECODERS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": TIDY,
    "OPTForCausalLM": {**TIDY, "ffn_dim": 48, "init_std": 0.4, "word_embed_proj_dim": 32},
    "GPTNeoXForCausalLM": TIDY,
    "LlamaForCausalLM": {**GROUPED, "tie_word_embeddings": True},
    "MistralForCausalLM": {**GROUPED, "sliding_window": 6},
    "Qwen2ForCausalLM": GROUPED,
}
ATTENDING = {**ENCODERS, **DECODERS}
"""Classes that attend through transformers' registry, with options that make them small."""
NOT_ATTENDING: dict[str, dict[str, Any]] = {
    "GPTJForCausalLM": {**TIDY, "rotary_dim": 8},
    "BloomForCausalLM": TIDY,
    "MPNetForMaskedLM": {},
    "DebertaV2ForMaskedLM": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
}
"""Classes that do not."""
SHAPE: dict[str, Any] = {
    "vocab_size": 65, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": 0, "initializer_range": 0.4,
}  # fmt: skip
DATA = ("calibration.source=random", "calibration.num_samples=8", "calibration.max_length=12")


def save(folder: Path, architecture: str, **options: Any) -> Path:
    """Write a float model, whose weights follow from its options alone. Returns `folder`."""
    given = {**SHAPE, **options}
    sizes = {name: given.pop(name) for name in ("num_attention_heads", "num_hidden_layers")}
    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    cls(cls.config_class(**sizes, **given)).eval().save_pretrained(folder)
    return folder


@contextmanager
def golden_check_here(folder: Path) -> Iterator[None]:
    """Inside, one works in `folder`, and golden checks run in this process: a fresh one imports torch for seconds."""

    def check(run: Any, inputs: Any, outputs: Any) -> None:
        assert golden.differences(outputs, golden.compute(run.staging, inputs)) == []

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(pipeline, "_check_in_fresh_process", check)
        yield


class Artifacts:
    """Artifacts of models in `folder`, named `<name>-<class>`, each made once. `options` are those of every model."""

    def __init__(self, folder: Path, name: str, **options: Any) -> None:
        self._folder, self._name, self._options = folder, name, options
        self._made: dict[Any, Path] = {}

    def source(self, architecture: str, **options: Any) -> Path:
        """The float model."""
        given = {**self._options, **ATTENDING.get(architecture, {}), **options}
        return save(self._folder / f"{self._name}-{architecture}", architecture, **given)

    def make(self, architecture: str, methods: tuple[str, ...], *sets: str, **options: Any) -> Path:
        """What methods make of it, calibrated on random tokens."""
        key = (architecture, methods, *sets, repr(options))
        if key not in self._made:
            source, out = self.source(architecture, **options), self._folder / f"{self._name}-{len(self._made)}-out"
            with golden_check_here(self._folder):
                self._made[key] = qtool.quantize(str(source), method=methods, output=out, set=(*DATA, *sets)).path
        return self._made[key]


def load(folder: Path, **options: Any) -> Any:
    """By the class in the config; every tensor must have been found."""
    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, report = cls.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def source_of(folder: Path) -> Path:
    """The float model of an artifact."""
    return Path(json.loads((folder / "qtool.json").read_text())["source"]["name"])


def batch(left: bool = False) -> dict[str, torch.Tensor]:
    """Texts of 9, 5, 1, 7 and 3 tokens, padded."""
    ids = torch.randint(5, 65, (5, 9), generator=torch.Generator().manual_seed(0))
    lengths, places = torch.tensor([9, 5, 1, 7, 3])[:, None], torch.arange(9)
    mask = (places >= 9 - lengths if left else places < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """All scores of real tokens (or of texts) in a row."""
    found = model(**inputs, use_cache=False) if model.can_generate() else model(**inputs)
    values = [value for value in found.values() if isinstance(value, torch.Tensor)]
    real = inputs["attention_mask"].bool()
    return torch.cat([(x[real] if x.shape[:2] == real.shape else x).flatten() for x in values])
