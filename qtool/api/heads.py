"""`analyze heads`: which attention heads a model can do without, found on one part of the data and told on another."""

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.aside import folder_aside
from qtool.errors import InputError, UsageError, one_of

if TYPE_CHECKING:
    from qtool.analysis.heads import Judge, Kind
    from qtool.analysis.kept import Kept
    from qtool.analysis.search import Found, Head, Heads, Metric
    from qtool.evaluation.exams import Exam, Request
    from qtool.evaluation.exams.base import Progress
    from qtool.evaluation.sides import Side
    from qtool.evaluation.tasks import Task
    from qtool.rows import Split

RESULT, MEASURED = "heads.json", "evaluated.jsonl"
"""Files in the output folder: the result, which `headprune` takes, and every set that was measured."""
HALVES = ("search.jsonl", "held-out.jsonl")
"""Files there with the two halves of data that have no other split to search on."""
SEARCHES = ("astar", "greedy", "gradient")


@dataclass(frozen=True)
class HeadsRequest:
    """What is asked: the metric that is kept up and by how much it may drop, the search and its limits, and the data.

    `max_drop` is in the unit of the metric (None: `analysis.heads.BUDGETS`), `limit` how many examples are searched on
    from the start of `split` (None: the split that calibrates), `protected` heads that stay (None: all of a layer).
    `max_evaluations` of None are as many as it takes to rank all heads and to remove them one by one; `threads` are
    torch's while it lasts (None: as they are), `device` is where the model computes: cpu, cuda or cuda:N.
    """

    metric: str = "score"
    search: str = "astar"
    max_drop: float | None = None
    limit: int = 1000
    max_evaluations: int | None = None
    max_seconds: float | None = None
    target: int | None = None
    branching: int = 8
    protected: Sequence[tuple[int, int | None]] = ()
    data: str | None = None
    split: "Split | None" = None
    text_columns: Sequence[str] | None = None
    label_column: str | None = None
    max_length: int | None = None
    batch_size: int | None = None
    revision: str | None = None
    threads: int | None = None
    device: str = "cpu"

    @property
    def budget(self) -> float:
        """What may be lost, in the unit of the metric."""
        from qtool.analysis.heads import BUDGETS

        return BUDGETS[self.metric] if self.max_drop is None else self.max_drop

    def exam_request(self, data: str | None, split: "Split | None", limit: int | None) -> "Request":
        """What exams are asked for on one part of the data."""
        from qtool.evaluation.exams import Request

        columns = self.text_columns or None, self.label_column
        return Request(data, split, limit, *columns, self.batch_size, self.max_length)


def analyze_heads(
    model: str | Path,
    task: str,
    out: str | Path,
    request: HeadsRequest | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: "Progress | None" = None,
) -> dict[str, Any]:
    """Search heads of the float `model` that `task` does not need; writes `heads.json` into `out` and returns it.

    Every set that is measured is kept in `out`, so that `resume` after a kill ends with the same result, and further
    searches of the same model, data and metric start from what is known.

    Raises UsageError for an unknown task, metric or search, InputError for a model or data that cannot be used.
    """
    from qtool import ranks
    from qtool.analysis.heads import Judge
    from qtool.analysis.outcome import outcome
    from qtool.device import usable
    from qtool.evaluation.runner import torch_threads
    from qtool.evaluation.tasks import task as task_named

    usable(request.device if request else "cpu")
    wanted, chosen, group = request or HeadsRequest(), task_named(task), ranks.current()
    kind = _known(wanted)
    report = progress or (lambda stage, done, total: None)
    with torch_threads(wanted.threads), _folder(Path(out)) as folder:
        if group.first:
            _prepare(folder, resume=resume, overwrite=overwrite)
        exams = _exams(chosen, wanted, folder)
        sides = _sides(str(model), exams, wanted, report)
        fingerprint = _fingerprint(sides[0], exams[0], wanted)
        group.agree("search for heads", fingerprint)
        judge = Judge(exams[0], sides[0], kind, group)
        _check_knows(judge, wanted.metric)
        body = None
        if group.first:
            asked = {"model": str(model), "metric": wanted.metric, "search": wanted.search, "max_drop": wanted.budget}
            searched = _lead_search(judge, folder, fingerprint, report, wanted, fresh=overwrite)
            body = outcome(asked, judge, *searched, exams[1], sides[1])
            judge.dismiss()
            _write(folder, body, fingerprint)
        else:
            judge.serve()
    return dict(group.told("heads found", body))


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """Where a rank writes: the first one into the output, another where nobody looks."""
    from qtool.ranks import current

    if current().first:
        yield out
        return
    with folder_aside() as folder:
        yield folder


