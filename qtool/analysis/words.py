"""What a study of attention found, in words: computed from its numbers, never more than they say."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qtool.analysis.svg import number, percent, threshold

Body = Mapping[str, Any]
Point = Mapping[str, Any]

MARK = 1e-3
"""The paper's threshold."""
NAMES = {"squad_f1": "F1", "f1": "F1", "entity_f1": "F1", "matthews_correlation": "Matthews correlation"}
ALLOWED = 1.0
"""Points (percent of a perplexity) that count as little."""


class Words:
    """Names, numbers and sentences for one study.

    `mark` is the threshold that is spoken of: the paper's 0.001 if it was measured, else the one in the middle.
    """

    def __init__(self, body: Body) -> None:
        self.body, self.found = body, body["distribution"]
        limits, points = self.found["thresholds"], body["points"]
        self.mark: float = MARK if MARK in limits else limits[len(limits) // 2]
        self.metric = NAMES.get(body["metric"], body["metric"].replace("_", " "))
        self.metric_title = self.metric[0].upper() + self.metric[1:]
        self.relative = body["metric"] == "perplexity"
        self.float: float = body["float"]["score"]
        self.length, self.keys = self.found["mean_length"], self.found["mean_keys"]
        self.name = _last(body["model"])
        # A page is passed on: where its reader's machine differs, folders are nobody's business.
        self.data = _last(body["data"]) if body["data"].startswith("/") else body["data"]
        coded = [point for point in points if point["bits"] is not None]
        self.pruning = [point for point in points if point["bits"] is None]
        self.cuts: list[float] = sorted({p["threshold"] for p in coded if p["threshold"] is not None})
        self.artifacts: list[Point] = body["artifacts"]
        self.at_mark = next((point for point in self.pruning if point["threshold"] == self.mark), None)

    def codes(self, cut: float) -> list[Point]:
        """Coded points that are pruned at `cut`, and those that are not pruned."""
        return [p for p in self.body["points"] if p["bits"] is not None and p["threshold"] in (cut, None)]

    def sparsity(self, summary: Body) -> float:
        """At `mark`."""
        return float(summary["sparsity"][self.found["thresholds"].index(self.mark)])

    def heads(self, read: Callable[[Body], float | None]) -> list[list[float | None]]:
        """A number of each head, a list a layer."""
        return [[read(head) for head in layer["heads"]] for layer in self.found["layers"]]

    def score(self, value: float | None) -> str:
        """Two decimals; three of a perplexity, as `qtool eval` says it."""
        return number(value, 3 if self.relative and value is not None and value < 1000 else 2)

    def loss(self, point: Point) -> str:
        """The difference from float as people say it: −0.34 points, +1.20 %."""
        if point["drop"] is None:
            return "no number"
        change, unit = (point["drop"], "%") if self.relative else (-point["drop"], "points")
        return f"{number(change, 2, signed=True)}\N{NO-BREAK SPACE}{unit}"

    def interval(self, point: Point) -> tuple[float | None, float | None]:
        """The scores that the interval of the drop reaches; of a perplexity float's, so many percent more."""
        if point["interval"] is None or None in point["interval"]:
            return None, None
        low, high = point["interval"]
        if self.relative:
            return self.float * (1 + low / 100), self.float * (1 + high / 100)
        return self.float - high, self.float - low

    def setting(self, point: Point) -> str:
        """What was done to probabilities, or which artifact it is."""
        if "artifact" in point:
            return f"artifact {_last(point['artifact'])}"
        pruned = "not pruned" if point["threshold"] is None else f"pruned at {threshold(point['threshold'])}"
        return pruned if point["bits"] is None else f"{point['bits']} bits {point['mapping']}, {pruned}"

    def small(self, point: Point) -> bool:
        """Whether the loss counts as little."""
        return point["drop"] is not None and point["drop"] <= ALLOWED

    @property
    def close(self) -> str:
        """What counts as little."""
        return f"within {ALLOWED:g}\N{NO-BREAK SPACE}{'%' if self.relative else 'point'} of float"

    def finding(self) -> list[str]:
        """The page in one paragraph, and in a second one what else there is to say."""
        first = self._sparse() + (f" {self._pruned(self.at_mark)}" if self.at_mark is not None else "")
        second = [self._coded(cut) for cut in self.cuts]
        second += [self._artifact(found) for found in self.artifacts]
        missing = self.body["planned"] - len(self.body["points"]) - len(self.artifacts)
        if not self.body["complete"] and missing:
            second.append(f"Unfinished: {missing} of {self.body['planned']} points are not measured yet.")
        return [first, " ".join(second)] if second else [first]

    def _sparse(self) -> str:
        every = self.found["all"]
        lost = percent(every["lost"][self.found["thresholds"].index(self.mark)])
        where = f"{self.body['task']}, {number(self.body['n'], 0)} {self.body['unit']}"
        return (
            f"{percent(self.sparsity(every))} of {self.name}'s attention probabilities are at or below "
            f"{threshold(self.mark)}; together they hold {lost} of the mass ({where}, mean length "
            f"{number(self.length, 0)} tokens)."
        )

    def _pruned(self, point: Point) -> str:
        same = point["agreement"]
        unchanged = "" if same is None else f", and {percent(same / 100)} of predictions stay what they were"
        return (
            f"Set to zero, {self.metric} is {self.score(point['score'])} instead of {self.score(self.float)} "
            f"({self.loss(point)}){unchanged}."
        )

    def _coded(self, cut: float) -> str:
        """How few bits each mapping needs."""
        said = []
        for mapping in ("log", "linear"):
            own = self._pruned_codes(cut, mapping)
            least = self.least(own)
            if least is not None:
                said.append(f"{least['bits']} {mapping} bits do ({self.loss(least)})")
            elif own:
                said.append(f"no {mapping} code of {_span(own)} bits does")
        return f"To stay {self.close} when pruned at {threshold(cut)} and coded, {', '.join(said)}."

    def _artifact(self, found: Point) -> str:
        same = found["agreement"]
        unchanged = "" if same is None else f", {percent(same / 100)} of predictions unchanged"
        what = "" if found["bits"] is None else f" ({found['bits']} bits)"
        score = f"{self.metric} {self.score(found['score'])} ({self.loss(found)})"
        return f"The artifact {_last(found['artifact'])}{what} has {score}{unchanged}."

    def _pruned_codes(self, cut: float, mapping: str) -> list[Point]:
        return [p for p in self.codes(cut) if p["mapping"] == mapping and p["threshold"] is not None]

    def least(self, points: Sequence[Point]) -> Point | None:
        """The fewest bits from which on all wider codes lose little too."""
        best = None
        for point in sorted(points, key=lambda point: -point["bits"]):
            if not self.small(point):
                break
            best = point
        return best

    def heads_headline(self) -> str:
        """The spread between heads."""
        known = [
            (self.sparsity(head), f"layer {layer}, head {index}")
            for layer, item in enumerate(self.found["layers"])
            for index, head in enumerate(item["heads"])
        ]
        (low, calm), (high, sparse) = min(known), max(known)
        return (
            f"Heads differ: {percent(low, 0)} ({calm}) to {percent(high, 0)} ({sparse}) of a head's probabilities "
            f"are at or below {threshold(self.mark)}"
        )

    def shape_headline(self) -> str:
        """Where the most common magnitude is."""
        counts, edges = self.found["all"]["counts"], self.found["edges"]
        peak = max(range(len(counts)), key=lambda index: counts[index])
        share = percent(counts[peak] / self.found["all"]["pairs"], 0)
        ends = f"1/{1 / edges[peak]:,.0f} and 1/{1 / edges[peak + 1]:,.0f}"
        return f"The most common probabilities lie between {ends}: {share} of all"

    def pruning_headline(self) -> str:
        """The highest threshold that costs little."""
        harmless = None
        for point in sorted(self.pruning, key=lambda point: point["threshold"]):
            if not self.small(point):
                break
            harmless = point
        if harmless is None:
            return f"No threshold that was tried keeps {self.metric} {self.close}"
        return (
            f"Up to a threshold of {threshold(harmless['threshold'])}, which makes {percent(harmless['zeros'], 0)} of "
            f"probabilities zero, {self.metric} stays {self.close}"
        )

    def codes_headline(self, cut: float) -> str:
        """Log against linear."""
        log, linear = (self.least(self._pruned_codes(cut, mapping)) for mapping in ("log", "linear"))
        if log is not None and linear is not None:
            needs = "as many" if log["bits"] == linear["bits"] else linear["bits"]
            return f"{log['bits']} bits on a log scale keep {self.metric} {self.close}; a linear scale needs {needs}"
        if log is None and linear is None:
            return f"No code that was tried keeps {self.metric} {self.close}"
        kept, other = (log, "linear") if log is not None else (linear, "log")
        assert kept is not None
        what = f"{kept['bits']} {kept['mapping']} bits keep {self.metric} {self.close}"
        return f"{what}; no {other} code that was tried does"


def _last(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rsplit("/", 1)[-1] or path


def _span(points: Sequence[Point]) -> str:
    """2 to 8, or 3."""
    low, high = min(p["bits"] for p in points), max(p["bits"] for p in points)
    return f"{low}" if low == high else f"{low} to {high}"
