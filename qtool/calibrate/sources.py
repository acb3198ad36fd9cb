"""Calibration data: from rows, a file, our own sentences or random tokens to batches of token ids.

Batches are cut here, once, in the order of the data, so that results never depend on how the work is divided later.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from qtool.errors import InputError
from qtool.rows import read_rows

TEXT_COLUMNS = ("text", "sentence", "sentence1", "question", "premise", "content")
"""Columns that hold text when nobody says which, in this order."""


@dataclass(frozen=True)
class Batches:
    """Tokenized calibration data: each batch maps a model input's name to int64 `[batch, tokens]`."""

    batches: list[dict[str, torch.Tensor]]
    description: str
    digest: str

    @property
    def num_samples(self) -> int:
        """Sequences in all batches."""
        return sum(len(batch["input_ids"]) for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        """Real tokens in all batches."""
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches)

    def first(self, sequences: int, tokens: int) -> dict[str, torch.Tensor]:
        """A small batch from the front of the data, at most `[sequences, tokens]`."""
        return {name: value[:sequences, :tokens].contiguous() for name, value in self.batches[0].items()}


def builtin_sentences() -> list[str]:
    """The 500 sentences that ship with qtool, written for it."""
    return (resources.files("qtool.calibrate") / "sentences.txt").read_text("utf-8").splitlines()


def file_texts(path: Path, column: str | None = None) -> list[str]:
    """The text column of a txt, jsonl, csv or parquet file. Raises InputError naming the columns present."""
    rows = read_rows(path)
    columns = list(rows[0])
    chosen = column or next((name for name in TEXT_COLUMNS if name in columns), None)
    if chosen is None or chosen not in columns:
        wanted = f"no column '{column}'" if column else "no column that holds text"
        raise InputError(f"{path}: {wanted} among {', '.join(columns)}; name one with calibration.text_column")
    return [str(row[chosen]) for row in rows if row[chosen] is not None]


def tokenize(
    tokenizer: Any, texts: Sequence[Any], *, num_samples: int, batch_size: int, max_length: int, description: str
) -> Batches:
    """The first `num_samples` non-empty texts (or pairs of texts) as padded batches.

    Raises InputError when no text is left.
    """
    used = [text for text in texts if (text.strip() if isinstance(text, str) else all(text))][:num_samples]
    if not used:
        raise InputError(f"calibration data is empty: {description}")
    batches = []
    for start in range(0, len(used), batch_size):
        chunk = used[start : start + batch_size]
        pairs = ([a for a, _ in chunk], [b for _, b in chunk]) if not isinstance(chunk[0], str) else (chunk,)
        encoded = tokenizer(*pairs, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        batches.append(dict(encoded))
    return Batches(batches, f"{len(used)} of {description}", _digest(batches))


def random_tokens(
    vocab_size: int, *, num_samples: int, batch_size: int, max_length: int, seed: int, first_id: int = 0
) -> Batches:
    """Uniformly random token ids in `[first_id, vocab_size)`: for shapes without data, never for accuracy."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(first_id, vocab_size, (num_samples, max_length), generator=generator)
    batches = [{"input_ids": chunk, "attention_mask": torch.ones_like(chunk)} for chunk in ids.split(batch_size)]
    return Batches(batches, f"{num_samples} random sequences of {max_length} tokens", _digest(batches))


def _digest(batches: list[dict[str, torch.Tensor]]) -> str:
    total = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            total.update(f"{name}{tuple(batch[name].shape)}".encode())
            total.update(batch[name].numpy().tobytes())
    return total.hexdigest()
