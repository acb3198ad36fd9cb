"""Methods and tasks of other packages, found by their entry points.

A plug-in that cannot be used is reported by its name and its distribution, and harms nothing else.
"""

import sys
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qtool.errors import UnavailableError


@dataclass(frozen=True)
class Plugin:
    """A loaded object and the distribution, `name version`, that it is from."""

    name: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Broken:
    """A plug-in that cannot be used, and in a line why."""

    name: str
    origin: str
    why: str


@dataclass(frozen=True)
class Found:
    """The plug-ins of a group by name, and those that are left out."""

    good: dict[str, Plugin] = field(default_factory=dict)
    broken: list[Broken] = field(default_factory=list)

    def refuse_broken(self, name: str, what: str) -> None:
        """Raises UnavailableError when `name` is a broken plug-in; `what` is the word for it, such as `method`."""
        for plugin in self.broken:
            if plugin.name == name:
                raise UnavailableError(
                    f"{what} '{name}' of {plugin.origin} cannot be used: {plugin.why}; repair or uninstall that package"
                )


def found(group: str, check: Callable[[Any], None], taken: Collection[str] = ()) -> Found:
    """Import every plug-in of an entry point group, in the order of their names.

    `check(value)` raises TypeError or ValueError for an object of the wrong kind; `taken` are the built-in names. A
    plug-in's own `name`, if it has one, is that of its entry point. Of two plug-ins with one name neither is used, so
    that nothing depends on the order of installation.
    """
    result = Found()
    points = sorted(entry_points(group=group), key=lambda point: (point.name, _origin(point)))
    count = Counter(point.name for point in points)
    for point in points:
        try:
            if point.name in taken:
                raise ValueError("qtool itself has one of this name")
            if count[point.name] > 1:
                others = [_origin(other) for other in points if other.name == point.name and other is not point]
                raise ValueError(f"{', '.join(others)} has one of the same name")
            value = _load(point)
            check(value)
            if (own := getattr(value, "name", point.name)) != point.name:
                raise ValueError(f"its entry point and its attribute name differ: {point.name} and {own}")
        except (Exception, SystemExit) as error:  # whatever another package's import can raise
            result.broken.append(Broken(point.name, _origin(point), _reason(error)))
        else:
            result.good[point.name] = Plugin(point.name, value, _origin(point))
    return result


def _load(point: EntryPoint) -> Any:
    """What a plug-in prints while it is imported must not end up among results."""
    with redirect_stdout(sys.stderr):
        return point.load()


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _reason(error: BaseException) -> str:
    message = " ".join(str(error).split()) or "no message"
    return message if type(error) in (TypeError, ValueError) else f"{type(error).__name__}: {message}"