def _lead_search(
    judge: "Judge",
    folder: Path,
    fingerprint: dict[str, Any],
    report: "Progress",
    wanted: HeadsRequest,
    *,
    fresh: bool,
) -> "tuple[Found, dict[Heads, float], dict[Head, float]]":
    """What the search found, every set that is known, and the importance of heads where it goes by that.

    With `fresh` what was known goes, and its result, now that nothing is left that could be wrong.
    """
    from qtool.analysis.kept import Kept

    with closing(Kept(folder / MEASURED, fingerprint, judge, fresh=fresh)) as kept:
        if fresh:
            (folder / RESULT).unlink(missing_ok=True)
        found, importance = _searched(judge, kept, report, wanted)
    return found, kept.found, importance


def _write(folder: Path, body: dict[str, Any], fingerprint: dict[str, Any]) -> None:
    """The result, with what it is of: `headprune` looks whether its model is this one."""
    from qtool.artifact import write_json

    body["fingerprint"] = fingerprint
    write_json(folder / RESULT, body, sort=False)


def _known(wanted: HeadsRequest) -> "Kind":
    """The metric. Raises UsageError for an unknown one, or an unknown search."""
    from qtool.analysis.heads import BUDGETS

    for name, value, known in (("metric", wanted.metric, [*BUDGETS]), ("search", wanted.search, [*SEARCHES])):
        if value not in known:
            raise UsageError(one_of(value, known, name))
    for name in ("max_drop", "max_seconds"):
        value = getattr(wanted, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UsageError(f"{name} is a number of 0 or more, not {value}")
    kind: Any = wanted.metric
    return kind  # type: ignore[no-any-return]


def _prepare(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """An output folder that holds nothing but what this command made. Raises InputError or UnavailableError."""
    from qtool.artifact import writing_failed

    ours = (RESULT, MEASURED, *HALVES)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = {path.name for path in folder.iterdir()}
        if foreign := sorted(there - set(ours)):
            raise InputError(f"{folder} holds other files ({foreign[0]}); choose another -o")
        if there and not (resume or overwrite):
            raise InputError(f"{folder} holds a search; go on with --resume, or start again with --overwrite")
    except OSError as error:
        raise writing_failed(folder, error) from error


def _exams(task: "Task", wanted: HeadsRequest, folder: Path) -> "tuple[Exam, Exam]":
    """The examples that are searched on, and others on which the result is told."""
    from qtool.evaluation.exams import exam_class

    cls = exam_class(task)
    parts = _split_apart(task, wanted) or _halves(task, wanted, folder)
    requests = [wanted.exam_request(*part) for part in parts]
    for one in requests:
        cls.check_options(task, one)
    search, held_out = (cls(task, one) for one in requests)
    return search, held_out


def _split_apart(task: "Task", wanted: HeadsRequest) -> "list[tuple[str | None, Split | None, int | None]] | None":
    """Two splits that the data have: where, which, how much; None where there is only one."""
    from qtool.evaluation.tasks import calibration_split
    from qtool.rows import hub_name, split_file

    split = wanted.split or calibration_split(task, wanted.data)
    told = task.default_split
    if split == told:
        if wanted.split is not None:
            raise UsageError(f"--split {split} is what the result is told on; search on another, or leave it out")
        return None
    if wanted.data is not None and hub_name(wanted.data) is None:
        place = Path(wanted.data).expanduser()
        files = {one: split_file(place, one, task.splits.get(one)) for one in (split, told)}
        if files[split] is None and wanted.split is not None:
            raise InputError(f"{place} has no data for {split}; leave out --split to search on half of {told}")
        if place.is_file() or files[split] is None:
            return None
    return [(wanted.data, split, wanted.limit), (wanted.data, told, None)]


def _halves(task: "Task", wanted: HeadsRequest, folder: Path) -> "list[tuple[str | None, Split | None, int | None]]":
    """The rows of the one split that there is, cut in the middle into two files."""
    from qtool.artifact import write_text
    from qtool.evaluation.tasks import load_rows

    rows, source = load_rows(task, wanted.data, task.default_split)
    if len(rows) < 2:
        raise InputError(f"{source} has one row: none is left to tell the result on")
    middle = len(rows) // 2
    for name, own in zip(HALVES, (rows[:middle], rows[middle:]), strict=True):
        write_text(folder / name, "".join(json.dumps(row, default=str) + "\n" for row in own))
    search, held_out = (str(folder / name) for name in HALVES)
    return [(search, None, wanted.limit), (held_out, None, None)]


def _sides(model: str, exams: "tuple[Exam, Exam]", wanted: HeadsRequest, report: "Progress") -> "tuple[Side, Side]":
    """The model before both exams, loaded once. Raises InputError for one that is quantized."""
    import torch

    from qtool.device import usable
    from qtool.evaluation.models import subject
    from qtool.evaluation.sides import Side, load_sides

    item, device = subject(model, exams[0].task, wanted.revision), usable(wanted.device)
    if item.quantized:
        raise InputError(f"{model} is quantized; heads are looked for in the float model that it was made from")
    for exam in exams:
        exam.check_subjects([item])
    with torch.inference_mode():
        first = load_sides([item], exams[0], "float32", device)[0]
        exams[0].prepare([first], report)
        rows, about = exams[1].encode(first.tokenizer, item.config, first.max_length, item.name)
        second = Side(item, first.model, first.tokenizer, first.max_length, rows, about, device=device)
        exams[1].prepare([second], report)
    first.model.requires_grad_(False)
    return first, second


def _check_knows(judge: "Judge", metric: str) -> None:
    """Without a score nothing can be lost. Raises InputError for a model that is no better than guessing."""
    from qtool.evaluation.runner import check_baseline

    if metric == "score":
        check_baseline(judge.exam, judge.side, judge.whole.score, False)


def _fingerprint(side: "Side", exam: "Exam", wanted: HeadsRequest) -> dict[str, Any]:
    """Everything that the metric of a set depends on; not the search, which may differ and use what is known."""
    import hashlib

    import torch

    from qtool.checkpoint import Checkpoint, load_config, skeleton
    from qtool.job import instruction_set, versions

    rows = json.dumps([side.rows, exam.references], default=str)
    return {
        "model": Checkpoint(side.subject.path, skeleton(load_config(side.subject.path))).digest(),
        "task": exam.task.name,
        "data": hashlib.sha256(rows.encode()).hexdigest(),
        "metric": wanted.metric,
        "batch_size": exam.batch_size(),
        "threads": torch.get_num_threads(),
        "instruction set": instruction_set(side.device),
        "versions": versions(),
    }


def _searched(
    judge: "Judge", kept: "Kept", report: "Progress", wanted: HeadsRequest
) -> "tuple[Found, dict[Head, float]]":
    """What the search found, and the importance of heads where it goes by that."""
    from qtool.analysis import search
    from qtool.analysis.heads import gradient_ranking, removable

    heads = removable(judge.side.model, wanted.protected)
    most = wanted.max_evaluations or 1 + len(heads) * (1 + wanted.branching)
    limits = search.Limits(most, wanted.max_seconds, wanted.target, wanted.branching)
    metric = _reporting(_of_attending(kept, judge), report, most)
    if wanted.search == "gradient":
        every = gradient_ranking(judge.exam, judge.side)
        importance = {head: every[head] for head in heads}
        order = sorted(heads, key=lambda head: (importance[head], head))
        return search.walk(metric, order, wanted.budget, limits), importance
    find = search.astar if wanted.search == "astar" else search.greedy
    return find(metric, heads, wanted.budget, limits), {}


def _of_attending(kept: "Kept", judge: "Judge") -> "Metric":
    """The kept metric; NaN, which no search admits, for a model without any head: `headprune` leaves one."""
    from qtool.analysis.heads import removable

    every = frozenset(removable(judge.side.model))
    return lambda heads: math.nan if heads == every else kept(heads)


def _reporting(kept: "Metric", report: "Progress", most: int) -> "Metric":
    """The kept metric, which says how many sets have been measured."""
    asked: set[Any] = set()

    def metric(heads: Any) -> float:
        value = kept(heads)
        asked.add(heads)
        report("measure sets of heads", len(asked), most)
        return value

    return metric
