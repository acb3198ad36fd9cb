"""Sets of attention heads that a model can do without: A* search, and two walks along a ranking.

Pure functions of `metric(set of heads removed)`, higher is better: no model is known here. A set is admissible where
its metric is at least `metric(nothing) − budget`, up to rounding of the ninth decimal place; every set that is returned
was measured, so it is. Equal calls give equal results, whatever the order in which sets are iterated.

A* after Parnami, Singh and Joshi (2021), arXiv 2110.15225, "Pruning Attention Heads of Transformer Models Using A*
Search". The cost functions are this project's own (docs/headprune.md): with deltas d_i = max(0, metric({}) −
metric({i})), a state s of removed heads has

    g(s) = |s|,
    h(s) = the most remaining heads, cheapest first, whose deltas add up to at most metric(s) − floor,

and the state with the largest g + h is expanded by its cheapest remaining heads. h is optimistic where losses at least
add up. Heads interact, so the largest admissible set may be missed; that the floor holds is measured. Where they cost
more together than alone, so optimistic an h would have all small sets expanded before a large one: so the search begins
with the walk of `greedy`, and h takes deltas to be larger by what the best set so far showed.
"""

import math
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

from qtool.errors import InputError

Head = tuple[int, int]
"""Layer and head, both from 0."""
Heads = frozenset[Head]
Metric = Callable[[Heads], float]

NOTHING: Heads = frozenset()

_PLACES = 9


@dataclass(frozen=True)
class Limits:
    """When a search stops early, with the best set so far.

    `evaluations` counts distinct sets, single heads included; `seconds` is wall time, and makes the result depend on
    it; `target` is a number of heads that is enough. `branching` is by how many heads a state of A* is expanded.
    """

    evaluations: int | None = None
    seconds: float | None = None
    target: int | None = None
    branching: int = 8


@dataclass(frozen=True)
class Step:
    """A set that was measured, in the order of the search, and whether it stays above the floor."""

    heads: tuple[Head, ...]
    value: float
    admissible: bool


@dataclass(frozen=True)
class Found:
    """The largest admissible set that was seen, of equal ones that of the highest metric, then the first in order.

    `base` is the metric of the whole model, `floor` what had to be kept, `evaluations` how many distinct sets were
    measured, `ended` why the search stopped. `bound` is how many heads the best state that was left unexpanded promised
    (A*; else None): where it is not above `len(heads)`, no larger set exists if losses add up.
    """

    heads: tuple[Head, ...]
    value: float
    base: float
    floor: float
    evaluations: int
    ended: str
    bound: int | None
    trace: tuple[Step, ...] = field(repr=False)


class _Stop(Exception):
    """A limit was reached."""


class _Search:
    """Measures sets within limits and keeps the best admissible one."""

    def __init__(self, metric: Metric, budget: float, limits: Limits) -> None:
        """Raises InputError for a budget that is negative or no number, or a model whose metric is NaN."""
        if not budget >= 0:
            raise InputError(f"the loss that a search may cost must be 0 or more, not {budget}")
        self._metric, self._limits, self._began = metric, limits, time.monotonic()
        self._values: dict[Heads, float] = {}
        self.trace: list[Step] = []
        self.base, self.budget = metric(NOTHING), budget
        if math.isnan(self.base):
            raise InputError("the metric of the whole model is NaN: nothing can be compared with it")
        self._values[NOTHING] = self.base
        self.trace.append(Step((), self.base, True))
        self._best: tuple[int, float, tuple[Head, ...]] = (0, self.base, ())

    def value(self, heads: Heads) -> float:
        """The metric of a set, measured once. Raises _Stop where that would be one too many."""
        if heads in self._values:
            return self._values[heads]
        limits = self._limits
        if limits.evaluations is not None and len(self._values) >= limits.evaluations:
            raise _Stop("the number of evaluations")
        if limits.seconds is not None and time.monotonic() - self._began >= limits.seconds:
            raise _Stop("the time")
        value = self._values[heads] = self._metric(heads)
        ordered = tuple(sorted(heads))
        self.trace.append(Step(ordered, value, self.admits(heads)))
        if self.admits(heads):
            self._keep(ordered, value)
        return value

    def loss(self, heads: Heads) -> float:
        """`metric({}) − metric(heads)`, less what a difference of two quotients adds in its last bits."""
        return round(self.base - self.value(heads), _PLACES)

    def admits(self, heads: Heads) -> bool:
        """Whether a set stays above the floor; one whose metric is NaN does not."""
        return self.loss(heads) <= self.budget

    def _keep(self, ordered: tuple[Head, ...], value: float) -> None:
        size, best, known = self._best
        if (len(ordered), value) > (size, best) or ((len(ordered), value) == (size, best) and ordered < known):
            self._best = (len(ordered), value, ordered)

    def check_target(self) -> None:
        """Raises _Stop when the best set is large enough."""
        if self._limits.target is not None and self._best[0] >= self._limits.target:
            raise _Stop("the target")

    @property
    def best(self) -> Heads:
        """The largest admissible set so far."""
        return frozenset(self._best[2])

    def found(self, ended: str, bound: int | None = None) -> Found:
        """What is known now; `bound` is what states that were not expanded promise."""
        size, value, heads = self._best
        floor, count = self.base - self.budget, len(self._values)
        bound = None if bound is None else max(bound, size)
        return Found(heads, value, self.base, floor, count, ended, bound, tuple(self.trace))


