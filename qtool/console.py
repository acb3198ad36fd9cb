"""Everything that qtool prints: results on stdout, progress and errors on stderr.

Bars and colour appear only on a terminal and without NO_COLOR; elsewhere each finished unit is one plain line.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qtool.errors import InputError

if TYPE_CHECKING:
    from qtool.api import Quantized
    from qtool.calibrate.sources import Batches
    from qtool.estimate import Estimate
    from qtool.evaluation.result import Evaluation
    from qtool.job import Event, Job


_FILE_WIDTH = 200  # columns where output goes to a file or a pipe: wide enough not to wrap rows
_PLAIN_SECONDS = 10.0
_KEPT = {True: "distilled", False: "not better: as it was"}


def megabytes(size: float) -> str:
    """Decimal megabytes."""
    return f"{size / 1e6:,.1f} MB"


def _is_terminal(stream: TextIO | None) -> bool:
    """A closed stream is None."""
    return stream is not None and stream.isatty()


class Screen:
    """Where a command writes. `verbosity` −1 is quiet (errors and results only), 0 normal, 1 a line a step."""

    def __init__(self, verbosity: int = 0) -> None:
        self.verbosity = verbosity
        self.out = Console(highlight=False, width=None if _is_terminal(sys.stdout) else _FILE_WIDTH)
        self.err = Console(stderr=True, highlight=False, width=None if _is_terminal(sys.stderr) else _FILE_WIDTH)
        self._bar: Progress | None = None
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, float] = {}
        self._last_line = time.monotonic()

    def note(self, message: str) -> None:
        """A line of progress on stderr."""
        if self.verbosity >= 0:
            self.err.print(escape(message))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A result table on stdout; columns of numbers are aligned to the right."""
        table = Table(
            title=title, title_justify="left", box=box.SIMPLE if self.out.is_terminal else None, pad_edge=False
        )
        for index, column in enumerate(columns):
            numbers = all(re.match(r"[-+]?\d[\d.,]*( MB)?$|-$", row[index]) for row in rows)
            table.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        with self.out.capture() as captured:
            self.out.print(table)
        text = "\n".join(line.rstrip() for line in captured.get().splitlines())
        self.out.out(text, highlight=False)

    def line(self, text: str) -> None:
        """A line of result on stdout."""
        self.out.print(escape(text))

    def step(self, stage: str, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of a stage are finished; `what` says which one is in hand or what it took."""
        if self.verbosity < 0:
            return
        started = self._started.setdefault(stage, time.monotonic())
        bars = self.err.is_terminal and os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") != "1"
        if not bars or self.verbosity > 0:
            self._plain_step(stage, what, done, total, started)
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[what]}"), console=self.err,
            )  # fmt: skip
            self._bar.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total, what=what)
        self._bar.update(self._tasks[stage], completed=done, total=total, what=what)

    def begin(self, stage: str, what: str, done: int, total: int) -> None:
        """Step `what` starts: shown by a bar, not by a line."""
        self._started.setdefault(stage, time.monotonic())
        if self.err.is_terminal:
            self.step(stage, what, done, total)

    def _plain_step(self, stage: str, what: str, done: int, total: int, started: float) -> None:
        """A line for each finished unit of work; steps without a name, such as batches, every ten seconds (or `-v`)."""
        now = time.monotonic()
        seldom = not what and self.verbosity == 0 and now - self._last_line < _PLAIN_SECONDS
        if done < total and (not done or seldom):
            return
        self._last_line = now
        left = f", about {(now - started) / done * (total - done):.0f} s left" if done < total else ""
        self.err.print(escape(f"{stage} {done}/{total} {what}".rstrip() + left))

    def close(self) -> None:
        """End the bars."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}
        self._started = {}


def render_event(screen: Screen, event: "Event") -> None:
    """An event of the pipeline."""
    from qtool.job import Note

    if isinstance(event, Note):
        screen.note(event.message)
    elif event.seconds is None:
        screen.begin(event.stage, event.unit, event.index, event.total)
    else:
        peak = f"{event.unit} {event.seconds:.1f} s, peak memory {megabytes(event.peak_bytes)}"
        screen.step(event.stage, peak, event.index + 1, event.total)


def json_text(value: Any) -> str:
    """Indented JSON; NaN and infinity are null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def check_json_target(target: str | None) -> None:
    """Refuse a place where `emit_json` could not write, before any work. Raises InputError."""
    if target in (None, "-"):
        return
    from qtool.ranks import current

    if not current().first:  # it writes nothing
        return
    place = Path(target).resolve()
    if place.is_dir() or not place.parent.is_dir():
        raise InputError(f"--json cannot write {target}: it is a folder, or its folder does not exist")
    if place.exists() and not place.is_file():
        raise InputError(f"--json cannot write {target}: it is no file; --json - writes to stdout")


def emit_json(value: Any, target: str | None) -> None:
    """To stdout for `-`, else to a file; nothing without a target."""
    if target == "-":
        sys.stdout.write(json_text(value) + "\n")
        sys.stdout.flush()
    elif target is not None:
        from qtool.artifact import write_text
        from qtool.ranks import current

        if current().first:
            write_text(Path(target).resolve(), json_text(value) + "\n")


def plan_json(job: "Job", batches: "Batches", expected: "Estimate") -> dict[str, Any]:
    """What `--dry-run` says."""
    predicted = job.predicted_bytes()
    return {
        "schema_version": 1,
        "model": job.source_name,
        "architecture": job.anatomy.architecture,
        "methods": [method.name for method in job.methods],
        "quantized": dict(job.plan.modules),
        "kept_float": dict(job.plan.kept_float),
        "calibration": batches.description if job.reads_data else None,
        "size_bytes": predicted,
        "source_bytes": job.checkpoint.num_bytes,
        "seconds": round(expected.seconds, 2),
        "peak_memory_bytes": expected.peak_bytes,
        "anonymous_memory_bytes": expected.anonymous_bytes,
    }


def render_plan(screen: Screen, job: "Job", batches: "Batches", expected: "Estimate") -> None:
    """The plan as tables: what is quantized, what stays float and why; the data, the size on disk, time and memory."""
    from qtool.nn import parts_of

    plan = plan_json(job, batches, expected)
    described = [part for item in plan["quantized"].items() for part in parts_of(*item)]
    rows = [[path, *_specs(module)] for path, module in described]
    screen.table(f"Quantized ({len(rows)} modules)", ["module", "type", "weights", "activations"], rows)
    kept = [[path, reason] for path, reason in plan["kept_float"].items()]
    if kept:
        screen.table(f"Kept in float ({len(kept)} modules)", ["module", "why"], kept)
    else:
        screen.line("Kept in float: nothing.")
    if plan["calibration"]:
        screen.line(f"Calibration data: {plan['calibration']}.")
    share = 100 * plan["size_bytes"] / plan["source_bytes"]
    screen.line(
        f"Size on disk: {megabytes(plan['size_bytes'])}, {share:.1f} % of the float model's "
        f"{megabytes(plan['source_bytes'])}. Nothing was calibrated, nothing was written."
    )
    screen.line(
        f"Expected on this machine, within a factor of two: {expected.seconds:.0f} s, "
        f"peak memory {megabytes(expected.peak_bytes)}, of which {megabytes(expected.anonymous_bytes)} "
        "beside imports and mapped files (what --max-memory bounds)."
    )


def _specs(module: Mapping[str, Any]) -> tuple[str, str, str]:
    integer = module["type"].startswith("int_")
    weights = module.get("weights") or ("codes of the word table" if "table" in module and not integer else "-")
    return module["type"].replace("_", " "), weights, module.get("activations", "integer" if integer else "float")


def quantized_json(result: "Quantized") -> dict[str, Any]:
    """Result of `quantize`."""
    return {
        "schema_version": 1,
        "path": str(result.path),
        "size_bytes": result.size_bytes,
        "source_bytes": result.source_bytes,
        "seconds": round(result.seconds, 2),
        "peak_memory_bytes": result.peak_bytes,
        "worst": [{"module": path, "sqnr_db": sqnr} for path, sqnr in result.worst],
    }


def render_quantized(screen: Screen, result: "Quantized") -> None:
    """One line: where, how large, how long."""
    share = 100 * result.size_bytes / result.source_bytes
    screen.line(
        f"{result.path}: {megabytes(result.size_bytes)} of weights ({share:.1f} % of {megabytes(result.source_bytes)}) "
        f"in {result.seconds:.1f} s, peak memory {megabytes(result.peak_bytes)}"
    )
    if result.worst:
        named = ", ".join(f"{path} ({sqnr:.1f} dB)" for path, sqnr in result.worst)
        screen.line(f"furthest from float on the calibration data: {named}")


def render_evaluations(screen: Screen, results: "Sequence[tuple[str, Evaluation]]") -> None:
    """One result as a table of both models; several as one table, a row each, under the labels of their recipes."""
    if len(results) == 1:
        _render_evaluation(screen, results[0][1])
        return
    labelled = any(label for label, _ in results)
    columns = ["task", "score", "baseline", "candidate", "drop", "95 % interval", "agreement %", "KL", "speed", "n"]
    rows = [[*([label] if labelled else []), *_summary(result)] for label, result in results]
    screen.table("Results", [*(["recipe"] if labelled else []), *columns], rows)


def _summary(result: "Evaluation") -> list[str]:
    """Cells of one row; a dash where there is no baseline."""
    own, theirs = result.candidate, result.baseline
    paired = ["-"] * 5
    if theirs is not None and result.interval is not None and result.drop is not None:
        low, high = result.interval
        percent = " %" if result.relative else ""
        same = "-" if result.agreement is None else f"{result.agreement:.2f}"
        apart = "-" if result.kl is None else f"{result.kl:.3g}"
        loss, interval = f"{result.drop:+.2f}{percent}", f"[{low:+.2f}, {high:+.2f}]"
        paired = [loss, interval, same, apart, f"{result.speed_ratio:.2f}x"]
    digits = 3 if result.relative else 2
    floats = f"{theirs.value:.{digits}f}" if theirs else "-"
    return [result.task, result.metric, floats, f"{own.value:.{digits}f}", *paired, f"{result.n} {result.unit}"]


def _render_evaluation(screen: Screen, result: "Evaluation") -> None:
    """Float and candidate side by side, then the drop with its interval."""
    rows, others, digits = [], list(result.candidate.others), 3 if result.relative else 2
    for side, score in (("baseline", result.baseline), ("candidate", result.candidate)):
        if score is not None:
            side += "" if score.quantized else " (float)"
            rate = f"{1000 * score.seconds / result.n:.2f}"
            values = [f"{value:.{digits}f}" for value in (score.value, *(score.others[name] for name in others))]
            rows.append([side, *values, megabytes(score.size_bytes), rate, score.model])
    unit, percent = result.unit.removesuffix("s"), "" if result.relative else " %"
    windows = f" in windows of {result.settings['max_length']}" if result.relative else ""
    title = f"{result.task}, {result.split or Path(result.data).name}, {result.n} {result.unit}{windows}"
    names = [f"{name}{percent}" for name in (result.metric, *others)]
    screen.table(title, ["", *names, "size", f"ms/{unit}", "model"], rows)
    if result.drop is not None and result.interval is not None:
        low, high = result.interval
        side = "below" if result.drop < 0 else "above"
        loss = f"{abs(result.drop):.2f} % {side} the baseline" if result.relative else f"drop {result.drop:+.2f} points"
        same = "" if result.agreement is None else f"agreement {result.agreement:.2f} %; "
        same += "" if result.kl is None else f"KL {result.kl:.3g} nats; "
        speed = f"{result.speed_ratio:.2f}x the baseline's speed"
        screen.line(f"{loss}, 95 % interval [{low:+.2f}, {high:+.2f}]; {same}{speed}")
    if result.probe is not None:
        screen.line(f"linear probe on {result.probe.rows} rows of {result.probe.source}, the same for both models")


def _cell(value: Any, places: int | None, size: bool) -> str:
    if size:
        return megabytes(value)
    if value is None:
        return "-"
    return str(value) if places is None else f"{value:.{places}f}"


def render_inspection(screen: Screen, found: Mapping[str, Any]) -> None:
    """`qtool inspect`: a row a module, then totals."""
    columns = {
        "path": "module", "type": "type", "weights": "weights", "activations": "activations", "bytes": "size",
        "sqnr": "weight SQNR dB", "output_sqnr_db": "output SQNR dB", "saturated_percent": "saturated %",
        "spare_bits": "spare bits",
    }  # fmt: skip
    places = {"output_sqnr_db": 1, "saturated_percent": 3, "spare_bits": 0}
    measured = [key for key in columns if any(module[key] not in ("-", None) for module in found["modules"])]
    rows = [[_cell(module[key], places.get(key), key == "bytes") for key in measured] for module in found["modules"]]
    screen.table(found["path"], [columns[key] for key in measured], rows)
    if attention := found["attention"]:
        names = ("zeros_percent", "lost_mass_percent", "mean_keys")
        rows = [[one["module"], *(f"{one.get(key, float('nan')):.4g}" for key in names)] for one in attention]
        heads = ["attention", "zeros %", "their mass %", "keys of a query"]
        screen.table("Attention probabilities, on calibration data, without padding", heads, rows)
    if distilled := found["distilled"]:
        rows = [
            [one["block"], *(f"{one[key]:.4g}" for key in ("loss_before", "loss_after")), _KEPT[one["kept"]]]
            for one in distilled
        ]
        screen.table("Distilled blocks", ["block", "loss before", "after", "outcome"], rows)
    screen.line(
        f"{found['architecture']} by {', '.join(found['methods'])}: {megabytes(found['size_bytes'])} of weights, "
        f"{found['percent_of_float']:.1f} % of the float model; execution {found['execution']}"
    )
    if gone := sum(map(len, found["pruned_heads"].values())):
        layers = ", ".join(f"{layer}: {' '.join(map(str, own))}" for layer, own in found["pruned_heads"].items())
        screen.line(f"{gone} attention heads removed (layer: heads): {layers}")
    for what, outcome in found.get("checks", {}).items():
        screen.line(f"{what}: {outcome}")
