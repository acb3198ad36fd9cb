"""Colours of figures and page, for light and dark paper, as CSS classes.

Values are shown in 21 steps of a ramp, interpolated in OKLab (Ottosson 2020), where equal steps look equal. A ramp
starts near the paper in both themes, so that "nothing" looks like nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

STEPS = 21

Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class Theme:
    """Hexadecimal colours: `named` ones by CSS variable, and the anchors of the two ramps, low to high."""

    named: dict[str, str]
    sequential: Sequence[str]
    diverging: Sequence[str]


LIGHT = Theme(
    {
        "paper": "#fbfaf6", "card": "#ffffff", "ink": "#1b2026", "soft": "#5c646e", "line": "#dfddd5",
        "log": "#0b6a78", "linear": "#bf4d12", "prune": "#4a4fa3", "best": "#8a2f6b",
    },
    ("#eff0ea", "#b9dcd0", "#5fb0b0", "#22748f", "#1a416d", "#13203f"),
    ("#11615c", "#73b5a8", "#eff0ea", "#eba673", "#a93a10"),
)  # fmt: skip
DARK = Theme(
    {
        "paper": "#12161a", "card": "#191e23", "ink": "#e9e7e1", "soft": "#9ba3ac", "line": "#2f363d",
        "log": "#5cc3cf", "linear": "#f19a5b", "prune": "#a3a8f5", "best": "#e394c4",
    },
    ("#20272d", "#1d4a5d", "#22788a", "#4cb0a8", "#a5dcb6", "#f3f4cf"),
    ("#7fd8c8", "#2f766f", "#20272d", "#9a5026", "#ffb27d"),
)  # fmt: skip


def css(theme: Theme) -> str:
    """Rules for the variables of a theme and for the classes `q0`…`q20`, `d0`…`d20` (fills of the sequential and the
    diverging ramp) and `tq…`, `td…` (text that can be read on them)."""
    variables = "".join(f"--{name}:{value};" for name, value in theme.named.items())
    rules = [f":root{{{variables}}}"]
    for letter, anchors in (("q", theme.sequential), ("d", theme.diverging)):
        for step, colour in enumerate(ramp(anchors)):
            rules.append(f".{letter}{step}{{fill:{colour}}}.t{letter}{step}{{fill:{readable(colour)}}}")
    return "".join(rules)


def literal(theme: Theme, rules: str) -> str:
    """CSS with the theme's colours in place of variables: for readers of SVG that know none."""
    for name, value in theme.named.items():
        rules = rules.replace(f"var(--{name})", value)
    return rules


def step_of(value: float, low: float, high: float) -> int:
    """The step of a ramp for `value`, clipped to `[low, high]`; the middle where they are equal."""
    if not high > low:
        return STEPS // 2
    share = (min(max(value, low), high) - low) / (high - low)
    return round(share * (STEPS - 1))


def ramp(anchors: Sequence[str], steps: int = STEPS) -> list[str]:
    """`steps` colours from the first anchor to the last."""
    points = [_oklab(anchor) for anchor in anchors]
    colours = []
    for step in range(steps):
        place = step / (steps - 1) * (len(points) - 1)
        index = min(int(place), len(points) - 2)
        share = place - index
        mixed = (a + share * (b - a) for a, b in zip(points[index], points[index + 1], strict=True))
        colours.append(_hex(*mixed))
    return colours


def readable(colour: str) -> str:
    """Black or white, whichever has the higher contrast (WCAG 2.2) on `colour`: one of them has at least 4.58."""
    return max("#000000", "#ffffff", key=lambda ink: contrast(ink, colour))


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio, 1 to 21."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    red, green, blue = _linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(colour: str) -> Rgb:
    values = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return red, green, blue


def _oklab(colour: str) -> Rgb:
    r, g, b = _linear(colour)
    l = (0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b) ** (1 / 3)  # noqa: E741 (the names of the source)
    m = (0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b) ** (1 / 3)
    s = (0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b) ** (1 / 3)
    return (
        0.2104542553 * l + 0.7936177850 * m - 0.0040720468 * s,
        1.9779984951 * l - 2.4285922050 * m + 0.4505937099 * s,
        0.0259040371 * l + 0.7827717662 * m - 0.8086757660 * s,
    )


def _hex(lightness: float, a: float, b: float) -> str:
    l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3  # noqa: E741
    m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
        -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
        -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
    )
    channels = (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in linear)
    return "#" + "".join(f"{round(255 * min(max(v, 0.0), 1.0)):02x}" for v in channels)
