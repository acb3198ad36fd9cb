"""The result of a benchmark: as JSON, and as the rows of its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool.bench import gpu, rates
from qtool.bench.batches import Workload
from qtool.bench.contest import Outcome, Settings
from qtool.bench.engines import REFERENCE
from qtool.bench.peaks import Peaks
from qtool.bench.products import Products
from qtool.bench.timing import Timing, percentile

Table = tuple[str, list[str], list[list[str]]]
"""Title, columns, rows."""


@dataclass(frozen=True)
class Report:
    """Everything that `qtool bench` found. `missing` has a line for each engine that could not be asked.

    On a GPU `machine` describes it under `gpu`, `peaks` says what it can do, and `products` what each model folder's
    matrix products take.
    """

    machine: dict[str, Any]
    settings: Settings
    seed: int
    workloads: Sequence[Workload]
    outcomes: Sequence[Outcome]
    missing: Sequence[str] = ()
    peaks: Peaks | None = None
    products: Mapping[Path, Products] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU was measured."""
        return "gpu" in self.machine

    @property
    def shown(self) -> list[Outcome]:
        """Without references that nobody asked for."""
        return [outcome for outcome in self.outcomes if outcome.entry.timed]

    @property
    def baseline(self) -> Outcome | None:
        """What times are compared with: torch's float32, else the first float model, else the first of all."""
        able = [outcome for outcome in self.shown if outcome.error is None]
        ranks = [
            [o for o in able if o.entry.engine == REFERENCE],
            [o for o in able if not o.entry.methods and not _void(o)],
            [o for o in able if not _void(o)],
        ]
        return next((rank[0] for rank in ranks if rank), None)

    def ratios(self, outcome: Outcome, shape: str) -> list[float] | None:
        """Speed against the baseline's, round by round; None for what has no claim to be fast."""
        if self.baseline is None or _void(outcome):
            return None
        return outcome.timings[shape].ratios(self.baseline.timings[shape])

    def to_json(self) -> dict[str, Any]:
        """Self-describing: units are in the names."""
        base = self.baseline
        shapes = [
            {"shape": w.name, "batches": len(w.batches), "sequences": w.sequences, "tokens": w.tokens,
             "padded_tokens": w.padded_tokens}
            for w in self.workloads
        ]  # fmt: skip
        return {
            "schema_version": 1,
            "machine": self.machine,
            "peaks": self.peaks and self.peaks.to_json(),
            "settings": {**vars(self.settings), "seed": self.seed},
            "shapes": shapes,
            "baseline": None if base is None else {"model": base.entry.model, "engine": base.entry.engine},
            "entries": [self._entry(outcome) for outcome in self.shown],
            "missing": list(self.missing),
        }

    def _entry(self, outcome: Outcome) -> dict[str, Any]:
        entry, facts, found = outcome.entry, outcome.facts, outcome.agreement
        known = {
            "model": entry.model, "engine": entry.engine, "methods": list(entry.methods), "error": outcome.error,
            "simulated": entry.simulated, "version": facts.get("version"), "threads": facts.get("threads"),
            "details": facts.get("details", {}), "size_bytes": facts.get("size_bytes"),
        }  # fmt: skip
        if outcome.error is not None:
            return known
        memory = {
            "peak_rss_bytes": outcome.peak_bytes, "imports_rss_bytes": facts["imports_bytes"],
            "above_imports_bytes": outcome.peak_bytes - facts["imports_bytes"], "peak_gpu_bytes": outcome.gpu_bytes,
            "read_bytes": facts.get("read_bytes"),
        }  # fmt: skip
        agreement = found and {**vars(found), "wrong": found.wrong}
        timings = [self._timing(outcome, workload) for workload in self.workloads]
        return {**known, **memory, "agreement": agreement, "timings": timings}

    def _timing(self, outcome: Outcome, workload: Workload) -> dict[str, Any]:
        timing, ratios = outcome.timings[workload.name], self.ratios(outcome, workload.name)
        middle = None if ratios is None else percentile(ratios, 50)
        return {
            "shape": workload.name,
            "ratio": middle, "ratio_low": ratios and min(ratios), "ratio_high": ratios and max(ratios),
            "p50_ms": percentile(timing.calls, 50), "p95_ms": percentile(timing.calls, 95),
            "sequences_per_second": timing.per_second(workload.sequences),
            "tokens_per_second": timing.per_second(workload.tokens),
            "spread_percent": timing.spread_percent, "calls": len(timing.calls), "pass_ms": timing.pass_ms,
            "rates": self._rates(outcome, workload).to_json() if self.on_gpu else None,
        }  # fmt: skip

    def _rates(self, outcome: Outcome, workload: Workload) -> rates.Rates:
        timing, products = outcome.timings[workload.name], self.products.get(outcome.entry.folder)
        return rates.rates(timing, workload, products, outcome.facts.get("read_bytes"), self.peaks)

    def tables(self) -> list[Table]:
        """One a shape, one about the engines, one of failures if there are any."""
        failed = [[o.entry.model, _engine(o), str(o.error)] for o in self.shown if o.error is not None]
        able = [outcome for outcome in self.shown if outcome.error is None]
        tables = [self._shape_table(workload, able) for workload in self.workloads if able]
        if able:
            columns = _engine_columns(self.on_gpu)
            tables.append(("Engines", columns, [_engine_row(outcome, self.on_gpu) for outcome in able]))
        return [*tables, ("Failed", ["model", "engine", "why"], failed)] if failed else tables

    def _shape_table(self, workload: Workload, able: Sequence[Outcome]) -> Table:
        columns = ["ratio", "rounds", "engine", "model", "p50 ms", "p95 ms", "sequences/s", "tokens/s", "spread %"]
        rows = [self._row(outcome, outcome.timings[workload.name], workload) for outcome in able]
        if self.on_gpu:
            columns += rates.COLUMNS
            rows = [row + self._rates(outcome, workload).cells() for row, outcome in zip(rows, able, strict=True)]
        return _title(workload), columns, rows

    def _row(self, outcome: Outcome, timing: Timing, workload: Workload) -> list[str]:
        ratios = self.ratios(outcome, workload.name)
        speed = [_why_void(outcome), "-"]
        if ratios is not None:
            speed = [f"{percentile(ratios, 50):.2f}x", f"{min(ratios):.2f}-{max(ratios):.2f}"]
        times = [f"{percentile(timing.calls, percent):.2f}" for percent in (50, 95)]
        rates = [f"{timing.per_second(workload.sequences):,.1f}", f"{timing.per_second(workload.tokens):,.0f}"]
        return [*speed, _engine(outcome), outcome.entry.model, *times, *rates, f"{timing.spread_percent:.1f}"]

    def header(self) -> list[str]:
        """What the numbers depend on, in lines."""
        machine, found = self.machine, self.settings
        load = machine["load_average"]
        base = self.baseline
        about = f"{found.rounds} rounds, turns of at least {found.seconds:g} s"
        lines = [
            f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['flags']) or 'no flags known'})",
            f"{found.threads} threads; {about}; load average before {'unknown' if load is None else f'{load:.2f}'}",
        ]
        if self.on_gpu:
            lines += gpu.lines(machine["gpu"], found.cold_l2)
            lines.append(self.peaks.line if self.peaks else "the peaks of the GPU were not measured")
        if base is not None:
            lines.append(
                f"ratio: how many times as fast as {base.entry.model} on {base.entry.engine}, middle of rounds"
            )
        return [*lines, *self.missing]


