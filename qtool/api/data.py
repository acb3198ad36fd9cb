"""What a job reads besides its model: calibration batches and the golden batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.anatomy import max_tokens
from qtool.api.recipes import recipe_task
from qtool.errors import InputError, UnavailableError
from qtool.recipe import Recipe
from qtool.rows import Texts, find_text_columns, hub_name, hub_rows, split_file, texts_of

if TYPE_CHECKING:
    import torch

    from qtool.calibrate.sources import Batches
    from qtool.pipeline import Job


def calibration_batches(job: "Job") -> "Batches":
    """The job's calibration data: a task's training split, a file, our own sentences, or random tokens."""
    from qtool.calibrate import sources
    from qtool.evaluation.models import load_tokenizer

    recipe, wanted = job.recipe, job.recipe.calibration
    size = {"num_samples": wanted.num_samples, "batch_size": wanted.batch_size}
    length = min(wanted.max_length, max_tokens(job.model.config) or wanted.max_length)
    if wanted.source == "random":
        vocabulary = job.model.config.vocab_size
        return sources.random_tokens(
            vocabulary, **size, max_length=length, seed=recipe.seed, first_id=min(1000, vocabulary // 2)
        )
    texts, description = calibration_texts(recipe)
    tokenizer = load_tokenizer(job.source)
    if len(tokenizer) > job.model.config.vocab_size:
        raise InputError(
            f"{job.source}: the tokenizer has {len(tokenizer)} tokens, the model only {job.model.config.vocab_size}"
        )
    types = getattr(job.model.config, "type_vocab_size", 0)
    return sources.tokenize(tokenizer, texts, **size, max_length=length, description=description, type_vocab_size=types)


def calibration_texts(recipe: Recipe) -> tuple[Sequence[Any], str]:
    """The texts that the recipe calibrates on, and a word on where they are from."""
    from qtool.calibrate import sources

    wanted, scored = recipe.calibration, recipe.evaluate
    source, column = wanted.source, wanted.text_column
    if source == "auto" and not scored.tasks and isinstance(scored.data, str):  # data without a task are text
        source, column = scored.data, column or next(iter(scored.text_columns or ()), None)
    if source == "auto":
        source = "task" if scored.tasks else "builtin"
    if source == "task":
        return _task_texts(recipe)
    if source == "builtin":
        return sources.builtin_sentences(), "qtool's own 500 sentences"
    if (hub := hub_name(source)) is not None:
        return _hub_texts(*hub, column, wanted.num_samples), f"the training split of {source}"
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


def _task_texts(recipe: Recipe) -> tuple[Sequence[Any], str]:
    from qtool.evaluation.tasks import calibration_split, load_texts

    task, wanted = recipe_task(recipe), recipe.evaluate
    data = wanted.data_of(task.name)
    split = calibration_split(task, data)
    texts = load_texts(task, data, split, recipe.calibration.num_samples, text_columns=wanted.text_columns)
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
