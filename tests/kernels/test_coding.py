"""Attention on codes against float64, a loop over keys in exact fractions, and what must not change a number."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.errors import InputError
from qtool.kernels import coding
from qtool.kernels.coding import coded_attention
from qtool.numerics.codebook import Codebook

States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
SCALE = 0.35
EXPECTED_BITS = 1e-6  # of probabilities: scores are rounded to float32


def states(seed: int, heads: int = 4, groups: int = 2, queries: int = 7, keys: int = 9) -> States:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, queries, 8), (2, groups, keys, 8), (2, groups, keys, 8))
    q, k, v = (torch.randn(*shape, generator=generator) for shape in shapes)
    return q * torch.tensor([1.0, 2.0, 4.0, 8.0])[:heads, None, None], k, v


def books(heads: int = 4, bits: int = 3) -> Codebook:
    """Another one for each head."""
    each = [Codebook.log(bits, threshold) for threshold in (1e-3, 3e-3, 1e-2, 0.04)[:heads]]
    levels = torch.stack([book.levels for book in each]).float().double()
    return Codebook(torch.stack([book.edges for book in each]), levels)


def allowed(seed: int, queries: int = 7, keys: int = 9) -> torch.Tensor:
    """Causal, and the first text shorter."""
    causal = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    return causal & (torch.arange(keys) >= torch.tensor([3, 0])[:, None, None, None])


def probabilities(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(groups, 1).mT * SCALE
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1).nan_to_num(0)


def near_an_edge(shares: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    return ((shares[..., None] / edges[:, None, None] - 1).abs() < EXPECTED_BITS).any(-1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_codes_and_context_are_those_of_the_float64_softmax(relative: bool, renormalize: bool, masked: bool) -> None:
    for seed in range(5):
        q, k, v = states(seed)
        book, mask = books(), allowed(seed) if masked else None
        context, codes = coded_attention(
            q, k, v, mask, book.edges, book.levels, scaling=SCALE, relative=relative, renormalize=renormalize
        )
        p = probabilities(q, k, mask)
        top = p.amax(-1, keepdim=True)
        shares = (p / top.masked_fill(top == 0, 1)) if relative else p
        differ = codes != book.codes(shares)
        assert not (differ & ~near_an_edge(shares, book.edges)).any()
        assert mask is None or not codes.masked_select(~mask.expand_as(codes)).any()
        values = book.values(codes)
        if renormalize:
            values = values / values.sum(-1, keepdim=True).clamp_min(1e-300)
        elif relative:
            values = values * top
        expected = (values @ v.double().repeat_interleave(2, 1)).transpose(1, 2)
        assert context.dtype == torch.float32
        torch.testing.assert_close(context.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("renormalize", [False, True])
def test_without_levels_what_is_kept_keeps_its_probability(renormalize: bool) -> None:
    q, k, v = states(1)
    edges = torch.tensor([[0.02], [0.05], [0.1], [0.2]], dtype=torch.float64)
    context, codes = coded_attention(q, k, v, None, edges, None, scaling=SCALE, renormalize=renormalize)
    p = probabilities(q, k, None)
    kept = p * (p >= edges[:, :, None])
    assert codes.equal((kept > 0).to(torch.uint8)) and 0 < (kept == 0).double().mean() < 1
    kept = kept / kept.sum(-1, keepdim=True).clamp_min(1e-300) if renormalize else kept
    expected = (kept @ v.double().repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(context.double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.booleans())
def test_a_code_is_the_last_edge_that_the_weight_reaches(seed: int, relative: bool) -> None:
    """The weights are integers: sums and comparisons again in exact fractions."""
    q, k, _ = states(seed, heads=2, groups=1, queries=3)
    book = books(heads=2)
    scores = (q.double() @ k.double().mT * (SCALE * math.log2(math.e)))[0]
    weights, _ = coding._weights(scores)
    _, codes = coded_attention(q, k, k, None, book.edges, book.levels, scaling=SCALE, relative=relative)
    for head in range(2):
        for row, found in zip(weights[head].tolist(), codes[0, head].tolist(), strict=True):
            assert all(weight == int(weight) for weight in row) and max(row) == 2**36
            whole = Fraction(2**36) if relative else sum(map(Fraction, row))
            for weight, code in zip(row, found, strict=True):
                exact = [Fraction(edge) * whole for edge in book.edges[head].tolist()]
                reached = sum(limit <= weight for limit in exact)
                close = any(abs(limit - Fraction(weight)) < limit / 2**50 for limit in exact)
                assert code == reached or close


@pytest.mark.parametrize("relative", [False, True])
def test_other_texts_padding_and_a_cache_change_no_bit(relative: bool) -> None:
    options: Any = {"scaling": SCALE, "relative": relative, "renormalize": True}
    q, k, v = states(3)
    book, mask = books(), allowed(3)
    whole, codes = coded_attention(q, k, v, mask, book.edges, book.levels, **options)
    alone, own = coded_attention(
        q[:1, :, 3:], k[:1, :, 3:], v[:1, :, 3:], mask[:1, :, 3:, 3:], book.edges, book.levels, **options
    )
    assert own.equal(codes[:1, :, 3:, 3:]) and alone.equal(whole[:1, 3:])
    for step in range(7):
        seen = slice(0, step + 3)
        last, code = coded_attention(
            q[:, :, step : step + 1], k[:, :, seen], v[:, :, seen], mask[:, :, step : step + 1, seen],
            book.edges, book.levels, **options,
        )  # fmt: skip
        assert code.equal(codes[:, :, step : step + 1, seen]) and last.equal(whole[:, step : step + 1])


def test_pieces_of_rows_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = states(4)
    book = books()
    whole = coded_attention(q, k, v, None, book.edges, book.levels, scaling=SCALE)
    monkeypatch.setattr(coding, "_PIECE", 1)
    for a, b in zip(whole, coded_attention(q, k, v, None, book.edges, book.levels, scaling=SCALE), strict=True):
        assert a.equal(b)


def test_added_masks_soft_caps_and_rows_that_see_nothing() -> None:
    q, k, v = states(5)
    book = books()
    mask = allowed(5)
    mask[0, :, 0] = False
    added = torch.zeros(2, 1, 7, 9).masked_fill_(~mask, torch.finfo(torch.float32).min)
    options: Any = {"scaling": SCALE, "renormalize": True}
    one, other = (coded_attention(q, k, v, m, book.edges, book.levels, **options) for m in (mask, added))
    assert one[0].equal(other[0]) and one[1].equal(other[1])
    assert not one[0][0, 0].any() and not one[1][0, :, 0].any()
    _, codes = coded_attention(q, k, v, None, book.edges, book.levels, scaling=SCALE, softcap=2.0)
    scores = 2 * torch.tanh(q.double() @ k.double().repeat_interleave(2, 1).mT * SCALE / 2)
    p = scores.softmax(-1)
    assert not ((codes != book.codes(p)) & ~near_an_edge(p, book.edges)).any()


def test_what_is_no_number_shows_where_it_is_looked_at() -> None:
    q, k, v = states(6)
    q[0, 1, 2, 0] = torch.nan
    k[1, 0, 8] = torch.inf
    mask = allowed(6)
    context, _ = coded_attention(q, k, v, mask, books().edges, books().levels, scaling=SCALE, renormalize=True)
    broken = context.isnan().any(-1)
    expected = torch.zeros_like(broken)
    expected[0, 2, 1] = True
    expected[1, 6, :2] = True  # only the last query may look at the last key; two heads share its group
    assert broken.equal(expected)


def test_too_many_keys_are_refused() -> None:
    q, k = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, coding.MAX_KEYS + 1, 1)
    book = Codebook.log(2)
    with pytest.raises(InputError, match="131073 weights"):
        coded_attention(q, k, k, None, book.edges[None], book.levels[None], scaling=1.0)
