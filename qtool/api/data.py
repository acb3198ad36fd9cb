"""What a job reads besides its model: calibration batches and the golden batch."""

import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.anatomy import max_tokens
from qtool.api.recipes import recipe_task
from qtool.errors import InputError, UnavailableError
from qtool.recipe import Recipe
from qtool.rows import Texts, find_text_columns, hub_name, hub_rows, split_file, texts_of

if TYPE_CHECKING:
    import torch

    from qtool.calibrate.generation import Alphabet
    from qtool.calibrate.sources import Batches
    from qtool.job import Event, Job


def calibration_batches(job: "Job") -> "Batches":
    """`calibration_events` without the events."""
    events = calibration_events(job)
    while True:
        try:
            next(events)
        except StopIteration as done:
            batches: Batches = done.value
            return batches


def calibration_events(job: "Job") -> "Generator[Event, None, Batches]":
    """The job's calibration data, as events that end with it.

    A task's training split, a file, our own sentences, random tokens, or text that the model writes itself. Causal
    language models read texts as they are scored: one after the other, in windows without padding.
    """
    from qtool.calibrate import sources

    if job.recipe.calibration.source == "self":
        return (yield from _own_text(job))
    if job.recipe.calibration.source == "random":
        return _random_tokens(job)
    size = _size(job)
    if job.anatomy.head_kind == "causal-lm":
        rows = size["num_samples"] * size["max_length"]  # a row and its end are a token at least
        texts, description = calibration_texts(job.recipe, rows)
        return sources.windows(_tokenizer(job), texts, **size, description=description)
    texts, description = calibration_texts(job.recipe)
    types = getattr(job.model.config, "type_vocab_size", 0)
    return sources.tokenize(_tokenizer(job), texts, **size, description=description, type_vocab_size=types)


def planned_batches(job: "Job") -> "Batches":
    """`calibration_batches`, but where the model would write them, random tokens stand for its text."""
    from dataclasses import replace

    if job.recipe.calibration.source != "self" or not job.reads_data:
        return calibration_batches(job)
    _alphabet(job)
    return replace(_random_tokens(job), description=_own_description(job))


def _size(job: "Job") -> dict[str, int]:
    """How many sequences of how many tokens, and how many in a batch."""
    wanted = job.recipe.calibration
    length = min(wanted.max_length, max_tokens(job.model.config) or wanted.max_length)
    return {"num_samples": wanted.num_samples, "batch_size": wanted.batch_size, "max_length": length}


