"""Points of a sweep as charts and as a table: score, unchanged predictions and divergence against one setting."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtool.analysis.charts import Chart, Dot, Line, line_chart
from qtool.analysis.page import Figure, Table
from qtool.analysis.svg import number, percent, threshold
from qtool.analysis.words import Words

Point = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """Points of one kind; `open` ones are drawn dashed, without confidence."""

    label: str
    points: Sequence[Point]
    colour: str
    open: bool = False


@dataclass(frozen=True)
class Axis:
    """The setting that points differ in, its name under the charts, and how a tick is written."""

    key: str
    name: str
    tick: Callable[[float], str]
    logarithmic: bool = False


THRESHOLD = Axis("threshold", "threshold of pruning", threshold, logarithmic=True)
BITS = Axis("bits", "bits of a probability", lambda value: f"{value:g}")


def charts(axis: Axis, series: Sequence[Series], words: Words, suffix: str = "") -> list[Figure]:
    """What there is of score, agreement, KL divergence and zeros."""
    made = (("score", _scores), ("agreement", _agreement), ("kl", _divergence), ("zeros", _zeros))
    drawn = [(name, make(axis, series, words)) for name, make in made]
    return [(f"{axis.key}-{name}{suffix}", line_chart(chart)) for name, chart in drawn if chart is not None]


def _scores(axis: Axis, series: Sequence[Series], words: Words) -> Chart | None:
    lines = _lines(
        series, axis, "score", lambda p: f"{words.metric} {words.score(p['score'])} ({words.loss(p)})", words
    )
    # Perplexities explode by factors; where none does, a linear scale has more marks.
    explode = words.relative and max((dot.y for line in lines for dot in line.dots), default=0) > 2 * words.float
    return _chart(
        axis, lines, f"{words.metric_title} against {axis.key}",
        up="log scale" if explode else "" if words.relative else "points",
        logarithmic_y=explode,
        reference=(words.float, "float"),
        least=2.0,
        bounds=(0.0, float("inf")) if words.relative else (0.0, 100.0),
    )  # fmt: skip


def _agreement(axis: Axis, series: Sequence[Series], words: Words) -> Chart | None:
    lines = _lines(series, axis, "agreement", lambda p: f"{percent(p['agreement'] / 100, 2)} unchanged", words)
    title = f"Predictions unchanged against {axis.key}"
    return _chart(axis, lines, title, up="%", least=1.0, bounds=(0.0, 100.0))


def _divergence(axis: Axis, series: Sequence[Series], words: Words) -> Chart | None:
    positive = [Series(s.label, [p for p in s.points if p["kl"]], s.colour, s.open) for s in series]
    lines = _lines(positive, axis, "kl", lambda p: f"KL {p['kl']:.3g} nats", words)
    return _chart(axis, lines, f"KL divergence from float against {axis.key}", up="nats, log scale", logarithmic_y=True)


def _zeros(axis: Axis, series: Sequence[Series], words: Words) -> Chart | None:
    shares = [
        Series(s.label, [{**p, "zeros": 100 * p["zeros"]} for p in s.points if "zeros" in p], s.colour, s.open)
        for s in series
    ]
    lines = _lines(shares, axis, "zeros", lambda p: f"{number(p['zeros'], 1)} % zeros", words)
    return _chart(axis, lines, f"Zeros among probabilities against {axis.key}", up="%", bounds=(0.0, 100.0))


def _lines(series: Sequence[Series], axis: Axis, key: str, say: Callable[[Point], str], words: Words) -> list[Line]:
    """Dots where there is a number; the score's have the interval that that of the drop means."""
    lines = []
    for one in series:
        dots = []
        for point in one.points:
            if point[key] is not None:
                low, high = words.interval(point) if key == "score" and not one.open else (None, None)
                dots.append(Dot(point[axis.key], point[key], f"{words.setting(point)}: {say(point)}", low, high))
        lines += [Line(one.label, dots, one.colour, one.open)] if dots else []
    return lines


def _chart(axis: Axis, lines: Sequence[Line], title: str, *, up: str, **options: Any) -> Chart | None:
    """None where nothing was measured."""
    if not lines:
        return None
    told = (f"{line.label + ': ' if line.label else ''}{'; '.join(dot.told for dot in line.dots)}." for line in lines)
    return Chart(
        title=title,
        description=" ".join(told),
        across=axis.name,
        up=up,
        lines=lines,
        tick=axis.tick,
        logarithmic_x=axis.logarithmic,
        ticks_x=sorted({dot.x for line in lines for dot in line.dots}),
        **options,
    )


def table(title: str, points: Sequence[Point], words: Words) -> Table:
    """Every number of the points, float's first."""
    columns = ["setting", words.metric, "drop", "95 % interval", "unchanged", "KL, nats", "zeros"]
    rows = [["float", words.score(words.float), *["–"] * 5]]
    for point in points:
        low, high = (number(end, 2, signed=True) for end in point["interval"] or (None, None))
        agreement, suffix = point["agreement"], "\N{NO-BREAK SPACE}%" if words.relative else ""
        rows.append([
            words.setting(point),
            words.score(point["score"]),
            number(point["drop"], 2, signed=True) + suffix,
            f"[{low}, {high}]",
            percent(None if agreement is None else agreement / 100, 2),
            "–" if point["kl"] is None else f"{point['kl']:.3g}",
            percent(point.get("zeros")),
        ])  # fmt: skip
    return Table(title, columns, rows)
