"""`bench`: who competes, on what, and the result; models of random weights where there is only a config."""

import tempfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.api.jobs import quantize_events
from qtool.api.recipes import resolve_recipe
from qtool.api.scores import recorded_source
from qtool.errors import InputError, UsageError

if TYPE_CHECKING:
    from qtool.bench.batches import Workload
    from qtool.bench.contest import Entry, Listener
    from qtool.bench.engines import Engine
    from qtool.bench.products import Products
    from qtool.bench.report import Report
    from qtool.bench.shapes import Limits, Shape
    from qtool.pipeline import Event

RANDOM_SETS = ("calibration.source=random", "calibration.num_samples=16")
"""Recipe keys for models of random weights: what calibrates them decides nothing."""


def bench(
    models: Sequence[str | Path],
    *,
    shapes: str | None = None,
    engines: Sequence[str] | None = None,
    data: Mapping[str, str] | str | None = None,
    rounds: int = 5,
    seconds: float = 0.5,
    threads: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    max_length: int | None = 128,
    load: float | None = None,
    listener: "Listener | None" = None,
    device: str = "cpu",
    cold_l2: bool = False,
) -> "Report":
    """Measure `models`, float ones on all `engines` (None: the default ones that are installed), artifacts on qtool.

    An engine that fails is part of the result. `load` is the load average before anything of ours ran [as it is now].
    `device` is `cpu`, `cuda` or `cuda:N`; with `cold_l2` a GPU's L2 cache is emptied before each timed call. Raises
    UsageError for unknown shapes or engines, InputError for models or data that cannot be used, UnavailableError where
    a package of an engine that was named is missing, or the GPU.
    """
    import torch

    from qtool.bench import contest, machine
    from qtool.bench import shapes as forms
    from qtool.bench.engines import chosen, with_cache
    from qtool.bench.report import Report
    from qtool.device import usable

    place = usable(device)
    if cold_l2 and place.type == "cpu":
        raise UsageError("cold_l2 is for a GPU; measure with device cuda")
    load = machine.load_average() if load is None else load
    listener = listener or contest.Silent()
    wanted = forms.parse(forms.DEFAULT if shapes is None else shapes)
    competing, missing = chosen(engines, place.type)
    if decoding := [shape.name for shape in wanted if isinstance(shape, forms.Decoding)]:
        competing, unable = with_cache(competing, decoding[0], engines is not None)
        missing += unable
    if machine.is_busy(load, torch.get_num_threads()):
        listener.note(f"this machine is busy (load average {load:.2f}): times will be off")
    entries, configs = lineup(models, competing)
    limits, first = forms.limits_of(configs), entries[0].folder
    settings = contest.Settings(rounds, seconds, threads or torch.get_num_threads(), device, cold_l2)
    workloads = [_workload(shape, limits, seed, first, data, max_length, limit) for shape in wanted]
    samples = forms.samples(first, limits, max_length, seed)
    everybody = contest.without_reference(entries)
    about, peaks, products = machine.describe(load), None, {}
    with tempfile.TemporaryDirectory(prefix="qtool-bench-") as made:
        scratch = Path(made).resolve()
        if place.type == "cuda":
            about["gpu"] = _gpu(place, listener)
            peaks = contest.peaks_of(first, settings, scratch, listener)
            products = _products(entries, listener)
        outcomes = contest.hold(everybody, workloads, samples, settings, scratch, limits.positions, listener)
    return Report(about, settings, seed, workloads, outcomes, missing, peaks, products)


def _gpu(device: Any, listener: "Listener") -> dict[str, Any]:
    """The GPU as it is before anything of ours runs, and a word where others use it."""
    from qtool.bench import gpu

    found = gpu.describe(device)
    if (used := found["utilization_percent"]) is not None and used > gpu.BUSY:
        listener.note(f"this GPU is busy ({used:.0f} % used by others): times will be off")
    return found


def _products(entries: "Sequence[Entry]", listener: "Listener") -> "dict[Path, Products]":
    """What the matrix products of each model take; a word on one where that cannot be counted."""
    from qtool.bench.products import products_of

    found = {}
    for entry in {entry.folder: entry for entry in entries}.values():
        try:
            found[entry.folder] = products_of(entry.folder)
        except (InputError, RuntimeError) as error:  # torch's, where a forward looks at values
            listener.note(f"the operations of {entry.model} are not counted: {error}")
    return found


