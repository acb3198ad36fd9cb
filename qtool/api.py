"""qtool from Python: what the commands do, without their printing.

`quantize` and `evaluate` take the names of the command-line flags. The command line calls the same functions and
renders their events.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool import recipe as recipes
from qtool.anatomy import max_tokens
from qtool.errors import InputError, QtoolError, UsageError, one_of
from qtool.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from qtool.calibrate.sources import Batches
    from qtool.calibrate.statistics import Statistics
    from qtool.evaluation.result import Evaluation
    from qtool.evaluation.tasks import Task
    from qtool.pipeline import Event, Job

DEFAULT_FOLDER = "qtool-out"
LATEST = "latest"


@dataclass(frozen=True)
class Quantized:
    """What a successful run leaves."""

    path: Path
    size_bytes: int
    source_bytes: int
    seconds: float
    peak_bytes: int


def resolve_recipe(
    *,
    config: str | None = None,
    sets: Sequence[str] = (),
    methods: Sequence[str] = (),
    model: str | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Recipe:
    """Merge the layers; `flags` holds only what was given, by its name in `FLAG_KEYS`.

    Raises UsageError for an unknown method or task among the arguments, InputError for one in the recipe file.
    """
    from qtool.evaluation.tasks import task
    from qtool.methods import METHODS, entry

    for name in methods:
        entry(name)
    given = _recipe_keys(flags or {})
    if "evaluate.task" in given:
        task(given["evaluate.task"])
    if model is not None:
        given["model.name"] = model
    file = recipes.read(config) if config else {}
    listed = recipes.method_list(file.get("methods"))
    for item in listed:
        if item["name"] not in METHODS:
            raise InputError(f"{config}: {one_of(item['name'], list(METHODS), 'method')}")
    names = methods or [item["name"] for item in listed]
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if "weights" not in file and "activations" not in file:
        layers += [(f"preset {entry(name).preset}", recipes.preset(entry(name).preset)) for name in names]
    layers.append((config or "recipe", file))
    if methods:
        layers.append(("--method", {"methods": _chosen(methods, listed)}))
    layers.append(("--set", recipes.assignments(sets)))
    layers.append(("command line", recipes.nested(given)))
    built = recipes.build(layers)
    if not built.methods:
        if config is None:
            raise UsageError("which method? Pass --method (`qtool methods` lists them) or a recipe with -c")
        raise InputError(f"{config} names no method; list one under methods, or pass --method")
    return built


FLAG_KEYS: dict[str, tuple[str, ...]] = {
    "task": ("evaluate.task",),
    "data": ("evaluate.data",),
    "text_columns": ("evaluate.text_columns",),
    "num_samples": ("calibration.num_samples",),
    "max_length": ("calibration.max_length", "evaluate.max_length"),
    "batch_size": ("calibration.batch_size", "evaluate.batch_size"),
    "revision": ("model.revision",),
    "seed": ("seed",),
    "threads": ("threads",),
}
"""Recipe keys that a flag of the command line, or the argument of `quantize` with its name, sets."""


def _recipe_keys(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted recipe keys for `flags`."""
    keys: dict[str, Any] = {}
    for name, value in flags.items():
        plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        keys |= dict.fromkeys(FLAG_KEYS[name], plain)
    return keys


