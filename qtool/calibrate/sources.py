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
from qtool.rows import Texts, find_text_columns, read_rows, texts_of


@dataclass(frozen=True)
class Batches:
    """Tokenized calibration data: each batch maps a model input's name to int64 `[batch, tokens]`."""

    batches: list[dict[str, torch.Tensor]]
    description: str
    digest: str

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


def file_texts(path: Path, column: str | None = None) -> Texts:
    """The texts (or pairs) of a txt, jsonl, csv or parquet file, in `column` or the usual ones; empty cells left out.

    Raises InputError naming the columns present, or the row that holds no text.
    """
    rows = read_rows(path)
    columns = find_text_columns(rows, str(path), [column] if column else [])
    return texts_of(rows, columns, str(path), skip_missing=True)


def model_inputs(
    tokenizer: Any, texts: Sequence[Any], max_length: int | None, type_vocab_size: int | None, **options: Any
) -> dict[str, Any]:
    """The tokenizer's columns for texts or pairs of texts, cut to `max_length` tokens; `options` are the tokenizer's.

    A model with fewer than two token types gets none (None: unknown, all are kept). Raises InputError where
    `max_length` leaves no room for text: tokenizers then cut nothing, without a word.
    """
    paired = not isinstance(texts[0], str)
    if max_length is not None:
        room_for_text(max_length, tokenizer.num_special_tokens_to_add(pair=paired))
    sides = ([text[0] for text in texts], [text[1] for text in texts]) if paired else (list(texts),)
    if options.get("padding") and tokenizer.pad_token is None:
        raise InputError("the tokenizer has neither a padding nor an end-of-text token; name one in its config")
    limit = {"truncation": True, "max_length": max_length} if max_length is not None else {}
    columns = dict(tokenizer(*sides, return_attention_mask=True, **limit, **options))
    if type_vocab_size is not None and type_vocab_size < 2:
        columns.pop("token_type_ids", None)
    return columns


def room_for_text(max_length: int, own: int) -> int:
    """How many tokens of text fit beside the tokenizer's `own`. Raises InputError when none does."""
    if max_length <= own:
        raise InputError(
            f"a maximum length of {max_length} leaves no room for text: the tokenizer adds {own} tokens of its own; "
            f"allow at least {own + 1} with --max-length"
        )
    return max_length - own


def tokenize(
    tokenizer: Any,
    texts: Sequence[Any],
    *,
    num_samples: int,
    batch_size: int,
    max_length: int,
    description: str,
    type_vocab_size: int | None = None,
) -> Batches:
    """The first `num_samples` non-empty texts (or pairs of texts) as padded batches.

    `type_vocab_size` is the model's number of token types (None: unknown). Raises InputError when no text is left or
    `max_length` leaves no room for any.
    """
    used = [text for text in texts if (text.strip() if isinstance(text, str) else all(text))][:num_samples]
    if not used:
        raise InputError(f"calibration data is empty: {description}")
    batches = []
    for start in range(0, len(used), batch_size):
        chunk = used[start : start + batch_size]
        batches.append(model_inputs(tokenizer, chunk, max_length, type_vocab_size, padding=True, return_tensors="pt"))
    return Batches(batches, f"{len(used)} of {description}", _digest(batches))


_LONG_WORDS = 16  # characters: what a token has at most, on average, in any text worth calibrating on


def windows(
    tokenizer: Any, texts: Sequence[Any], *, num_samples: int, batch_size: int, max_length: int, description: str
) -> Batches:
    """The first `num_samples` windows of `max_length` tokens of one running text, as perplexity is measured on.

    Texts, and both sides of pairs, follow each other in lines. A text shorter than a window is one shorter window; a
    partial window after others is dropped. Raises InputError when no text is left.
    """
    wanted, lines, length = num_samples * max_length, [], 0
    for text in texts:
        lines += [line.removesuffix("\n") for line in ([text] if isinstance(text, str) else text)]
        length += len(lines[-1])
        if length > wanted * _LONG_WORDS:
            break
    found = tokenizer("\n".join(lines), verbose=False)["input_ids"] if any(map(str.strip, lines)) else []
    if not found:
        raise InputError(f"calibration data is empty: {description}")
    ids = torch.tensor(found)
    count = min(num_samples, len(ids) // max_length)
    cut = ids[: count * max_length].view(count, max_length) if count else ids[None]
    return unpadded(list(cut.split(batch_size)), f"{len(cut)} windows of {cut.shape[1]} tokens of {description}")


def random_tokens(
    vocab_size: int, *, num_samples: int, batch_size: int, max_length: int, seed: int, first_id: int = 0
) -> Batches:
    """Uniformly random token ids in `[first_id, vocab_size)`: for shapes without data, never for accuracy."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(first_id, vocab_size, (num_samples, max_length), generator=generator)
    return unpadded(list(ids.split(batch_size)), f"{num_samples} random sequences of {max_length} tokens")


def unpadded(ids: list[torch.Tensor], description: str) -> Batches:
    """Batches of token ids, int64 `[batch, tokens]`, none of which is padding."""
    batches = [{"input_ids": chunk, "attention_mask": torch.ones_like(chunk)} for chunk in ids]
    return Batches(batches, description, _digest(batches))


def _digest(batches: list[dict[str, torch.Tensor]]) -> str:
    total = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            total.update(f"{name}{tuple(batch[name].shape)}".encode())
            total.update(batch[name].numpy().tobytes())
    return total.hexdigest()
