"""What figures are drawn with: elements, axes and numbers as people read them.

Everything is an `ElementTree`, which escapes text and attributes, so names of models and paths cannot become markup.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from xml.etree.ElementTree import Element, SubElement

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_ids = count()


def figure(title: str, description: str, width: float, height: float) -> Element:
    """An empty `<svg>` that says what it shows to those who cannot see it."""
    number = next(_ids)
    root = Element(
        "svg",
        {
            "viewBox": f"0 0 {size(width)} {size(height)}",
            "role": "img",
            "aria-labelledby": f"figure-title-{number} figure-desc-{number}",
        },
    )
    SubElement(root, "title", {"id": f"figure-title-{number}"}).text = title
    SubElement(root, "desc", {"id": f"figure-desc-{number}"}).text = description
    return root


def draw(parent: Element, tag: str, text: str | None = None, /, **attributes: object) -> Element:
    """A child: `class_` is `class`, underscores are dashes, numbers are written short, None is left out."""
    plain = {
        name.rstrip("_").replace("_", "-"): size(value) if isinstance(value, float | int) else str(value)
        for name, value in attributes.items()
        if value is not None
    }
    child = SubElement(parent, tag, plain)
    child.text = text
    return child


def hint(shape: Element, text: str) -> None:
    """What a pointer that rests on a shape is told."""
    SubElement(shape, "title").text = text


def path(points: Sequence[tuple[float, float]], *, closed: bool = False) -> str:
    """The `d` of a line through points."""
    return "M" + "L".join(f"{size(x)} {size(y)}" for x, y in points) + ("Z" if closed else "")


def size(value: float) -> str:
    """A coordinate: two decimals at most."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else str(int(value))


@dataclass(frozen=True)
class Scale:
    """From values in `[low, high]` to coordinates from `start` to `end`, evenly or by logarithm."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate; values outside lie outside."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high != low else 0.5
        return self.start + share * (self.end - self.start)

    def clipped(self, value: float) -> float:
        """The coordinate of the nearest value inside."""
        return self(min(max(value, self.low), self.high))

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round numbers inside, about as many as wanted; powers of ten (and their halves) where it is logarithmic."""
        return _powers(self.low, self.high, wanted) if self.logarithmic else _steps(self.low, self.high, wanted)


def _steps(low: float, high: float, wanted: int) -> list[float]:
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _powers(low: float, high: float, wanted: int) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    if last - first < 2:  # less than two decades: 1, 2, 5
        digits = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
        return [value for value in digits if low * 0.999 <= value <= high * 1.001]
    stride = max(1, math.ceil((last - first) / wanted))
    return [10.0**exponent for exponent in range(last, first - 1, -stride)][::-1]


def padded(values: Sequence[float], share: float = 0.08, *, least: float = 0.0) -> tuple[float, float]:
    """The range of `values` with room around it, at least `least` wide."""
    low, high = min(values), max(values)
    room = max((high - low) * share, (least - (high - low)) / 2, abs(high) * 1e-6, 1e-9)
    return low - room, high + room


def power(value: float) -> str:
    """10⁻³, 3×10⁻⁴; small numbers as they are spoken."""
    exponent = math.floor(math.log10(value) + 1e-12)
    digits = value / 10.0**exponent
    ten = "10" + str(exponent).translate(_SUPERSCRIPTS)
    return ten if abs(digits - 1) < 1e-9 else f"{digits:.3g}×{ten}"


def threshold(value: float) -> str:
    """0.001; 1×10⁻⁵ where zeros would have to be counted."""
    return f"{value:.6g}" if value >= 1e-4 else power(value)


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 as percent, which no line break parts from its sign; a dash for none."""
    return "–" if share is None else f"{number(100 * share, digits)}\N{NO-BREAK SPACE}%"


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """With thousands separated and a true minus; a dash for none, ∞ for what has no bound."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    shown = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    if not shown.strip("+-0.,"):  # a rounded zero has no sign
        shown = shown.lstrip("+-")
    return shown.replace("-", "−")


def short(value: float) -> str:
    """A tick: as few digits as say it."""
    if value and not 1e-4 <= abs(value) < 1e5:
        return power(value) if value > 0 else "−" + power(-value)
    return f"{value:,.6g}".replace("-", "−")