def _random_tokens(job: "Job") -> "Batches":
    from qtool.calibrate.sources import random_tokens

    vocabulary = job.model.config.vocab_size
    return random_tokens(vocabulary, **_size(job), seed=job.recipe.seed, first_id=min(1000, vocabulary // 2))


def _tokenizer(job: "Job") -> Any:
    from qtool.evaluation.models import load_tokenizer

    tokenizer = load_tokenizer(job.source)
    if len(tokenizer) > job.model.config.vocab_size:
        raise InputError(
            f"{job.source}: the tokenizer has {len(tokenizer)} tokens, the model only {job.model.config.vocab_size}"
        )
    return tokenizer


def _alphabet(job: "Job") -> "Alphabet":
    """What the model writes with. Raises InputError for one that cannot write."""
    from qtool.calibrate.generation import Alphabet

    instead = "use calibration.source=builtin, random, or a file of texts"
    if job.anatomy.head_kind not in ("causal-lm", "masked-lm"):
        raise InputError(
            f"{job.anatomy.architecture} has no language-model head, so it writes no text itself; {instead}"
        )
    alphabet = Alphabet.of(_tokenizer(job), job.model.config.vocab_size)
    alphabet.room(_size(job)["max_length"])
    if job.anatomy.head_kind == "masked-lm" and alphabet.mask is None:
        raise InputError(f"{job.source}: the tokenizer has no mask token, so the model fills no text itself; {instead}")
    return alphabet


def _own_description(job: "Job") -> str:
    return f"{job.recipe.calibration.num_samples} sequences that the model wrote itself, seed {job.recipe.seed}"


def _own_text(job: "Job") -> "Generator[Event, None, Batches]":
    """Text of the float model, which is in memory whole meanwhile. Nothing is kept: it would write the same again."""
    from qtool.calibrate import generation, sources
    from qtool.checkpoint import open_float
    from qtool.job import Note, Progress, peak_bytes
    from qtool.stream import give_back, whole

    description, size = _own_description(job), _size(job)
    if not job.reads_data:
        return sources.unpadded([], description)
    alphabet = _alphabet(job)
    yield Note(
        f"calibration data: the model writes {size['num_samples']} sequences of {size['max_length']} tokens itself; "
        "for that it is in memory whole"
    )
    total, started = -(-size["num_samples"] // size["batch_size"]), time.perf_counter()
    found: list[torch.Tensor] = []
    yield Progress("write", "model in memory", 0, total)
    skeleton, checkpoint = open_float(job.source)
    model = whole(skeleton, checkpoint.tensor).to(job.device)
    masked = job.anatomy.head_kind == "masked-lm"
    for ids in generation.written_by(model, alphabet, masked=masked, seed=job.recipe.seed, **size):
        found.append(ids)
        seconds, started = time.perf_counter() - started, time.perf_counter()
        yield Progress("write", f"batch {len(found)}", len(found) - 1, total, seconds, peak_bytes())
    del model, skeleton
    give_back()
    return sources.unpadded(found, description)


def calibration_texts(recipe: Recipe, limit: int | None = None) -> tuple[Sequence[Any], str]:
    """The texts that the recipe calibrates on, and a word on where they are from.

    Of what is read from the hub or a task, `limit` texts suffice (default: the recipe's samples).
    """
    from qtool.calibrate import sources

    wanted, scored = recipe.calibration, recipe.evaluate
    limit = limit or wanted.num_samples
    source, column = wanted.source, wanted.text_column
    if source == "auto" and not scored.tasks and isinstance(scored.data, str):  # data without a task are text
        source, column = scored.data, column or next(iter(scored.text_columns or ()), None)
    if source == "auto":
        source = "task" if scored.tasks else "builtin"
    if source == "task":
        return _task_texts(recipe, limit)
    if source == "builtin":
        return sources.builtin_sentences(), "qtool's own 500 sentences"
    if (hub := hub_name(source)) is not None:
        return _hub_texts(*hub, column, limit), f"the training split of {source}"
    path = Path(source).expanduser()
    if path.is_dir():
        found = split_file(path, "train")
        if found is None:
            raise InputError(f"{path} has no train file (train.jsonl, .csv or .parquet) to calibrate on")
        path = found
    return sources.file_texts(path, column), f"the rows of {path.name}"


def _hub_texts(repo: str, config: str | None, column: str | None, count: int) -> Texts:
    """Up to `count` texts of a hub data set; corpora have many empty rows, so more are read."""
    try:
        rows = hub_rows(repo, config, "train", 4 * count)
    except UnavailableError as error:
        raise UnavailableError(f"no file or folder {repo} here, and {error}") from error
    columns = find_text_columns(rows, repo, [column] if column else [])
    return texts_of(rows, columns, repo, skip_missing=True)


def _task_texts(recipe: Recipe, limit: int) -> tuple[Sequence[Any], str]:
    from qtool.evaluation.tasks import calibration_split, load_texts

    task, wanted = recipe_task(recipe), recipe.evaluate
    data = wanted.data_of(task.name)
    split = calibration_split(task, data)
    texts = load_texts(task, data, split, limit, text_columns=wanted.text_columns)
    return texts, f"the {'training' if split == 'train' else split} split of {task.name}"


def golden_inputs(job: "Job", batches: "Batches") -> "dict[str, torch.Tensor]":
    """A small batch of qtool's own sentences: what is recorded in an artifact must not be somebody's data."""
    from qtool import golden
    from qtool.calibrate import sources
    from qtool.evaluation.models import load_tokenizer

    if job.recipe.calibration.source == "random":
        return batches.first(golden.SEQUENCES, golden.TOKENS)
    size = {"num_samples": golden.SEQUENCES, "batch_size": golden.SEQUENCES, "max_length": golden.TOKENS}
    tokenizer = load_tokenizer(job.source)
    known = job.model.config
    own = sources.tokenize(
        tokenizer, sources.builtin_sentences(), **size, description="qtool's own sentences",
        type_vocab_size=getattr(known, "type_vocab_size", 0),
    )  # fmt: skip
    return own.first(golden.SEQUENCES, max_tokens(known) or golden.TOKENS)
