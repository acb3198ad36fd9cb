"""What a study of attention found, in words: computed from its numbers, never more than they say."""

from collections.abc import Callable, Mapping
from typing import Any

from qtool.analysis.svg import number, percent, threshold

Body = Mapping[str, Any]
Point = Mapping[str, Any]

MARK = 1e-3
NAMES = {"squad_f1": "F1", "f1": "F1", "entity_f1": "F1", "matthews_correlation": "Matthews correlation"}
ALLOWED = 1.0
"""Points (percent of a perplexity) that count as little."""


class Words:
    """Names, numbers and sentences for one study. `mark` is the threshold that is spoken of: the paper's 0.001 if it was
    measured, else the one in the middle."""

    def __init__(self, body: Body) -> None:
        self.body, self.found = body, body["distribution"]
        limits = self.found["thresholds"]
        self.mark: float = MARK if MARK in limits else limits[len(limits) // 2]
        self.metric = NAMES.get(body["metric"], body["metric"].replace("_", " "))
        self.relative = body["metric"] == "perplexity"
        self.unit = "perplexity, log scale" if self.relative else f"{self.metric}, points"
        self.float: float = body["float"]["score"]
        self.length, self.keys = self.found["mean_length"], self.found["mean_keys"]
        self.name = body["model"].rstrip("/").rsplit("/", 1)[-1] or body["model"]
        self.pruning = [point for point in body["points"] if point["bits"] is None]
        self.cuts = sorted(
            {p["threshold"] for p in body["points"] if p["bits"] is not None and p["threshold"] is not None}
        )
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
        change = point["drop"] if self.relative else -point["drop"]
        return f"{number(change, 2, signed=True)} {'%' if self.relative else 'points'}"

    def interval(self, point: Point) -> tuple[float | None, float | None]:
        """The scores that the interval of the drop reaches; of a perplexity float's, so many percent more."""
        if point["interval"] is None or None in point["interval"]:
            return None, None
        low, high = point["interval"]
        if self.relative:
            return self.float * (1 + low / 100), self.float * (1 + high / 100)
        return self.float - high, self.float - low

    def setting(self, point: Point) -> str:
        """What was done to probabilities."""
        pruned = "not pruned" if point["threshold"] is None else f"pruned at {threshold(point['threshold'])}"
        return pruned if point["bits"] is None else f"{point['bits']} bits {point['mapping']}, {pruned}"

    def small(self, point: Point) -> bool:
        """Whether the loss counts as little."""
        return point["drop"] is not None and point["drop"] <= ALLOWED

    @property
    def little(self) -> str:
        """What counts as little."""
        return f"{ALLOWED:g} %" if self.relative else f"{ALLOWED:g} point"

    def finding(self) -> list[str]:
        """The page in one paragraph, and in a second one what else there is to say."""
        first = [self._sparse()]
        if self.at_mark is not None:
            first.append(self._pruned(self.at_mark))
        second = [self._coded(cut) for cut in self.cuts]
        missing = self.body["planned"] - len(self.body["points"])
        if not self.body["complete"] and missing:
            second.append(f"Unfinished: {missing} of {self.body['planned']} points are not measured yet.")
        return [" ".join(first), *([" ".join(second)] if second else [])]

    def _sparse(self) -> str:
        share, length = percent(self.sparsity(self.found["all"])), number(self.length, 0)
        return f"{share} of {self.name}'s attention probabilities are at or below {threshold(self.mark)} ({self._on()}, mean length {length} tokens)."

    def _on(self) -> str:
        return f"{self.body['task']}, {number(self.body['n'], 0)} {self.body['unit']}"

    def _pruned(self, point: Point) -> str:
        same = "" if point["agreement"] is None else f" and {number(point['agreement'], 1)} % of predictions unchanged"
        return (
            f"Without them {self.metric} is {self.score(point['score'])} instead of {self.score(self.float)}"
            f" ({self.loss(point)}), with {percent(point['zeros'])} zeros{same}."
        )

    def _coded(self, cut: float) -> str:
        """How few bits each mapping needs."""
        said = []
        for mapping in ("log", "linear"):
            own = [p for p in self.codes(cut) if p["mapping"] == mapping and p["threshold"] is not None]
            if own:
                least = self.least(own)
                fewest = min(own, key=lambda point: point["bits"])
                said.append(
                    f"{least['bits']} {mapping} bits ({self.loss(least)})"
                    if least is not None
                    else f"no {mapping} code of {fewest['bits']} to {max(p['bits'] for p in own)} bits"
                )
        return f"Pruned at {threshold(cut)} and coded, {self.metric} stays within {self.little} with {' and with '.join(said)}."

    def least(self, points: list[Point]) -> Point | None:
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
            f"Heads differ: between {percent(low, 0)} ({calm}) and {percent(high, 0)} ({sparse}) of a head's probabilities "
            f"are at or below {threshold(self.mark)}"
        )

    def shape_headline(self) -> str:
        """Where the most common magnitude is."""
        counts, edges = self.found["all"]["counts"], self.found["edges"]
        peak = max(range(len(counts)), key=lambda index: counts[index])
        share = counts[peak] / self.found["all"]["pairs"]
        low, high = edges[peak], edges[peak + 1]
        return f"The most common probabilities lie between 1/{1 / low:.0f} and 1/{1 / high:.0f}: {percent(share, 0)} of all"

    def pruning_headline(self) -> str:
        """The highest threshold that costs little."""
        harmless = None
        for point in sorted(self.pruning, key=lambda point: point["threshold"]):
            if not self.small(point):
                break
            harmless = point
        if harmless is None:
            return f"No threshold that was tried keeps {self.metric} within {self.little} of float"
        return (
            f"Up to a threshold of {threshold(harmless['threshold'])}, which makes {percent(harmless['zeros'], 0)} of "
            f"probabilities zero, {self.metric} stays within {self.little} of float"
        )

    def codes_headline(self, cut: float) -> str:
        """Log against linear."""
        pruned = [p for p in self.codes(cut) if p["threshold"] is not None]
        least = {m: self.least([p for p in pruned if p["mapping"] == m]) for m in ("log", "linear")}
        log, linear = least["log"], least["linear"]
        if log is None and linear is None:
            return f"No code that was tried keeps {self.metric} within {self.little} of float"
        if log is not None and linear is not None:
            return f"{log['bits']} bits on a log scale keep {self.metric} within {self.little} of float; a linear scale needs {linear['bits']}"
        kept, other = (log, "linear") if log is not None else (linear, "log")
        assert kept is not None
        return f"{kept['bits']} {kept['mapping']} bits keep {self.metric} within {self.little} of float; no {other} code that was tried does"
