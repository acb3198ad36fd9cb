"""`analyze_attention`: what a model's attention is like and what it tolerates, as JSON and as a page."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.errors import InputError

if TYPE_CHECKING:
    from qtool.analysis.study import Asked, Body
    from qtool.evaluation.variants import Variants

RESULT, PAGE, LOCK = "attention.json", "attention.html", "attention.lock"


@dataclass(frozen=True)
class AttentionRequest:
    """What is studied and how the task is scored; names are those of the command's flags.

    `artifacts` are quantized models that are shown beside the plain forms, such as those of the method `logattn`.
    `exam` are options of `qtool.evaluation.exams.Request` (data, split, limit, max_length, …). `device` is where models
    compute: cpu, cuda or cuda:N.
    """

    thresholds: tuple[float, ...] | None = None
    bits: tuple[int, ...] | None = None
    bits_thresholds: tuple[float, ...] | None = None
    sweep: bool = True
    artifacts: tuple[str, ...] = ()
    exam: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    threads: int | None = None
    device: str = "cpu"
    allow_weak_baseline: bool = False

    def asked(self) -> "Asked":
        """Raises UsageError for a threshold or a number of bits that cannot be."""
        from qtool.analysis.study import Asked

        given = {"thresholds": self.thresholds, "bits": self.bits, "bits_thresholds": self.bits_thresholds}
        named: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return Asked(**named, sweep=self.sweep, artifacts=tuple(dict.fromkeys(self.artifacts)))


def analyze_attention(
    model: str | Path,
    task: str,
    out: str | Path,
    request: AttentionRequest | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    png: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> "Body":
    """Study the attention of a float model on a task; `out` gets attention.json and attention.html, `png` every figure.

    Both files are written anew after each part that is finished, so that a run that was killed goes on with `resume`.
    `out` is locked against other processes meanwhile. Ranks share the points; the first one reads and writes `out`.

    Raises UsageError for what cannot be asked, InputError for a model, data or an output that cannot be used,
    UnavailableError where figures are wanted as PNG and the package for that is missing.
    """
    from qtool import ranks
    from qtool.analysis.picture import require_renderer
    from qtool.analysis.study import study
    from qtool.device import usable
    from qtool.evaluation.exams import Request
    from qtool.evaluation.runner import torch_threads
    from qtool.evaluation.tasks import task as task_named
    from qtool.evaluation.variants import Variants
    from qtool.rundir import locked

    wanted, folder, chosen = request or AttentionRequest(), Path(out), task_named(task)
    asked = wanted.asked()
    usable(wanted.device)
    if png:
        require_renderer()
    group = ranks.current()
    with locked(folder / LOCK) if group.first else nullcontext(), torch_threads(wanted.threads):
        left = _prepare(folder, resume=resume, overwrite=overwrite) if group.first else None
        known = group.told("study so far", left)
        variants = Variants(
            model,
            chosen,
            Request(**wanted.exam),
            revision=wanted.revision,
            allow_weak=wanted.allow_weak_baseline,
            device=wanted.device,
            progress=progress,
        )
        fingerprint = _fingerprint(variants, wanted)
        group.agree("study of attention", fingerprint)
        write = partial(_write, folder) if group.first else _nowhere
        body = study(variants, asked, fingerprint, write, known)
        write(body)
        if png and group.first:
            _draw(folder, body)
    return body


def _prepare(folder: Path, *, resume: bool, overwrite: bool) -> "Body | None":
    """What an earlier run left. Raises InputError for an output that is taken."""
    from qtool.analysis.written import read_study

    there = folder / RESULT
    if not there.exists() or overwrite:
        return None
    if not resume:
        raise InputError(f"{folder} holds a study; go on with --resume, or start again with --overwrite")
    return read_study(there)


def _fingerprint(variants: "Variants", wanted: AttentionRequest) -> dict[str, Any]:
    """Everything that a point depends on beside its own setting."""
    import torch

    from qtool.checkpoint import Checkpoint, load_config, locate, skeleton
    from qtool.job import instruction_set, versions

    about = variants.about()
    path = locate(about["model"], wanted.revision)
    elsewhere = ("versions", "threads", "device")
    used = {name: value for name, value in about["settings"].items() if name not in elsewhere}
    return {
        "model": Checkpoint(path, skeleton(load_config(path))).digest(),
        "task": about["task"],
        "data": variants.digest(),
        **used,
        "threads": torch.get_num_threads(),
        "instruction set": instruction_set(variants.device),
        "versions": versions(),
    }


def _nowhere(body: "Body") -> None:
    """What ranks that do not publish do with a result."""


def _write(folder: Path, body: "Body") -> None:
    from qtool.analysis.attention_page import page_of
    from qtool.analysis.page import html
    from qtool.artifact import write_json, write_text, writing_failed

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_failed(folder, error) from error
    write_json(folder / RESULT, body, sort=False)
    write_text(folder / PAGE, html(page_of(body)))


def _draw(folder: Path, body: "Body") -> None:
    """Every figure of the page as a picture of its own."""
    from qtool.analysis.attention_page import page_of
    from qtool.analysis.page import standalone
    from qtool.analysis.picture import write_png

    for name, figure in page_of(body).figures():
        write_png(standalone(figure), folder / f"attention-{name}.png")
