"""Codes of attention weights in integers, against Python's own integers and fractions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.kernels.codebook import EDGE_BITS, LEVEL_MAX, WholeCodebook, whole_edges, whole_levels
from qtool.kernels.reference import (
    coded_context,
    exp_constants,
    integer_attention,
    integer_weights,
    quotients,
    share_bits,
)
from qtool.numerics import Dyadic
from qtool.numerics.codebook import Codebook

INT32 = (1 << 31) - 1


def half_up(value: int, places: int) -> int:
    return (2 * value + (1 << places)) // (2 << places)


def exact_quotient(value: int, total: int, bits: int) -> int:
    places = min(total.bit_length() + 29, 62)
    return max(-INT32, min(INT32, half_up(value * (2**places // total), places - bits)))


def exact_row(
    weights: list[int],
    values: list[list[int]],
    edges: list[int],
    levels: list[int] | None,
    relative: bool,
    renormalize: bool,
    grid: int,
    bits: int,
) -> list[int]:
    """A row of `coded_context`, by what the words of its docstring say."""
    b, c = exp_constants(grid)
    whole = b * b + c if relative else sum(weights)
    codes = [0 if not w else sum(Fraction(w, whole) >= Fraction(edge, 1 << 24) for edge in edges) for w in weights]
    if levels is None:
        kept = [w if code else 0 for w, code in zip(weights, codes, strict=True)]
        total = max(1, sum(kept if renormalize else weights))
        standing = [min(half_up(w * (2**46 // total), 46 - bits), 2**bits - 1) for w in kept]
        return [sum(s * row[c] for s, row in zip(standing, values, strict=True)) for c in range(len(values[0]))]
    standing = [levels[code] for code in codes]
    sums = [sum(s * row[c] for s, row in zip(standing, values, strict=True)) for c in range(len(values[0]))]
    if renormalize:
        return [exact_quotient(value, max(1, sum(standing)), bits) for value in sums]
    total = max(b * b + c, sum(weights))  # which is the sum of no row but one without keys
    return [exact_quotient(value, total, share_bits(grid)) for value in sums] if relative else sums


@settings(max_examples=300)
@given(st.data(), st.integers(6, 12), st.integers(8, 16), st.booleans(), st.booleans(), st.integers(1, 4))
def test_codes_are_those_of_exact_fractions(
    data: st.DataObject, grid: int, bits: int, relative: bool, renormalize: bool, code_bits: int
) -> None:
    keys, size, count = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3)), (1 << code_bits) - 1
    scores = data.draw(st.lists(st.integers(-(25 << grid), 0), min_size=keys, max_size=keys))
    real = data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys))
    # Edges that weights hit exactly, and others.
    edges = st.one_of(st.integers(0, 1 << EDGE_BITS), st.integers(0, 24).map(lambda places: 1 << places))
    row = sorted(data.draw(st.lists(edges, min_size=count, max_size=count)))
    level = st.one_of(st.integers(1, 127), st.integers(1, LEVEL_MAX))
    levels = [0, *data.draw(st.lists(level, min_size=count, max_size=count))]
    pruning = code_bits == 1 and data.draw(st.booleans())
    value = data.draw(
        st.lists(st.lists(st.integers(-127, 127), min_size=size, max_size=size), min_size=keys, max_size=keys)
    )
    weights = integer_weights(torch.tensor([[scores]], dtype=torch.int32)[0], torch.tensor(real), grid)[None]
    book = WholeCodebook(
        torch.tensor([row], dtype=torch.int32),
        None if pruning else torch.tensor([levels], dtype=torch.int32),
        relative,
        renormalize,
    )
    found = coded_context(weights, torch.tensor([value], dtype=torch.int32), book, grid, bits)
    assert found.dtype == torch.int32
    wanted = exact_row(
        weights[0, 0].tolist(), value, row, None if pruning else levels, relative, renormalize, grid, bits
    )
    assert found[0, 0].tolist() == wanted


@given(st.integers(-INT32, INT32), st.integers(1, 1 << 38), st.integers(8, 29))
def test_quotients_are_near(value: int, total: int, bits: int) -> None:
    found = int(quotients(torch.tensor([value], dtype=torch.int32), torch.tensor([total]), bits))
    exact = Fraction(value * 2**bits, total)
    if abs(exact) < INT32:
        # The reciprocal has 29 bits, fewer for totals beyond 33.
        assert abs(found - exact) <= Fraction(1, 2) + abs(exact) * Fraction(1, 2 ** min(29, 61 - total.bit_length()))
    else:
        assert abs(found) > INT32 * 0.999


@given(st.integers(2, 8), st.floats(1e-6, 0.4))
def test_edges_are_rounded_up(bits: int, threshold: float) -> None:
    book = Codebook.log(bits, threshold)
    for edge, whole in zip(book.edges.tolist(), whole_edges(book.edges).tolist(), strict=True):
        assert whole == math.ceil(Fraction(edge) * 2**24)


@given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=7), st.integers(127, LEVEL_MAX))
def test_levels_are_integers_near_them(above: list[float], most: int) -> None:
    levels = torch.tensor([[0.0, *sorted(above)]], dtype=torch.float64)
    found, units = whole_levels(levels, most)
    assert found.dtype == torch.int32 and found[0, 0] == 0
    off = found[0] * units[0] - levels[0]
    if max(above) > 127 * min(above):
        assert int(found.max()) == most and (off.abs() <= 0.5000001 * max(above) / most).all()
        return
    assert (found[0, 1:] >= 1).all() and int(found.max()) <= 127

    def worst(unit: float) -> float:
        return max(abs(max(1, round(level / unit)) * unit / level - 1) for level in above)

    mine = float((off[1:] / levels[0, 1:]).abs().max())
    assert mine <= min(worst(max(above) / top) for top in range(1, 128)) + 1e-12


def test_many_small_levels_do_not_outweigh_a_row() -> None:
    """8,192 keys, most of them far below a unit of levels that the table of positions leaves 2,064 of."""
    generator = torch.Generator().manual_seed(0)
    scores = 4 * torch.randn(4, 8192, generator=generator, dtype=torch.float64)
    rows = scores.softmax(-1)[None]
    book = Codebook.log(8, 1e-7)
    levels, units = whole_levels(book.levels[None], INT32 // (127 * 8192))
    codes = book.codes(rows / rows.amax(-1, keepdim=True))
    exact = book.values(codes)
    found = levels[0][codes.long()] * units[0]
    assert ((found - exact).sum(-1).abs() < 0.03 * exact.sum(-1)).all()


def test_the_numbers_of_the_paper_in_integers() -> None:
    """Edges and levels of the pruned form at 1e-3, k = 2, in units of 2^-16: 66, 656, 6554 and 207, 2072, 20724."""
    book = Codebook.log(2)
    assert [math.ceil(edge / 256) for edge in whole_edges(book.edges).tolist()] == [66, 656, 6554]
    levels, units = whole_levels(book.levels[None])
    assert (levels[0] * units[0] * 65536).round().tolist() == [0, 207, 2072, 20724]
    assert int(levels.max()) <= 127  # one digit: the largest is a hundred times the smallest


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_it_is_near_attention_with_the_levels_of_float_probabilities(relative: bool, renormalize: bool) -> None:
    """Scores that are exact in both; what differs is i-exp (0.3 % at most) where it decides a code, and roundings."""
    generator = torch.Generator().manual_seed(3)
    tokens, size, grid = 40, 8, 10
    query = torch.randint(-32767, 32768, (1, tokens, 1, size), generator=generator, dtype=torch.int32)
    query[..., 0] = 32767  # so that codes are known
    key, value = (torch.randint(-127, 128, (1, tokens, 1, size), generator=generator).to(torch.int8) for _ in range(2))
    align = (size * 127 * 127 * 32767).bit_length() - 30
    scale = 2.0**-17.5
    to_scores = Dyadic.from_float(torch.full((1, 1, 1), scale * 2.0**align))
    book = Codebook.log(3, 1e-3)
    levels, units = whole_levels(book.levels[None])
    b, c = exp_constants(grid)
    unit = 2.0**-14 if renormalize else float(units[0]) * ((b * b + c) / 2 ** share_bits(grid) if relative else 1)
    to_context = Dyadic.from_float(torch.full((1, 1, size), unit * 2.0**10))
    found = integer_attention(
        query, key, value, torch.ones(1, tokens, dtype=torch.bool), torch.tensor([align]),
        (to_scores.multiplier, to_scores.shift), (to_context.multiplier, to_context.shift), grid=grid, bits=14,
        context_bits=24, book=WholeCodebook(whole_edges(book.edges[None]), levels, relative, renormalize),
    )  # fmt: skip
    codes = torch.floor(query[0, :, 0].double() * 127 / 32767 + 0.5)
    scores = codes @ key[0, :, 0].double().T * 32767 * scale * math.log(2) / 2**grid
    rows = scores.softmax(-1)
    top = rows.amax(-1, keepdim=True) if relative else 1.0
    rounded = Codebook(book.edges, levels[0] * units[0])
    standing = rounded.values(book.codes(rows / top)) * top
    standing = standing / standing.sum(-1, keepdim=True) if renormalize else standing
    wanted = standing @ value[0, :, 0].double()
    off = (found.view(tokens, size) / 2.0**10 - wanted).norm() / wanted.norm()
    assert off < 0.04  # a code that differs is off by a factor of 2.7