def _workload(
    shape: "Shape",
    limits: "Limits",
    seed: int,
    model: Path,
    data: Mapping[str, str] | str | None,
    max_length: int | None,
    limit: int | None,
) -> "Workload":
    from qtool.bench import shapes as forms

    if isinstance(shape, forms.Fixed):
        return forms.fixed(shape, limits, seed)
    if isinstance(shape, forms.Decoding):
        return forms.decoding(shape, limits, seed)
    return forms.ragged(shape, model, limits, _place(data, shape.task), max_length, limit)


def _place(data: Mapping[str, str] | str | None, task: str) -> str | None:
    return data.get(task) if isinstance(data, Mapping) else data


def lineup(models: Sequence[str | Path], engines: "Sequence[Engine]") -> "tuple[list[Entry], dict[str, Any]]":
    """An entry for each float model on each engine and each artifact on qtool's, and the models' configs.

    Raises InputError for a model that cannot be used, or that is there twice.
    """
    from qtool import artifact
    from qtool.checkpoint import check, load_config, locate

    folders = {str(model): locate(model) for model in models}
    if not folders:
        raise UsageError("which models? Pass folders or hub names, or --random-init with a folder that holds a config")
    if len({folder.resolve() for folder in folders.values()}) < len(models):
        raise UsageError("a model is named twice")
    configs = {}
    for name, folder in folders.items():
        check(folder)
        configs[name] = load_config(folder)
        if getattr(configs[name], "quantization_config", None) is not None and not artifact.is_artifact(folder):
            raise InputError(f"{name} is quantized by something else; bench runs float models and qtool's artifacts")
    floats = {name: folder.resolve() for name, folder in folders.items() if not artifact.is_artifact(folder)}
    if floats and not engines:
        raise UsageError("no engine is left for the float models; name some with --engines")
    entries: list[Entry] = []
    for (name, folder), label in zip(folders.items(), _labels(list(folders.values())), strict=True):
        if name in floats:
            entries += _float_entries(label, floats[name], engines)
        else:
            entries.append(_artifact_entry(label, folder.resolve(), list(floats.values())))
    return entries, configs


def _labels(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the path as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(own[-depth:]) for own in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(folder) for folder in folders]


def _float_entries(label: str, folder: Path, engines: "Sequence[Engine]") -> "list[Entry]":
    from qtool.bench.contest import Entry

    return [Entry(label, folder, engine.name, reference=folder) for engine in engines]


def _artifact_entry(label: str, folder: Path, floats: Sequence[Path]) -> "Entry":
    """Compared with the float model that it was made from: one of those here, else the recorded one if it is intact."""
    from qtool import artifact
    from qtool.bench.contest import Entry

    config = artifact.quantization_config(folder)
    methods = config.get("methods", [])
    if not isinstance(methods, list):
        raise InputError(f"{label}: the methods in its config.json are no list; quantize the model again")
    report = artifact.report(folder) if (folder / artifact.REPORT).is_file() else {}
    kind = report.get("execution", {}).get("kind", "real")
    source = _source(folder)
    reference = source if source in floats or not floats else floats[0]
    return Entry(label, folder, "qtool", tuple(map(str, methods)), reference, simulated=kind != "real")


def _source(folder: Path) -> Path | None:
    try:
        found = recorded_source(folder)
    except InputError:
        return None
    return Path(found).resolve() if found else None


def random_models(
    config_folder: str | Path,
    folder: Path,
    *,
    methods: Sequence[str] = (),
    sets: Sequence[str] = (),
    seed: int = 0,
    threads: int | None = None,
) -> Generator["Event", None, list[Path]]:
    """A float model of random weights below `folder`, and an artifact of it for each method; ends with their folders.

    `config_folder` holds a config.json, and perhaps a tokenizer; `sets` are `key=value` of every recipe.
    """
    from qtool.bench.random import make

    source = make(Path(config_folder), folder, seed)
    made = [source]
    for method in methods:
        flags = {"seed": seed, **({"threads": threads} if threads else {})}
        recipe = resolve_recipe(sets=[*RANDOM_SETS, *sets], methods=[method], model=str(source), flags=flags)
        out = folder / f"{source.name}-{method}"
        yield from quantize_events(str(source), recipe, out, remember=False)
        made.append(out)
    return made
