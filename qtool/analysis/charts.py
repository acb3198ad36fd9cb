"""Line charts of scores: what was measured at each setting, with confidence, beside a line for the float model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree.ElementTree import Element

from qtool.analysis.svg import Scale, draw, figure, hint, padded, path, short

_WIDTH, _HEIGHT = 460.0, 280.0
_LEFT, _TOP, _BOTTOM = 46.0, 26.0, 44.0
_LABEL = 14.0


@dataclass(frozen=True)
class Dot:
    """A measured value at `x`; `low` and `high` end its confidence interval, `told` is its hint."""

    x: float
    y: float
    told: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Dots of one kind. `colour` is a name of the palette; `open` ones are dashed with hollow dots."""

    label: str
    dots: Sequence[Dot]
    colour: str
    open: bool = False


@dataclass(frozen=True)
class Chart:
    """Lines over one horizontal axis.

    `reference` is a horizontal line with its label, such as float's score. `least` is the least height of the vertical
    axis, so that noise does not look like news; `bounds` are ends that it never passes: dots beyond are arrows at the
    edge. `marks` are vertical lines.
    """

    title: str
    description: str
    across: str
    up: str
    lines: Sequence[Line]
    tick: Callable[[float], str] = short
    logarithmic_x: bool = False
    logarithmic_y: bool = False
    ticks_x: Sequence[float] | None = None
    reference: tuple[float, str] | None = None
    least: float = 0.0
    bounds: tuple[float, float] = (float("-inf"), float("inf"))
    marks: Sequence[float] = ()

    @property
    def right(self) -> float:
        """Where the axis ends: with room for names behind it, if there are any."""
        return _WIDTH - (122 if self.reference or any(line.label for line in self.lines) else 20)


def line_chart(chart: Chart) -> Element:
    """See `Chart`."""
    root = figure(chart.title, chart.description, _WIDTH, _HEIGHT)
    across, up = _scales(chart)
    _axes(root, chart, across, up)
    for line in chart.lines:
        _bands(root, line, across, up)
    if chart.reference is not None:
        value, _ = chart.reference
        y = up.clipped(value)
        draw(root, "line", x1=across.start - 8, x2=across.end + 8, y1=y, y2=y, class_="reference")
    for line in chart.lines:
        _line(root, line, across, up)
    _labels(root, chart, across, up)
    return root


def _scales(chart: Chart) -> tuple[Scale, Scale]:
    xs = [dot.x for line in chart.lines for dot in line.dots]
    across = Scale(min(xs), max(xs), _LEFT + 10, chart.right - 10, chart.logarithmic_x)
    low, high = _reach(chart)
    low, high = max(low, chart.bounds[0]), min(high, chart.bounds[1])
    return across, Scale(low, high, _HEIGHT - _BOTTOM, _TOP, chart.logarithmic_y)


def _reach(chart: Chart) -> tuple[float, float]:
    """The vertical range of everything that is shown."""
    values = [
        value
        for line in chart.lines
        for dot in line.dots
        for value in (dot.y, dot.low, dot.high)
        if value is not None and abs(value) != float("inf")
    ]
    values += [chart.reference[0]] if chart.reference else []
    if chart.logarithmic_y:
        return min(values) / 1.06, max(values) * 1.06
    return padded(values, least=chart.least)


def _axes(root: Element, chart: Chart, across: Scale, up: Scale) -> None:
    for value in up.ticks(5):
        draw(root, "line", x1=_LEFT, x2=chart.right, y1=up(value), y2=up(value), class_="grid")
        draw(root, "text", short(value), x=_LEFT - 7, y=up(value) + 4, class_="tick", text_anchor="end")
    for value in chart.ticks_x or across.ticks(5):
        x = across(value)
        draw(root, "line", x1=x, x2=x, y1=_HEIGHT - _BOTTOM, y2=_HEIGHT - _BOTTOM + 4, class_="axis-line")
        draw(root, "text", chart.tick(value), x=x, y=_HEIGHT - _BOTTOM + 17, class_="tick", text_anchor="middle")
    for value in chart.marks:
        draw(root, "line", x1=across(value), x2=across(value), y1=_TOP, y2=_HEIGHT - _BOTTOM, class_="mark")
    y = _HEIGHT - _BOTTOM
    draw(root, "line", x1=_LEFT, x2=chart.right, y1=y, y2=y, class_="axis-line")
    centre = (_LEFT + chart.right) / 2
    draw(root, "text", chart.across, x=centre, y=_HEIGHT - 8, class_="axis", text_anchor="middle")
    draw(root, "text", chart.up, x=2, y=10, class_="axis")


