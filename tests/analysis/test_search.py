"""The search for heads against brute force over all sets, on metrics that are known."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtool.analysis.search import Found, Head, Heads, Limits, astar, greedy, losses, walk
from qtool.errors import InputError

Search = Callable[..., Found]


def additive(costs: Mapping[Head, float], base: float = 64.0) -> Callable[[Heads], float]:
    """A model whose heads do not interact."""
    return lambda gone: base - sum(costs[head] for head in gone)


def best_by_brute_force(metric: Callable[[Heads], float], heads: Sequence[Head], budget: float) -> int:
    """The size of the largest admissible set, of all that exist."""
    base = metric(frozenset())
    sizes = [
        len(some)
        for size in range(len(heads) + 1)
        for some in itertools.combinations(heads, size)
        if metric(frozenset(some)) >= base - budget
    ]
    return max(sizes)


HEADS = [(layer, head) for layer in range(2) for head in range(4)]
# Multiples of 1/16 add up exactly, so that brute force and search agree to the last bit.
SIXTEENTHS = st.integers(-16, 48).map(lambda n: n / 16)
COSTS = st.fixed_dictionaries({head: SIXTEENTHS for head in HEADS})
BUDGETS = st.integers(0, 80).map(lambda n: n / 16)


@given(st.fixed_dictionaries({head: st.integers(0, 48).map(lambda n: n / 16) for head in HEADS}), BUDGETS)
def test_astar_is_optimal_where_losses_add_up(costs: dict[Head, float], budget: float) -> None:
    found = astar(additive(costs), HEADS, budget, Limits(branching=len(HEADS)))
    assert len(found.heads) == best_by_brute_force(additive(costs), HEADS, budget)
    assert found.bound == len(found.heads)
    assert found.ended == "all states were expanded"


@given(COSTS, BUDGETS)
def test_astar_expands_everything_that_helpful_heads_allow(costs: dict[Head, float], budget: float) -> None:
    """With heads whose removal helps h is no bound, but all admissible states are expanded all the same."""
    found = astar(additive(costs), HEADS, budget, Limits(branching=len(HEADS)))
    assert len(found.heads) == best_by_brute_force(additive(costs), HEADS, budget)


@given(COSTS, st.dictionaries(st.frozensets(st.sampled_from(HEADS), min_size=2, max_size=2), SIXTEENTHS, max_size=9),
       BUDGETS, st.sampled_from([astar, greedy]), st.integers(1, 60), st.integers(1, 8))  # fmt: skip
def test_what_is_found_keeps_the_floor_also_where_heads_interact(
    costs: dict[Head, float],
    pairs: dict[Heads, float],
    budget: float,
    search: Search,
    evaluations: int,
    branching: int,
) -> None:
    calls: list[Heads] = []

    def metric(gone: Heads) -> float:
        calls.append(gone)
        return additive(costs)(gone) - sum(cost for pair, cost in pairs.items() if pair <= gone)

    found = search(metric, HEADS, budget, Limits(evaluations, branching=branching))
    assert metric(frozenset(found.heads)) == found.value >= found.base - budget == found.floor
    assert len(set(calls[:-1])) == len(calls) - 1 == found.evaluations <= max(1, evaluations)
    admissible = [step for step in found.trace if step.admissible]
    assert max(len(step.heads) for step in admissible) == len(found.heads)
    assert all((step.value >= found.floor) == step.admissible for step in found.trace)
    shuffled = search(metric, list(reversed(HEADS)), budget, Limits(evaluations, branching=branching))
    assert shuffled == found


PAIRS = st.dictionaries(st.frozensets(st.sampled_from(HEADS), min_size=2, max_size=2), SIXTEENTHS, max_size=9)


@given(COSTS, PAIRS, BUDGETS, st.integers(1, 8))
def test_astar_is_never_less_than_the_walk(
    costs: dict[Head, float], pairs: dict[Heads, float], budget: float, branching: int
) -> None:
    """Not even with no more evaluations than the walk needs."""

    def metric(gone: Heads) -> float:
        return additive(costs)(gone) - sum(cost for pair, cost in pairs.items() if pair <= gone)

    walked = greedy(metric, HEADS, budget)
    found = astar(metric, HEADS, budget, Limits(walked.evaluations, branching=branching))
    assert len(found.heads) >= len(walked.heads)
    more = astar(metric, HEADS, budget, Limits(walked.evaluations + 40, branching=branching))
    assert len(more.heads) >= len(found.heads)


def test_two_copies_of_a_head_are_not_both_removed() -> None:
    """Each alone costs nothing; the pair costs all. The walk stays at the first of them, and so must A*."""
    copies = frozenset({(0, 0), (1, 0)})

    def metric(gone: Heads) -> float:
        return 0.0 if copies <= gone else 90.0

    heads = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for found in (astar(metric, heads, 0.5), greedy(metric, heads, 0.5)):
        assert len(found.heads) == 3
        assert not copies <= set(found.heads)


def test_astar_finds_what_the_walk_misses() -> None:
    """The cheapest head alone excludes both others, which together are cheap."""
    table = {
        (): 8.0, ("a",): 7.75, ("b",): 7.5, ("c",): 7.5,
        ("a", "b"): 0.0, ("a", "c"): 0.0, ("b", "c"): 7.0, ("a", "b", "c"): 0.0,
    }  # fmt: skip
    names = {(0, 0): "a", (0, 1): "b", (0, 2): "c"}

    def metric(gone: Heads) -> float:
        return table[tuple(sorted(names[head] for head in gone))]

    assert greedy(metric, list(names), 1.0).heads == ((0, 0),)
    assert astar(metric, list(names), 1.0).heads == ((0, 1), (0, 2))


def test_walk_follows_the_order_that_it_is_given() -> None:
    costs = {(0, 0): 1.0, (0, 1): 3.0, (0, 2): 1.0, (0, 3): 0.5}
    found = walk(additive(costs), [(0, 1), (0, 0), (0, 2), (0, 3)], 2.5)
    assert found.heads == ((0, 0), (0, 2), (0, 3))
    assert [step.heads for step in found.trace] == [
        (), ((0, 1),), ((0, 0),), ((0, 0), (0, 2)), ((0, 0), (0, 2), (0, 3))
    ]  # fmt: skip
    assert found.bound is None


@pytest.mark.parametrize("search", [astar, greedy])
def test_limits_end_a_search_with_what_it_has(search: Search) -> None:
    costs = dict.fromkeys(HEADS, 0.25)
    few = search(additive(costs), HEADS, 1.0, Limits(evaluations=len(HEADS) + 2))
    assert few.ended == "the number of evaluations was reached"
    assert few.evaluations == len(HEADS) + 2
    assert len(few.heads) == 2
    enough = search(additive(costs), HEADS, 1.0, Limits(target=3))
    assert (enough.ended, len(enough.heads)) == ("the target was reached", 3)
    late = search(additive(costs), HEADS, 1.0, Limits(seconds=0))
    assert (late.ended, late.evaluations, late.heads) == ("the time was reached", 1, ())


def test_bound_says_what_unexpanded_states_promise() -> None:
    found = astar(additive(dict.fromkeys(HEADS, 0.25)), HEADS, 1.0, Limits(evaluations=len(HEADS) + 2))
    assert found.bound == 4


def test_a_metric_that_is_no_number_admits_nothing() -> None:
    def metric(gone: Heads) -> float:
        return math.nan if (0, 0) in gone else 8.0 - len(gone)

    assert set(astar(metric, HEADS[:3], 2.0).heads) == {(0, 1), (0, 2)}
    with pytest.raises(InputError, match="NaN"):
        astar(lambda gone: math.nan, HEADS, 1.0)


def test_rounding_of_quotients_does_not_cost_a_head() -> None:
    """88.9 − 88.6 is 0.30000000000000426 in float64."""
    table = {0: 88.9, 1: 88.6}
    assert table[0] - table[1] > 0.3
    assert astar(lambda gone: table[len(gone)], [(0, 0)], 0.3).heads == ((0, 0),)


def test_ranking_is_the_loss_of_each_head_alone() -> None:
    costs = {(0, 0): 1.5, (0, 1): -0.5}
    assert losses(additive(costs), reversed(list(costs))) == costs


@pytest.mark.parametrize(("budget", "limits"), [(-1.0, Limits()), (math.nan, Limits()), (1.0, Limits(branching=0))])
def test_nonsense_is_refused(budget: float, limits: Limits) -> None:
    with pytest.raises(InputError):
        astar(additive(dict.fromkeys(HEADS, 0.0)), HEADS, budget, limits)
