"""Heat maps and small multiples: what is known of each layer and head, as inline SVG.

A figure takes numbers and their names, and knows nothing of where they are from. Colours are classes of
`qtool.analysis.palette`, so that one drawing serves light and dark paper.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from qtool.analysis.palette import STEPS, step_of
from qtool.analysis.svg import Scale, draw, figure, hint, path, power

_HEAT_WIDTH = 352.0
_LEFT, _TOP = 34.0, 32.0


@dataclass(frozen=True)
class Heat:
    """A heat map of `values[row][column]` (None: not measured), with rows and columns numbered from 0.

    `shown` writes a value on a cell, `told` in the hint and on the scale. `low` and `high` are the ends of the scale
    [those of the values]. A `diverging` ramp has 0 in its middle.
    """

    title: str
    description: str
    values: Sequence[Sequence[float | None]]
    shown: Callable[[float], str]
    told: Callable[[float], str]
    rows: str = "layer"
    columns: str = "head"
    low: float | None = None
    high: float | None = None
    diverging: bool = False

    def range(self) -> tuple[float, float]:
        """The ends of the scale."""
        known = [value for row in self.values for value in row if value is not None] or [0.0]
        if self.diverging:
            reach = max(map(abs, known)) if self.high is None else self.high
            return -reach, reach
        return (min(known) if self.low is None else self.low, max(known) if self.high is None else self.high)


def heat_map(heat: Heat) -> Element:
    """See `Heat`."""
    columns, rows = max(map(len, heat.values)), len(heat.values)
    wide = min(40.0, (_HEAT_WIDTH - _LEFT) / columns)
    high = min(max(min(wide, 26.0), 11.0), 26.0)
    bottom = _TOP + rows * high
    root = figure(heat.title, heat.description, _HEAT_WIDTH, bottom + 44)
    _numbers(root, [_LEFT + (c + 0.5) * wide for c in range(columns)], [_TOP - 7] * columns, wide, "middle", 15)
    _numbers(root, [_LEFT - 7] * rows, [_TOP + (r + 0.5) * high + 4 for r in range(rows)], high, "end", 11)
    draw(root, "text", heat.columns, x=_LEFT + columns * wide / 2, y=10, class_="axis small", text_anchor="middle")
    middle = _TOP + rows * high / 2
    turned = f"rotate(-90 7 {middle:.1f})"
    draw(root, "text", heat.rows, x=7, y=middle, class_="axis small", text_anchor="middle", transform=turned)
    for row, values in enumerate(heat.values):
        for column, value in enumerate(values):
            _cell(root, heat, row, column, value, (_LEFT + column * wide, _TOP + row * high, wide, high))
    _legend(root, heat, bottom + 16, min(columns * wide, 200.0))
    return root


def _numbers(root: Element, xs: Sequence[float], ys: Sequence[float], room: float, anchor: str, least: float) -> None:
    """0, 1, 2 … beside rows or columns; where they are too narrow, every second, fifth or tenth."""
    stride = next((s for s in (1, 2, 5, 10) if s * room >= least), 20)
    for index in range(0, len(xs), stride):
        draw(root, "text", str(index), x=xs[index], y=ys[index], class_="tick", text_anchor=anchor)


def _cell(
    root: Element, heat: Heat, row: int, column: int, value: float | None, box: tuple[float, float, float, float]
) -> None:
    x, y, wide, high = box
    told = "not measured" if value is None else heat.told(value)
    letter, shade = "d" if heat.diverging else "q", None if value is None else step_of(value, *heat.range())
    class_ = "none" if shade is None else f"{letter}{shade}"
    gap = 0.75 if min(wide, high) > 9 else 0.3
    round_ = 2.5 if min(wide, high) > 9 else 0.5
    cell = draw(root, "g", class_="cell")
    hint(cell, f"{heat.rows} {row}, {heat.columns} {column}: {told}")
    draw(cell, "rect", x=x + gap, y=y + gap, width=wide - 2 * gap, height=high - 2 * gap, rx=round_, class_=class_)
    if value is not None and wide >= 21 and high >= 14:
        draw(
            cell, "text", heat.shown(value),
            x=x + wide / 2, y=y + high / 2 + 3.2, class_=f"value t{class_}", text_anchor="middle",
        )  # fmt: skip


def _legend(root: Element, heat: Heat, y: float, width: float) -> None:
    """The ramp with what its ends (and the middle of a diverging one) mean."""
    low, high = heat.range()
    letter, step = "d" if heat.diverging else "q", width / STEPS
    for index in range(STEPS):
        draw(root, "rect", x=_LEFT + index * step, y=y, width=step + 0.4, height=7, class_=f"{letter}{index}")
    ends = [(low, 0.0, "start"), (high, width, "end")]
    for value, offset, anchor in [*ends, *([(0.0, width / 2, "middle")] if heat.diverging else [])]:
        draw(root, "text", heat.told(value), x=_LEFT + offset, y=y + 20, class_="tick", text_anchor=anchor)


@dataclass(frozen=True)
class Distribution:
    """A histogram over bins of equal width in log2, and cumulative curves.

    `shares[i]` is the share between `edges[i]` and `edges[i + 1]`; `curves` are cumulative shares at the edges, one a
    member (a head, say), `curve` the one of all.
    """

    title: str
    description: str
    edges: Sequence[float]
    shares: Sequence[float]
    curve: Sequence[float]
    curves: Sequence[Sequence[float]]


_PANEL = (250.0, 150.0)


def distribution(item: Distribution, *, top: float, marks: Sequence[float] = ()) -> Element:
    """One panel: bars on a logarithmic axis up to the share `top`, thin curves of the members, the bold one of all.

    `marks` are values at which a line stands, such as thresholds.
    """
    wide, high = _PANEL
    root = figure(item.title, item.description, wide, high)
    across = Scale(item.edges[0], item.edges[-1], 30, wide - 26, logarithmic=True)
    bars, share = Scale(0, top, high - 22, 24), Scale(0, 1, high - 22, 24)
    draw(root, "text", item.title, x=0, y=11, class_="panel")
    for value in (0.0, 0.5, 1.0):
        draw(root, "line", x1=30, x2=wide - 26, y1=share(value), y2=share(value), class_="grid")
        draw(root, "text", f"{100 * value:.0f}%", x=wide - 23, y=share(value) + 3.5, class_="tick curve")
    for value in bars.ticks(2):
        draw(root, "text", f"{100 * value:g}%", x=27, y=bars(value) + 3.5, class_="tick", text_anchor="end")
    for value in marks:
        draw(root, "line", x1=across(value), x2=across(value), y1=20, y2=high - 22, class_="mark")
    draw(root, "path", d=_bars(item, across, bars), class_="bars")
    for curve in item.curves:
        draw(root, "path", d=path(_points(item.edges, curve, across, share)), class_="curve member")
    draw(root, "path", d=path(_points(item.edges, item.curve, across, share)), class_="curve all")
    for value in across.ticks(4):
        draw(root, "text", power(value), x=across(value), y=high - 7, class_="tick", text_anchor="middle")
    return root


def _bars(item: Distribution, across: Scale, up: Scale) -> str:
    """All bars as one path: few bytes, and no seams between them."""
    points = [(across(item.edges[0]), up(0))]
    for left, right, share in zip(item.edges, item.edges[1:], item.shares, strict=False):
        points += [(across(left), up(share)), (across(right), up(share))]
    return path([*points, (across(item.edges[-1]), up(0))], closed=True)


def _points(edges: Sequence[float], curve: Sequence[float], across: Scale, up: Scale) -> list[tuple[float, float]]:
    return [(across(edge), up(share)) for edge, share in zip(edges, curve, strict=True)]


def spark_grid(title: str, description: str, rows: Sequence[Sequence[Sequence[float]]]) -> Element:
    """A tiny histogram for each row and column (layer and head), each scaled to its own highest bin."""
    columns = max(map(len, rows))
    wide, high = 720.0 / max(columns, 8), 34.0
    root = figure(title, description, _LEFT + columns * wide, _TOP + len(rows) * high)
    centres = [_LEFT + (c + 0.5) * wide for c in range(columns)]
    _numbers(root, centres, [_TOP - 8] * columns, wide, "middle", 15)
    _numbers(root, [_LEFT - 9] * len(rows), [_TOP + r * high + 20 for r in range(len(rows))], high, "end", 11)
    for row, histograms in enumerate(rows):
        for column, shares in enumerate(histograms):
            _spark(root, shares, _LEFT + column * wide, _TOP + row * high, wide, high, f"{row}", f"{column}")
    return root


def _spark(
    root: Element, shares: Sequence[float], x: float, y: float, wide: float, high: float, row: str, column: str
) -> None:
    peak, step = max(shares) or 1.0, (wide - 6) / len(shares)
    points = [(x + 3, y + high - 4)]
    for index, share in enumerate(shares):
        top = y + high - 4 - share / peak * (high - 9)
        points += [(x + 3 + index * step, top), (x + 3 + (index + 1) * step, top)]
    cell = draw(root, "g", class_="cell")
    hint(cell, f"layer {row}, head {column}")
    draw(cell, "path", d=path([*points, (x + wide - 3, y + high - 4)], closed=True), class_="bars")
    draw(cell, "line", x1=x + 3, x2=x + wide - 3, y1=y + high - 4, y2=y + high - 4, class_="grid")