def _engine_columns(on_gpu: bool) -> list[str]:
    memory = ["weights", "peak memory", "above imports", *(["GPU memory"] if on_gpu else [])]
    return ["engine", "model", *memory, "threads", "top-1 %", "max difference", "version", "details"]


def _engine_row(outcome: Outcome, on_gpu: bool) -> list[str]:
    facts, found = outcome.facts, outcome.agreement
    sizes = [facts["size_bytes"], outcome.peak_bytes, outcome.peak_bytes - facts["imports_bytes"]]
    sizes += [outcome.gpu_bytes or 0] if on_gpu else []
    same = ["-", "-"] if found is None else [_number(found.top1, ".1f"), _number(found.max_abs, ".4f")]
    details = ", ".join(f"{name} {value}" for name, value in facts["details"].items())
    memory = [f"{size / 1e6:,.1f} MB" for size in sizes]
    threads = str(facts["threads"])
    return [_engine(outcome), outcome.entry.model, *memory, threads, *same, facts["version"], details or "-"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _title(workload: Workload) -> str:
    if not workload.ragged:
        return workload.name
    share = 100 * (1 - workload.tokens / workload.padded_tokens)
    size = f"{workload.sequences} texts in {len(workload.batches)} batches, {workload.tokens:,} tokens"
    return f"{workload.name}: {size}, {share:.0f} % padding; ms a batch"


def _engine(outcome: Outcome) -> str:
    """An artifact's engine with its methods."""
    return " ".join([outcome.entry.engine, "+".join(outcome.entry.methods)]).strip()


def _void(outcome: Outcome) -> bool:
    return bool(_why_void(outcome))


def _why_void(outcome: Outcome) -> str:
    """Why there is no ratio; empty where there is one."""
    if outcome.entry.simulated:
        return "simulated"
    return "wrong outputs" if outcome.agreement is not None and outcome.agreement.wrong else ""