def _chosen(methods: Sequence[str], known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`--method` picks; options that the file gives to the same method stay."""
    options = {item["name"]: item for item in known}
    return [options.get(name, {"name": name}) for name in methods]


def default_output(model: str, recipe: Recipe) -> Path:
    """`qtool-out/<model>-<method>`."""
    name = Path(model).name or Path(model).resolve().name
    return Path(DEFAULT_FOLDER) / "-".join([name, *(method.name for method in recipe.methods)])


def set_threads(recipe: Recipe, fingerprint: Mapping[str, Any] | None = None) -> None:
    """The recorded threads of a run that is resumed, else the recipe's, else torch's own choice."""
    import torch

    threads = (fingerprint or {}).get("threads") or recipe.threads
    if threads:
        torch.set_num_threads(int(threads))


def open_job(model: str, recipe: Recipe) -> "Job":
    """Find the model and check that the recipe fits it and that it can be run here; nothing is computed yet."""
    from qtool.checkpoint import locate
    from qtool.kernels import backend
    from qtool.pipeline import Job

    backend()
    return Job(locate(model, recipe.model.revision), model, recipe)


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
    if source == "auto" and scored.task is None and scored.data is not None:  # data without a task are text
        source, column = scored.data, column or next(iter(scored.text_columns or ()), None)
    if source == "auto":
        source = "task" if scored.task else "builtin"
    if source == "task":
        return _task_texts(recipe)
    if source == "builtin":
        return sources.builtin_sentences(), "qtool's own 500 sentences"
    path = Path(source)
    if path.is_dir():
        from qtool.rows import split_file

        found = split_file(path, "train")
        if found is None:
            raise InputError(f"{path} has no train file (train.jsonl, .csv or .parquet) to calibrate on")
        path = found
    return sources.file_texts(path, column), f"the rows of {path.name}"


def recipe_task(recipe: Recipe) -> "Task":
    """The task of the recipe. Raises InputError when it is unknown or not given."""
    from qtool.evaluation.tasks import task

    if recipe.evaluate.task is None:
        raise InputError("the recipe names no task; pass --task or set evaluate.task")
    try:
        return task(recipe.evaluate.task)
    except UsageError as error:
        raise InputError(f"evaluate.task: {error}") from error


def _task_texts(recipe: Recipe) -> tuple[Sequence[Any], str]:
    from qtool.evaluation.tasks import load_texts

    wanted = recipe.evaluate
    texts = load_texts(
        recipe_task(recipe), wanted.data, "train", recipe.calibration.num_samples, text_columns=wanted.text_columns
    )
    return texts, f"the training split of {wanted.task}"


def read_statistics(path: str | Path, job: "Job", batches: "Batches") -> "Statistics":
    """Statistics from a file. Raises InputError unless they were made from this model, data and these observers."""
    from qtool.calibrate.statistics import Statistics

    statistics = Statistics.read(Path(path))
    statistics.require(job.statistics_fingerprint(batches), str(path))
    return statistics


def quantize_events(
    model: str,
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    statistics: str | Path | None = None,
) -> Generator["Event", None, Quantized]:
    """Quantize `model` into `out`, as events that end with the result."""
    import time

    from qtool import pipeline, rundir
    from qtool.artifact import size_on_disk

    started = time.perf_counter()
    rundir.check_output(out, resume=resume, overwrite=overwrite)
    read = (recipe.evaluate.data, recipe.evaluate.baseline, recipe.calibration.source, statistics)
    rundir.keep_apart(out, *(Path(path) for path in read if path and Path(path).exists()))
    set_threads(recipe, (rundir.recorded(out) or rundir.published(out)) if resume else None)
    job = open_job(model, recipe)
    rundir.keep_apart(out, job.source)
    source_bytes = job.checkpoint.num_bytes
    batches = calibration_batches(job)
    yield pipeline.Note(_about_calibration(job, batches, statistics))
    known = read_statistics(statistics, job, batches) if statistics else None
    fingerprint = job.fingerprint(batches, Path(statistics) if statistics else None)
    run = rundir.RunDirectory(out, fingerprint, resume=resume, overwrite=overwrite)
    with closing(run):
        try:
            yield from pipeline.quantize(job, batches, golden_inputs(job, batches), run, known)
        except QtoolError:
            run.discard_if_empty()
            raise
    note_latest(out)
    seconds = time.perf_counter() - started
    return Quantized(out, size_on_disk(out), source_bytes, seconds, pipeline.peak_bytes())


def _about_calibration(job: "Job", batches: "Batches", statistics: str | Path | None) -> str:
    if not job.observed():
        return "no calibration pass: this recipe computes the scales of activations at run time"
    return (
        f"statistics: {statistics}"
        if statistics
        else f"calibration data: {batches.description}, {batches.num_tokens} tokens"
    )


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


def note_latest(out: Path) -> None:
    """`qtool-out/latest` names the newest artifact; a place that cannot be written is no reason to fail."""
    from qtool.artifact import write_text
    from qtool.errors import UnavailableError

    try:
        Path(DEFAULT_FOLDER).mkdir(exist_ok=True)
        write_text(Path(DEFAULT_FOLDER) / LATEST, f"{out.resolve()}\n")
    except (OSError, UnavailableError):
        return


def latest() -> Path:
    """The artifact of the last successful `quantize` in this working directory. Raises InputError without one."""
    note = Path(DEFAULT_FOLDER) / LATEST
    try:
        path = Path(note.read_text("utf-8").strip())
    except OSError:
        raise InputError(f"no MODEL given and no {note} here; quantize something first or name a model") from None
    if not path.is_dir():
        raise InputError(f"{note} names {path}, which is gone; name a model")
    return path


def quantize(
    model: str,
    *,
    method: str | Sequence[str] = (),
    config: str | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    statistics: str | Path | None = None,
    set: Sequence[str] = (),
    **flags: Any,
) -> Quantized:
    """Quantize the float `model` (folder or hub name) and return where the artifact is.

    `set` takes `key=value` strings of the recipe, `flags` the names in `FLAG_KEYS` (task, data, num_samples, …). Raises
    QtoolError subclasses, as the command does, and TypeError for an argument that does not exist.
    """
    if unknown := [name for name in flags if name not in FLAG_KEYS]:
        raise TypeError(one_of(unknown[0], list(FLAG_KEYS), "argument"))
    methods = [method] if isinstance(method, str) else list(method)
    given = {name: value for name, value in flags.items() if value is not None}
    recipe = resolve_recipe(config=config, sets=set, methods=methods, model=model, flags=given)
    out = Path(output or recipe.output or default_output(model, recipe))
    events = quantize_events(model, recipe, out, resume=resume, overwrite=overwrite, statistics=statistics)
    while True:
        try:
            next(events)
        except StopIteration as done:
            result: Quantized = done.value
            return result


def calibrate_events(
    model: str, recipe: Recipe, file: Path, *, overwrite: bool = False
) -> Generator["Event", None, int]:
    """Pass 1 alone, into a statistics file; ends with the number of activations that were observed."""
    from qtool import pipeline
    from qtool.artifact import write_tensors

    if file.exists() and not overwrite:
        raise InputError(f"{file} exists; choose another -o or pass --overwrite")
    if not file.parent.is_dir():
        raise InputError(f"{file.parent} does not exist; make the folder first")
    set_threads(recipe)
    job = open_job(model, recipe)
    if not job.observed():
        names = ", ".join(method.name for method in job.methods)
        raise InputError(f"{names} needs no statistics with this recipe: activation scales are computed at run time")
    batches = calibration_batches(job)
    yield pipeline.Note(f"calibration data: {batches.description}")
    statistics = yield from pipeline.calibrate(job, batches)
    write_tensors(file, statistics.tensors())
    return len(statistics.states)


def evaluate(model: str | Path | None, task: str, **options: Any) -> "Evaluation":
    """Score `model` (None: the newest artifact) on `task`; options as `qtool.evaluation.runner.evaluate`.

    Without `baseline`, an artifact is compared with the float model that it was made from, if that is still there.
    """
    from qtool.evaluation import runner, tasks

    chosen = tasks.task(task)
    target = model or latest()
    if options.get("baseline") is None:
        options["baseline"] = recorded_source(target)
    return runner.evaluate(target, chosen, **options)


def recorded_source(model: str | Path) -> str | None:
    """The float model that the artifact `model` was made from; None for a float model.

    Raises InputError when it is gone or is no longer the model that was quantized.
    """
    from qtool.artifact import is_artifact, report
    from qtool.checkpoint import Checkpoint, load_config, locate, skeleton

    folder = locate(model)
    if not is_artifact(folder):
        return None
    source = report(folder)["source"]
    if not {"name", "sha256"} <= source.keys():
        raise InputError(f"{model} does not record its float model (qtool.json is damaged); pass --baseline")
    try:
        path = locate(source["name"], source.get("revision"))
    except QtoolError as error:
        raise InputError(f"the float model that {model} was made from is gone ({error}); pass --baseline") from error
    if Checkpoint(path, skeleton(load_config(path))).digest() != source["sha256"]:
        raise InputError(f"{source['name']} has changed since {model} was made from it; pass --baseline")
    return str(path)


def baseline_for(model: str | Path, *, required: bool) -> tuple[str | None, str | None]:
    """The recorded source, or None with the reason (if any) when there is none and no gate needs it."""
    try:
        source = recorded_source(model)
    except InputError as error:
        if required:
            raise
        return None, f"no baseline: {error}"
    if source is None and required:
        raise InputError(f"a gate compares with a float baseline, and {model} is a float model itself; pass --baseline")
    return source, None


def evaluate_recipe(out: Path, source: str, recipe: Recipe, progress: Any = None) -> "Evaluation":
    """What the recipe's `evaluate` section asks for, against the float model it names, or `source`."""
    from qtool.checkpoint import locate
    from qtool.evaluation import runner

    wanted = recipe.evaluate.model_dump(exclude={"task", "baseline"})
    baseline = recipe.evaluate.baseline or locate(source, recipe.model.revision)
    return runner.evaluate(out, recipe_task(recipe), baseline=baseline, progress=progress, **wanted)


def record_scores(out: Path, result: "Evaluation") -> None:
    """Keep the scores of `qtool run` in the artifact's report."""
    from qtool.artifact import REPORT, report, write_json

    write_json(out / REPORT, {**report(out), "scores": [result.to_json()]}, sort=False)
