"""Tiny random models with a tokenizer, and what plain transformers says about them one text at a time."""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = tuple(f"w{index}" for index in range(60))
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SHAPE: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}


@dataclass(frozen=True)
class Zoo:
    """Makes models below `folder`."""

    folder: Path

    def make(
        self,
        name: str,
        architecture: str = "BertForSequenceClassification",
        *,
        seed: int = 0,
        labels: Sequence[str] = (),
        words: Sequence[str] | None = WORDS,
        change: Callable[[Any], None] | None = None,
        **options: Any,
    ) -> Path:
        """A folder with a random model and (unless `words` is None) a tokenizer of these words."""
        model_class = getattr(transformers, architecture)
        named = {"id2label": dict(enumerate(labels)), "label2id": {x: i for i, x in enumerate(labels)}}
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**SHAPE, **options, **(named if labels else {})))
        if change is not None:
            with torch.no_grad():
                change(model)
        model.save_pretrained(self.folder / name)
        if words is not None:
            tokenizer(words).save_pretrained(self.folder / name)
        return self.folder / name

    def write(self, name: str, texts: Iterable[str], labels: Iterable[int | str]) -> Path:
        """A jsonl file with the columns `sentence` and `label`; folders are made."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ({"sentence": text, "label": label} for text, label in zip(texts, labels, strict=True))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    @staticmethod
    def sentences(count: int, seed: int = 0) -> list[str]:
        """Random texts of 1 to 12 words."""
        draw = random.Random(seed)
        return [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(count)]

    @staticmethod
    def noise(scale: float) -> Callable[[Any], None]:
        """Noise on every parameter of a model: a stand-in for what quantization does."""

        def change(model: Any) -> None:
            generator = torch.Generator().manual_seed(1)
            for weight in model.parameters():
                weight += scale * torch.randn(weight.shape, generator=generator)

        return change

    @staticmethod
    def plain(folder: Path, texts: Sequence[str | tuple[str, str]], tokens: int = 38) -> torch.Tensor:
        """Logits (or last hidden states' plain mean) by plain transformers: one text a call, no padding."""
        config = transformers.AutoConfig.from_pretrained(folder)
        headed = config.architectures[0].endswith("ForSequenceClassification")
        loader = transformers.AutoModelForSequenceClassification if headed else transformers.AutoModel
        model, own = loader.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)
        rows = []
        with torch.no_grad():
            for text in texts:
                pair = (text,) if isinstance(text, str) else text
                out = model(**own(*pair, return_tensors="pt", truncation=True, max_length=tokens))
                rows.append(out.logits[0] if headed else out.last_hidden_state[0].mean(0))
        return torch.stack(rows)


def tokenizer(words: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    return Zoo(tmp_path)
