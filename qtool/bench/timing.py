"""Whose turn it is, and what the times of many turns amount to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from qtool.bench.clock import Clock

Item = TypeVar("Item")

MIN_CALLS = 2
"""Timed calls of a turn, however slow they are."""


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """The same items, another one first each turn: going first or following a heavy neighbour is nobody's fate."""
    if not items:
        return []
    start = turn % len(items)
    return [*items[start:], *items[:start]]


def timed_calls(
    run: Callable[[Any], Any],
    feeds: Sequence[Any],
    seconds: float,
    clock: Clock,
    ready: Callable[[Any], Any] | None = None,
) -> list[float]:
    """Milliseconds of each call, over whole passes of `feeds` until `seconds` are over.

    One call before them is not counted: the caches hold what the engine before left there. Nor is `ready`, which
    prepares a feed for its next call.
    """

    def took(feed: Any) -> float:
        if ready is not None:
            ready(feed)
        return clock.took(lambda: run(feed))

    took(feeds[0])
    found: list[float] = []
    began = clock.now()
    while not found or (len(feeds) == 1 and len(found) < MIN_CALLS) or clock.now() - began < seconds:
        found += [took(feed) for feed in feeds]
    return found


def percentile(values: Sequence[float], percent: float) -> float:
    """Between the two nearest values, linearly."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True)
class Timing:
    """The calls of one engine on one shape, a list of milliseconds a round; `batches` calls are one pass."""

    rounds: Sequence[Sequence[float]]
    batches: int = 1

    @property
    def calls(self) -> list[float]:
        """All of them."""
        return [call for calls in self.rounds for call in calls]

    @property
    def pass_ms(self) -> list[float]:
        """The time of a pass, for each round: the median where a pass is one call, else the mean."""
        if self.batches == 1:
            return [percentile(calls, 50) for calls in self.rounds]
        return [self.batches * float(np.mean(calls)) for calls in self.rounds]

    @property
    def spread_percent(self) -> float:
        """Slowest less fastest round, in percent of the middle one."""
        times = self.pass_ms
        return 100 * (max(times) - min(times)) / percentile(times, 50)

    def per_second(self, amount_a_pass: int) -> float:
        """Rate of what one pass does `amount_a_pass` of."""
        calls = self.calls
        return 1000 * amount_a_pass * len(calls) / self.batches / sum(calls)

    def ratios(self, baseline: "Timing") -> list[float]:
        """How many times as fast as `baseline`, round by round: both had their turns within seconds."""
        pairs = zip(baseline.pass_ms, self.pass_ms, strict=False)
        return [theirs / own for theirs, own in pairs]