def losses(metric: Metric, heads: Iterable[Head]) -> dict[Head, float]:
    """What each head costs when it alone is removed: `metric({}) − metric({head})`, negative where that helps."""
    base = metric(NOTHING)
    return {head: base - metric(frozenset((head,))) for head in sorted(heads)}


def astar(metric: Metric, heads: Collection[Head], budget: float, limits: Limits | None = None) -> Found:
    """A* over sets of `heads` (see the module); what may be removed is all of them: leave out what is protected.

    Raises InputError for a `budget` below 0, a `branching` below 1, or a metric of the whole model that is NaN.
    """
    limits = limits or Limits()
    if limits.branching < 1:
        raise InputError(f"a state is expanded by at least one head, not {limits.branching}")
    search = _Search(metric, budget, limits)
    queue: _Queue | None = None
    try:
        queue = _Queue(search, _ranked(search, heads))
        search.check_target()
        state = NOTHING
        for head in queue.ranked:  # so that what is found is never less than the walk's
            state = child if queue.offer(child := state | {head}) else state
        while queue.states:
            state = queue.best()
            for head in [head for head in queue.ranked if head not in state][: limits.branching]:
                queue.offer(state | {head})
            queue.states.remove(state)
    except _Stop as stop:
        return search.found(f"{stop} was reached", queue.bound() if queue else None)
    return search.found("all states were expanded", queue.bound())


def _ranked(search: _Search, heads: Iterable[Head]) -> list[Head]:
    """By what removing each alone costs, cheapest first, then by place; a head whose metric is NaN comes last."""
    values = {head: search.value(frozenset((head,))) for head in sorted(heads)}
    return sorted(values, key=lambda head: (math.isnan(values[head]), -values[head], head))


class _Queue:
    """Admissible states that were not expanded, the most promising first: the largest g + h, then g, then the metric,
    then the first in order."""

    def __init__(self, search: _Search, ranked: Sequence[Head]) -> None:
        losses = {head: search.loss(frozenset((head,))) for head in ranked}
        # A head without which the metric is no number cannot be removed.
        self._deltas = {head: math.inf if math.isnan(loss) else max(0.0, loss) for head, loss in losses.items()}
        self.ranked, self.states, self._search, self._visited = ranked, [NOTHING], search, {NOTHING}

    def offer(self, state: Heads) -> bool:
        """Measure a state and keep it for expansion if it is admissible and new; whether it is admissible."""
        admits = self._search.admits(state)
        if admits and state not in self._visited:
            self.states.append(state)
            self._search.check_target()
        self._visited.add(state)
        return admits

    def best(self) -> Heads:
        """The most promising state."""
        factor = self._factor()
        return min(self.states, key=lambda state: self._rank(state, factor))

    def bound(self) -> int:
        """How many heads the most promising state would reach if losses added up."""
        return max((-self._rank(state, 1.0)[0] for state in self.states), default=0)

    def _factor(self) -> float:
        """How much more the heads of the best state cost together than alone, 1 where it is not more: by so much
        smaller are steps that are yet to come taken to be. Where losses add up it changes nothing."""
        best = self._search.best
        alone = sum(self._deltas[head] for head in best)
        return max(1.0, self._search.loss(best) / alone) if alone > 0 else 1.0

    def _rank(self, state: Heads, factor: float) -> tuple[int, int, float, tuple[Head, ...]]:
        room = (self._search.budget - self._search.loss(state)) / factor
        promised = _promised(room, [delta for head, delta in self._deltas.items() if head not in state])
        return -(len(state) + promised), -len(state), -self._search.value(state), tuple(sorted(state))


def _promised(room: float, deltas: Iterable[float]) -> int:
    """The largest number of `deltas`, ascending, whose sum is at most `room`."""
    spent, count = 0.0, 0
    for delta in deltas:
        spent += delta
        if round(spent, _PLACES) > room:
            break
        count += 1
    return count


def greedy(metric: Metric, heads: Collection[Head], budget: float, limits: Limits | None = None) -> Found:
    """One walk through all heads, the cheapest alone first. Errors of `walk`."""
    search = _Search(metric, budget, limits or Limits())
    try:
        ranked = _ranked(search, heads)
    except _Stop as stop:
        return search.found(f"{stop} was reached")
    return _walk(search, ranked)


def walk(metric: Metric, order: Sequence[Head], budget: float, limits: Limits | None = None) -> Found:
    """Remove heads in this order; one that would fall below the floor stays, and the next is tried.

    Raises InputError for a `budget` below 0 or a metric of the whole model that is NaN.
    """
    return _walk(_Search(metric, budget, limits or Limits()), order)


def _walk(search: _Search, order: Sequence[Head]) -> Found:
    state = NOTHING
    try:
        for head in order:
            if search.admits(state | {head}):
                state |= {head}
                search.check_target()
    except _Stop as stop:
        return search.found(f"{stop} was reached")
    return search.found("all heads were tried")