def _bands(root: Element, line: Line, across: Scale, up: Scale) -> None:
    """Confidence as a ribbon behind everything; a single dot has a bar."""
    known = [dot for dot in line.dots if dot.low is not None and dot.high is not None]
    if len(known) > 1:
        lower = [(across(dot.x), up.clipped(dot.low)) for dot in known if dot.low is not None]
        upper = [(across(dot.x), up.clipped(dot.high)) for dot in known if dot.high is not None]
        draw(root, "path", d=path([*upper, *lower[::-1]], closed=True), class_=f"band c-{line.colour}")


def _line(root: Element, line: Line, across: Scale, up: Scale) -> None:
    kind = f"c-{line.colour}" + (" open" if line.open else "")
    inside = [(across(dot.x), up.clipped(dot.y)) for dot in line.dots]
    if len(inside) > 1:
        draw(root, "path", d=path(inside), class_=f"line {kind}")
    for dot, (x, y) in zip(line.dots, inside, strict=True):
        if up.low <= dot.y <= up.high:
            shape = draw(root, "circle", cx=x, cy=y, r=3.6, class_=f"dot {kind}")
        else:  # beyond the axis: an arrow says that it goes on
            way = 1 if y > (_TOP + _HEIGHT - _BOTTOM) / 2 else -1
            tip = [(x - 4.5, y - 3 * way), (x + 4.5, y - 3 * way), (x, y + 4 * way)]
            shape = draw(root, "path", d=path(tip, closed=True), class_=f"dot {kind}")
        hint(shape, dot.told)


def _labels(root: Element, chart: Chart, across: Scale, up: Scale) -> None:
    """Names at the ends of the lines, moved apart where they would overlap."""
    alone = [line for line in chart.lines if len(line.dots) == 1 and line.dots[0].x < across.high]
    for line in alone:  # the name beside the dot: nothing leads to the edge
        x, y = across(line.dots[0].x), up.clipped(line.dots[0].y)
        above = y - 9 if y > _TOP + 12 else y + 17
        draw(root, "text", line.label, x=x, y=above, class_=f"label c-{line.colour}", text_anchor="middle")
    named = [line for line in chart.lines if line.label and line not in alone]
    wanted = [((across(n.dots[-1].x), up.clipped(n.dots[-1].y)), n.label, f"c-{n.colour}") for n in named]
    if chart.reference is not None:
        wanted.append(((across.end + 8, up.clipped(chart.reference[0])), chart.reference[1], "c-ink"))
    x = across.end + 18
    for y, (end, label, kind) in zip(_apart([y for (_, y), *_ in wanted]), wanted, strict=True):
        if abs(y - end[1]) > 3 or end[0] < across.end:
            draw(root, "path", d=path([(end[0] + 5, end[1]), (x - 3, y)]), class_="leader")
        draw(root, "text", label, x=x, y=y + 4, class_=f"label {kind}")


def _apart(places: Sequence[float]) -> list[float]:
    """Moved until neighbours are `_LABEL` from each other, in the same order, inside the figure."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    found = list(places)
    for before, index in pairwise(order):
        found[index] = max(found[index], found[before] + _LABEL)
    lowest = _HEIGHT - _BOTTOM + 4
    for index in reversed(order):
        found[index] = min(found[index], lowest)
        lowest = found[index] - _LABEL
    return found
