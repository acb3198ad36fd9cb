"""What a search for heads found, as JSON that `headprune` takes, with what can and cannot be said of it."""

import math
from collections.abc import Mapping
from typing import Any

from qtool.analysis.heads import KINDS, Judge, Measured
from qtool.analysis.search import Found, Head, Heads
from qtool.evaluation import metrics
from qtool.evaluation.exams import Exam
from qtool.evaluation.result import INTERVAL_LEVEL
from qtool.evaluation.runner import interval
from qtool.evaluation.sides import Side
from qtool.pruning import attentions, cuts

SCHEMA_VERSION = 1
GUARANTEE = (
    "The floor holds on the search set, where this very set of heads was measured; on other data it may not. That no "
    "larger set exists is known only where the losses of heads add up and the bound is not above what was found."
)


def outcome(
    asked: Mapping[str, Any],
    judge: Judge,
    found: Found,
    values: Mapping[Heads, float],
    importance: Mapping[Head, float],
    held_out: Exam,
    side: Side,
) -> dict[str, Any]:
    """JSON values only: NaN is None. `values` are all sets that were ever measured on the search set."""
    sites = attentions(judge.side.model)
    body = {
        "schema_version": SCHEMA_VERSION,
        **asked,
        "unit": KINDS[judge.kind],
        "architecture": type(judge.side.model).__name__,
        "task": judge.exam.task.name,
        "layers": [site.count for site in sites],
        "removed": len(found.heads),
        "heads": by_layer(found.heads),
        "parameters": _parameters(judge.side.model, by_layer(found.heads)),
        "base": found.base,
        "floor": found.floor,
        "value": found.value,
        "evaluations": found.evaluations,
        "ended": found.ended,
        "bound": found.bound,
        "search_set": _part(judge.exam, judge.whole, judge.measure(frozenset(found.heads))),
        "held_out": _part(held_out, *_told(held_out, side, frozenset(found.heads))),
        "ranking": _ranking(sites, found.base, values, importance),
        "guarantee": GUARANTEE,
        "notes": _notes(judge, float(asked["max_drop"])),
        "trace": [vars(step) for step in found.trace],
    }
    clean: dict[str, Any] = _clean(body)
    return clean


def by_layer(heads: "tuple[Head, ...]") -> dict[int, list[int]]:
    """Layer → its heads."""
    return {layer: [head for own, head in heads if own == layer] for layer in sorted({layer for layer, _ in heads})}


def _told(exam: Exam, side: Side, heads: Heads) -> tuple[Measured, Measured]:
    """The whole and the pruned model on examples that the search did not see, with their divergence where there is one.

    The metric of the search does not matter here: everything is told.
    """
    judge = Judge(exam, side, "kl" if exam.distributes else "score")
    return judge.whole, judge.measure(heads)


def _part(exam: Exam, whole: Measured, pruned: Measured) -> dict[str, Any]:
    """Both models on one part of the data. The standard error of an accuracy p is `100 · sqrt(p (1 − p) / n)`."""
    metric = exam.task.metric
    low, high = interval(exam, [whole.answers, pruned.answers])
    agreement = None
    if whole.choices is not None and pruned.choices is not None:
        agreement = metrics.agreement(pruned.choices, whole.choices)
    share = whole.score / 100
    return {
        "data": exam.source,
        "split": exam.said_split,
        "n": exam.n,
        "unit": exam.unit,
        "score": metric,
        "whole": whole.score,
        "pruned": pruned.score,
        "drop": round(metrics.drop(metric, pruned.score, whole.score), 9),
        "interval": {"level": INTERVAL_LEVEL, "low": low, "high": high},
        "agreement": agreement,
        "kl": pruned.kl,
        "standard_error": 100 * math.sqrt(share * (1 - share) / exam.n) if metric == "accuracy" else None,
    }


def _parameters(model: Any, gone: Mapping[int, list[int]]) -> dict[str, int]:
    """How many numbers the model has before and after."""
    tensors = model.state_dict()
    removed = sum(
        tensors[name].numel() // tensors[name].shape[cut.dim] * (tensors[name].shape[cut.dim] - len(cut.kept))
        for name, cut in cuts(model, gone).items()
    )
    whole = int(model.num_parameters())
    return {"whole": whole, "pruned": whole - removed}


def _ranking(
    sites: Any, base: float, values: Mapping[Heads, float], importance: Mapping[Head, float]
) -> list[dict[str, Any]]:
    """Every head with what it costs alone (None: not measured) and, of a gradient search, its importance; the cheapest
    first."""
    rows = []
    for head in ((layer, number) for layer, site in enumerate(sites) for number in range(site.count)):
        value = values.get(frozenset((head,)))
        loss = None if value is None else round(base - value, 9)
        rows.append({"layer": head[0], "head": head[1], "loss": loss, "importance": importance.get(head)})

    def cost(row: dict[str, Any]) -> tuple[float, float]:
        return tuple(math.inf if row[key] is None else row[key] for key in ("importance", "loss"))  # type: ignore[return-value]

    return sorted(rows, key=cost)


def _notes(judge: Judge, budget: float) -> list[str]:
    """What a reader of the numbers should know."""
    notes = []
    score, n = judge.whole.score, judge.exam.n
    if judge.exam.task.metric == "accuracy" and judge.kind == "score":
        error = 100 * math.sqrt(score / 100 * (1 - score / 100) / n)
        if budget < error:
            notes.append(
                f"the drop that was allowed, {budget:g} points, is less than the standard error of the score on {n} "
                f"examples, {error:.2f} points: which heads are harmless may be chance; search on more examples, or "
                "with --metric kl"
            )
    if any(site.width > site.size for site in attentions(judge.side.model)):
        notes.append("a head is a head of keys and values with all the heads of queries that it serves")
    return notes


def _clean(value: Any) -> Any:
    """JSON values: tuples as lists, keys as texts, NaN and infinity as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
