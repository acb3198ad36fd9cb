"""KL divergences against the definition in 60 decimal digits, and against scipy."""

import decimal
import math
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from qtool.evaluation import divergence
from qtool.evaluation.divergence import kl_divergence, row_divergences

INF, NAN = math.inf, math.nan


def by_definition(baseline: Sequence[float], candidate: Sequence[float]) -> float:
    """Σ p log(p / q) in decimals; logits are finite or −inf."""
    with decimal.localcontext(decimal.Context(prec=60, Emin=-(10**12), Emax=10**12)):

        def odds(logits: Sequence[float]) -> list[Decimal]:
            powers = [Decimal(value).exp() if value > -INF else Decimal(0) for value in logits]
            return [power / sum(powers) for power in powers]

        total = Decimal(0)
        for p, q in zip(odds(baseline), odds(candidate), strict=True):
            if p and not q:
                return INF
            total += p * (p / q).ln() if p else Decimal(0)
        return float(total)


def one(baseline: Sequence[float], candidate: Sequence[float], dtype: torch.dtype = torch.float64) -> float:
    return float(kl_divergence(torch.tensor([baseline], dtype=dtype), torch.tensor([candidate], dtype=dtype))[0])


LOGIT = st.one_of(st.floats(-40, 40, width=32), st.floats(-2000, 2000, width=32), st.just(-INF))
PAIRS = st.integers(1, 12).flatmap(
    lambda size: st.tuples(*[st.lists(LOGIT, min_size=size, max_size=size).filter(lambda x: max(x) > -INF)] * 2)
)


@given(PAIRS)
def test_the_definition(pair: tuple[list[float], list[float]]) -> None:
    found, wanted = one(*pair), by_definition(*pair)
    assert found >= 0
    assert found == pytest.approx(wanted, rel=1e-13, abs=1e-12)


@given(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12), st.floats(1e-4, 1e-2), st.integers(0, 99))
def test_small_differences_keep_their_digits(logits: list[float], scale: float, seed: int) -> None:
    """What quantization leaves is 1e-8 to 1e-3 nats: the logits are subtracted before they are weighted."""
    moved = np.asarray(logits) + scale * np.random.default_rng(seed).standard_normal(len(logits))
    assert one(logits, moved.tolist()) == pytest.approx(by_definition(logits, moved.tolist()), abs=1e-14)


@given(st.lists(LOGIT, min_size=1, max_size=300).filter(lambda x: max(x) > -INF))
def test_equal_logits_are_exactly_zero(logits: list[float]) -> None:
    assert one(logits, logits) == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scipy_on_many_places(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    theirs = (4 * torch.randn(50, 301, generator=draw)).to(dtype)
    own = (theirs.float() + torch.randn(50, 301, generator=draw)).to(dtype)
    odds = [softmax(side.double().numpy(), axis=1) for side in (theirs, own)]
    kept = theirs.clone()
    np.testing.assert_allclose(kl_divergence(theirs, own).numpy(), rel_entr(*odds).sum(1), rtol=1e-12)
    assert torch.equal(theirs, kept), "what was passed is not written to"


@pytest.mark.parametrize(
    ("baseline", "candidate", "wanted"),
    [
        ((0, -INF), (0, -INF), 0.0),
        ((0, -INF), (0, 0), math.log(2)),
        ((0, 0), (0, -INF), INF),
        ((0, -2000), (0, -INF), INF),  # a probability of 0 in float64, and still not impossible
        ((-INF, 0, 0), (0, -INF, 0), INF),
        ((0, -2000), (0, 0), math.log(2)),
        ((0, -2000), (-2000, 0), 2000.0),
        ((3e38, -3e38), (-3e38, 3e38), 6e38),
        ((5,), (-7,), 0.0),
    ],
)
def test_limits(baseline: tuple[float, ...], candidate: tuple[float, ...], wanted: float) -> None:
    assert one(baseline, candidate) == pytest.approx(wanted, rel=1e-15)


@pytest.mark.parametrize(
    "bad", [(NAN, 0, 0), (NAN, NAN, NAN), (INF, 0, 0), (INF, -INF, 0), (-INF, -INF, -INF), (NAN, -INF, 0)]
)
@pytest.mark.parametrize("other", [(1, 2, 3), (-INF, 2, 3), (1, -INF, 3)])
def test_what_is_no_distribution_is_nan(bad: tuple[float, ...], other: tuple[float, ...]) -> None:
    for pair in ((bad, other), (other, bad), (bad, bad)):
        assert math.isnan(one(*pair)), pair
    both = torch.tensor([bad, other], dtype=torch.float32), torch.tensor([other, other], dtype=torch.float32)
    assert kl_divergence(*both).isnan().tolist() == [True, False], "other places are not touched"


@pytest.mark.parametrize("cells", [1, 40, 10_000])
def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    """Rows of different numbers of places and choices, some empty, in pieces of any size."""
    monkeypatch.setattr(divergence, "CELLS", cells)
    draw = torch.Generator().manual_seed(1)
    for shapes in ([(3, 7), (0, 7), (11, 7)], [(2, 5), (2, 9), (0, 0)], [(0, 4)]):
        theirs, own = ([torch.randn(shape, generator=draw) for shape in shapes] for _ in range(2))
        found = row_divergences(theirs, own)
        assert [len(places) for places in found] == [places for places, _ in shapes]
        for places, mine, other in zip(found, own, theirs, strict=True):
            assert places.dtype == np.float64
            for value, w, z in zip(places, mine.tolist(), other.tolist(), strict=True):
                assert value == pytest.approx(by_definition(z, w), rel=1e-12)
