"""What is asked of the engines: `8x128` is eight sequences of 128 random tokens, `sst2:32` the sentences of a task,
`1@128` the token behind 128 others that a cache holds.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtool.bench.batches import Batch, Workload
from qtool.bench.contest import Samples
from qtool.errors import InputError, UsageError

DEFAULT = "1x32,1x128,8x128,1x384"
_SAMPLE, _TOGETHER, _TOKENS = 64, 8, 128  # sequences of each sample, sequences in a batch, tokens of random ones


@dataclass(frozen=True)
class Fixed:
    """Random ids without padding."""

    batch: int
    tokens: int

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.batch}x{self.tokens}"


@dataclass(frozen=True)
class Ragged:
    """Texts of a task in the order of the data, `batch` at a time, padded to the longest of each batch."""

    task: str
    batch: int

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.task}:{self.batch}"


@dataclass(frozen=True)
class Decoding:
    """One more token of each of `batch` sequences, behind `context` random ones in a cache."""

    batch: int
    context: int

    @property
    def name(self) -> str:
        """As it is written."""
        return f"{self.batch}@{self.context}"


Shape = Fixed | Ragged | Decoding


@dataclass(frozen=True)
class Limits:
    """What every model of a run can take: ids below `vocabulary`, positions (None: no limit), token types or none.

    `causal` is whether all of them are causal language models.
    """

    vocabulary: int
    positions: int | None
    typed: bool
    causal: bool = False


def parse(text: str) -> list[Shape]:
    """Shapes separated by commas. Raises UsageError for what is none, an unknown task, and one that is there twice."""
    shapes = [_parse(part.strip()) for part in text.split(",")]
    names = [shape.name for shape in shapes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"shape {twice[0]} is there twice")
    return shapes


def _parse(text: str) -> Shape:
    from qtool.evaluation.tasks import task

    if fixed := re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,6})", text):
        return Fixed(int(fixed[1]), int(fixed[2]))
    if ragged := re.fullmatch(r"([A-Za-z][\w-]*):([1-9]\d{0,5})", text):
        return Ragged(task(ragged[1]).name, int(ragged[2]))
    if decoding := re.fullmatch(r"([1-9]\d{0,5})@([1-9]\d{0,6})", text):
        return Decoding(int(decoding[1]), int(decoding[2]))
    raise UsageError(
        f"'{text}' is no shape: write BATCHxTOKENS, such as 8x128, TASK:BATCH, such as sst2:32, or BATCH@CONTEXT, such "
        "as 1@128"
    )


def limits_of(configs: Mapping[str, Any]) -> Limits:
    """The least of all models' limits, by the configs of transformers under the models' names."""
    from qtool.anatomy import HEADS, max_tokens

    for name, config in configs.items():
        if not hasattr(config, "vocab_size"):
            raise InputError(f"{name} takes no tokens; bench runs models of text")
    positions = [found for config in configs.values() if (found := max_tokens(config)) is not None]
    typed = [getattr(config, "type_vocab_size", 0) >= 2 for config in configs.values()]
    writing = tuple(suffix for suffix, kind in HEADS.items() if kind == "causal-lm")
    causal = all((config.architectures or [""])[0].endswith(writing) for config in configs.values())
    return Limits(
        min(config.vocab_size for config in configs.values()), min(positions, default=None), all(typed), causal
    )


def fixed(shape: Fixed, limits: Limits, seed: int) -> Workload:
    """One batch. Raises InputError for more tokens than a model has positions."""
    if limits.positions is not None and shape.tokens > limits.positions:
        raise InputError(f"shape {shape.name}: the model has {limits.positions} positions; ask for fewer tokens")
    first = min(1000, limits.vocabulary // 2)  # tokens that mean something come after the special ones
    draw = np.random.default_rng([seed, shape.batch, shape.tokens])
    ids = draw.integers(first, limits.vocabulary, (shape.batch, shape.tokens), dtype=np.int64)
    return Workload(shape.name, [_whole({"input_ids": ids, "attention_mask": np.ones_like(ids)}, limits)])


def decoding(shape: Decoding, limits: Limits, seed: int) -> Workload:
    """One batch. Raises InputError where not all models are causal language models, or have fewer positions."""
    if not limits.causal:
        raise InputError(f"shape {shape.name} is for causal language models; measure others on shapes such as 1x128")
    whole = fixed(Fixed(shape.batch, shape.context + 1), limits, seed)
    return Workload(shape.name, whole.batches, context=shape.context)


def ragged(
    shape: Ragged, model: Path, limits: Limits, data: str | None, max_length: int | None, limit: int | None
) -> Workload:
    """Batches of real texts, tokenized as `model` does. Raises InputError for data or a tokenizer that do not fit."""
    from qtool.evaluation import tasks

    task = tasks.task(shape.task)
    texts = tasks.load_texts(task, data, task.default_split, limit)
    if not texts:
        raise InputError(f"task {task.name}: the data hold no text")
    return Workload(shape.name, tokenized(model, texts, shape.batch, limits, max_length), ragged=True)


def tokenized(model: Path, texts: Sequence[Any], size: int, limits: Limits, max_length: int | None) -> list[Batch]:
    """Texts in their order, `size` at a time, each batch padded to its longest."""
    from qtool.checkpoint import load_config
    from qtool.evaluation.batches import collate, encode, longest
    from qtool.evaluation.models import load_tokenizer

    tokenizer, config = load_tokenizer(model), load_config(model)
    length = min((n for n in (longest(config, tokenizer, max_length), limits.positions) if n is not None), default=None)
    rows = encode(tokenizer, config, texts, length, str(model))
    if max(max(row["input_ids"]) for row in rows) >= limits.vocabulary:
        raise InputError(f"the tokens of {model.name} are not those of every model here; compare those models apart")
    cut = [rows[start : start + size] for start in range(0, len(rows), size)]
    batches = [collate(tokenizer, part) for part in cut]
    return [_whole({name: value.numpy() for name, value in batch.items()}, limits) for batch in batches]


def samples(model: Path, limits: Limits, max_length: int | None, seed: int) -> Samples:
    """Sentences of qtool's own, some to calibrate on and others to compare outputs on.

    Random tokens where the model has no tokenizer, or one that does not fit.
    """
    from qtool.calibrate.sources import builtin_sentences

    try:
        batches = tokenized(model, builtin_sentences()[: 2 * _SAMPLE], _TOGETHER, limits, max_length)
        texts = True
    except InputError:
        size = Fixed(_TOGETHER, min(_TOKENS, limits.positions or _TOKENS))
        batches = [fixed(size, limits, seed + number).batches[0] for number in range(2 * _SAMPLE // _TOGETHER)]
        texts = False
    half = len(batches) // 2
    return Samples(Workload("calibration", batches[:half], texts), Workload("check", batches[half:], texts))


def _whole(batch: Mapping[str, Any], limits: Limits) -> Batch:
    """The same inputs in every batch of a run: token types where all models have them."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    types = {"token_type_ids": batch.get("token_type_ids", np.zeros_like(ids))} if limits.typed else {}
    return {"input_ids": ids, "attention_mask": mask, **types}
