"""Observers of shares of the batches, put together, have seen what one observer of all batches sees: bit by bit."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.calibrate.observers import OBSERVERS, Observer, OrderedSum
from qtool.errors import InputError

SIZES = st.lists(st.sampled_from([0, 1, 3, 40, 300, 513]), min_size=1, max_size=6)


def drawn(name: str, sizes: Sequence[int], seed: int) -> list[torch.Tensor]:
    """Batches of rows whose sums depend on their order."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.randint(-12, 13, (len(sizes), 3), generator=draw)
    batches = [torch.randn(size, 3, generator=draw) * 2.0 ** spread[number] for number, size in enumerate(sizes)]
    if not name.startswith("attention"):
        return batches
    scores = [torch.randn(size, 2, 5, generator=draw) * 4 for size in sizes]
    return [score.softmax(-1).masked_fill(torch.rand(score.shape, generator=draw) < 0.2, -1) for score in scores]


def shared(name: str, batches: Sequence[torch.Tensor], ranks: int) -> Observer:
    """What ranks that take turns have seen, put together."""
    firsts = [sum(map(len, batches[:number])) for number in range(len(batches))]
    together = OBSERVERS[name]()
    for rank in range(ranks):
        own = OBSERVERS[name]()
        for number in range(rank, len(batches), ranks):
            own.begin(number, firsts[number])
            for part in batches[number].split(64):  # attention is shown text by text
                own.update(part)
        together.absorb({key: value.clone() for key, value in own.parts().items()})
    return together


@pytest.mark.parametrize("name", OBSERVERS)
@given(SIZES, st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_share_gives_the_state_of_one(name: str, sizes: list[int], ranks: int, seed: int) -> None:
    batches, alone = drawn(name, sizes, seed), OBSERVERS[name]()
    for batch in batches:
        for part in batch.split(64):
            alone.update(part)
    together = shared(name, batches, ranks)
    if not any(sizes):
        with pytest.raises(InputError, match="saw no token"):
            together.state()
        return
    wanted, found = alone.state(), together.state()
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        assert value.dtype == found[key].dtype and torch.equal(value, found[key]), key


def test_the_order_of_these_sums_matters() -> None:
    """Or the test above could not fail: the sum of the shares is another number."""
    terms = [torch.tensor([value], dtype=torch.float64) for value in (1e16, 1.0, -1e16, 1.0)]
    total = OrderedSum()
    for rank in (1, 0):
        own = OrderedSum()
        for number in range(rank, 4, 2):
            own.begin(number)
            own.add(terms[number])
        total.absorb(own.parts())
    assert total.total().item() == ((1e16 + 1.0) - 1e16) + 1.0
    assert (terms[0] + terms[2]) + (terms[1] + terms[3]) != total.total()
