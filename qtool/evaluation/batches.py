"""From texts to padded batches: tokenise once, sort by length, cut."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qtool.anatomy import max_tokens
from qtool.calibrate.sources import model_inputs
from qtool.errors import InputError
from qtool.evaluation.tasks import Text

Tokens = dict[str, list[int]]
Batch = dict[str, torch.Tensor]


def longest(config: Any, tokenizer: Any, max_length: int | None) -> int | None:
    """Tokens to which a text is cut: the least of `max_length`, the tokenizer's limit and the model's positions.

    None when there is no limit at all.
    """
    limits = [max_length] if max_length is not None else []
    positions = max_tokens(config)
    if positions is not None:
        limits.append(positions)
    # transformers marks "no limit" by a huge number.
    if tokenizer.model_max_length < 1e9:
        limits.append(int(tokenizer.model_max_length))
    return min(limits, default=None)


def encode(tokenizer: Any, config: Any, texts: Sequence[Text], max_length: int | None, model: str) -> list[Tokens]:
    """One dict of equally long lists (`input_ids`, `attention_mask`, …) a text, unpadded, at most `max_length` long.

    Raises InputError when the tokenizer does not belong to the model, makes nothing of a text, or leaves no room for
    text within `max_length`.
    """
    rows = rows_of(model_inputs(tokenizer, texts, max_length, getattr(config, "type_vocab_size", 0)), config)
    check_rows(rows, config, model)
    return rows


def rows_of(columns: Mapping[str, Sequence[list[int]]], config: Any) -> list[Tokens]:
    """A tokenizer's columns as one dict a text; token types only for a model that has two of them."""
    typed = getattr(config, "type_vocab_size", 0) >= 2
    wanted = {name: values for name, values in columns.items() if name != "token_type_ids" or typed}
    return [dict(zip(wanted, values, strict=True)) for values in zip(*wanted.values(), strict=True)]


def check_rows(rows: Sequence[Tokens], config: Any, model: str) -> None:
    """Raises InputError for a row without tokens, or with one that the model does not have."""
    for number, row in enumerate(rows, start=1):
        if not row["input_ids"]:
            raise InputError(f"the tokenizer of {model} makes no tokens of row {number}")
        if max(row["input_ids"]) >= config.vocab_size:
            raise InputError(
                f"the tokenizer of {model} does not belong to it: it gives token {max(row['input_ids'])}, "
                f"the model knows {config.vocab_size}; restore the tokenizer files of its source"
            )


def cut(rows: Sequence[Tokens], batch_size: int) -> list[list[int]]:
    """Indices of `rows` in batches of `batch_size`, the shortest rows first, so that little is padded."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def collate(tokenizer: Any, rows: Sequence[Tokens]) -> Batch:
    """Rows as int64 tensors `[rows, tokens]`, padded to the longest on the tokenizer's side."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return dict(tokenizer.pad(columns, padding=True, return_tensors="pt"))
