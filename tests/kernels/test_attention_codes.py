"""INT8 attention whose probabilities are codes of a codebook, against Python's integers, fractions and numpy's float32.

Queries and keys are made so that scores are exact: whole, half or sixteenth octaves.
"""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import kernels
from qtool.errors import InputError
from qtool.kernels import attention, native
from qtool.kernels.attention import LOG2_E, MAX_CODED_KEYS, exp2, int8_attention
from qtool.kernels.codebook import EDGE_BITS, LEVEL_MAX, WholeCodebook, whole_edges, whole_levels
from qtool.numerics.codebook import Codebook
from tests.kernels.test_attention import draw, masks

LARGEST = 254 << 14
FORMS = [(1, 2, 2, 5, 5, 8), (2, 4, 2, 3, 7, 6), (3, 6, 1, 1, 9, 4), (2, 2, 2, 1, 1, 3), (2, 6, 2, 1, 300, 17)]
FORMS += [(2, 6, 2, 33, 70, 20), (1, 3, 3, 128, 128, 32), (3, 4, 1, 17, 17, 65)]
"""Batch, heads, groups, queries, keys, size."""
WAYS = [(relative, renormalize) for relative in (False, True) for renormalize in (False, True)]


def book_of(heads: int, bits: int | None, relative: bool, renormalize: bool, seed: int = 0) -> dict[str, Any]:
    """Drawn codebooks: edges from 2^-20 to 2^-1, head 0 with levels of two digits, the others of one."""
    generator = torch.Generator().manual_seed(seed)
    count = 1 if bits is None else (1 << bits) - 1
    edges = (1 << torch.randint(4, 24, (heads, count), generator=generator)) + torch.randint(
        0, 1 << 14, (heads, count), generator=generator
    )
    levels = torch.randint(1, 128, (heads, count + 1), generator=generator, dtype=torch.int32)
    levels[:, 0], levels[0, -1] = 0, LEVEL_MAX
    book = WholeCodebook(edges.int().sort(-1).values, None if bits is None else levels, relative, renormalize)
    return {"book": book, "level_unit": torch.rand(heads, generator=generator) / 100}


def exact_row(
    weights: list[int], values: list[list[int]], edges: list[int], levels: list[int] | None, unit: float, how: Any
) -> tuple[list[int], list[np.float32]]:
    """Codes of a row and its context in units of a value code, as the docstring of kernels/attention.py says."""
    relative, renormalize = how
    total = sum(weights)
    whole = LARGEST if relative else total
    codes = [
        0 if not w else sum(Fraction(w, whole) >= Fraction(edge, 1 << EDGE_BITS) for edge in edges) for w in weights
    ]
    ratio = np.float32(1)
    if levels is None:
        kept = [w if code else 0 for w, code in zip(weights, codes, strict=True)]
        at = [math.floor(Fraction(sum(kept[:j]), 1 << 14) + Fraction(1, 2)) for j in range(len(kept) + 1)]
        codes = standing = [after - before for before, after in itertools.pairwise(at)]
        ratio = np.float32(1) if renormalize else np.float32(sum(kept)) / np.float32(max(1, total))
        divisor, factor = sum(codes), np.float32(1)
    else:
        standing = [levels[code] for code in codes]
        divisor = sum(standing) if renormalize else total if relative else 1
        factor = np.float32(1) if renormalize else np.float32(unit) * np.float32(LARGEST if relative else 1)
    sums = [sum(s * row[c] for s, row in zip(standing, values, strict=True)) for c in range(len(values[0]))]
    assert all(abs(value) < 2**31 for value in sums)
    return codes, [np.float32(value) / np.float32(max(1, divisor)) * ratio * factor for value in sums]


@settings(max_examples=300)
@given(st.data(), st.sampled_from([1, 2, 16]), st.booleans(), st.booleans(), st.integers(1, 4))
def test_codes_and_context_are_those_of_exact_fractions(
    data: st.DataObject, parts: int, relative: bool, renormalize: bool, bits: int
) -> None:
    keys, size, count = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 4)), (1 << bits) - 1
    places = data.draw(st.lists(st.integers(-126, 126), min_size=keys, max_size=keys))
    seen = data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys))
    # Edges that weights hit exactly, and others.
    edge = st.one_of(st.integers(0, 1 << EDGE_BITS), st.integers(0, 24).map(lambda octave: 1 << octave))
    edges = sorted(data.draw(st.lists(edge, min_size=count, max_size=count)))
    level = st.one_of(st.integers(1, 127), st.integers(1, LEVEL_MAX))
    levels = [0, *data.draw(st.lists(level, min_size=count, max_size=count))]
    pruning = bits == 1 and data.draw(st.booleans())
    codes = st.lists(st.integers(-127, 127), min_size=size, max_size=size)
    values = data.draw(st.lists(codes, min_size=keys, max_size=keys))
    unit, scale = (
        data.draw(st.integers(1, 10_000).map(lambda x: float(np.float32(x * 1e-6)))),
        data.draw(st.sampled_from([1.0, 0.37])),
    )

    # A query of codes 1 and 127, keys of codes a and 127: scores are a / parts octaves, and a number that all share.
    query, key = torch.zeros(1, 1, 1, size), torch.zeros(1, 1, keys, size)
    query[..., 0], query[..., 1], key[..., 1] = 1, 127, 127
    key[..., 0] = torch.tensor(places).float()
    value_scale = torch.tensor([scale])
    book = WholeCodebook(
        torch.tensor([edges], dtype=torch.int32),
        None if pruning else torch.tensor([levels], dtype=torch.int32),
        relative,
        renormalize,
    )
    found, found_codes = int8_attention(
        query, key, torch.tensor([[values]]).float() * value_scale, value_scale, torch.tensor(seen),
        scaling=1 / LOG2_E / parts, book=book, level_unit=torch.tensor([unit]),
    )  # fmt: skip
    top = max((a for a, real in zip(places, seen, strict=True) if real), default=0)
    octaves = torch.tensor([(a - top) / parts for a in places]).clamp(max=0)
    powers = exp2(octaves.clamp(-126)).numpy() * np.float32(LARGEST) + np.float32(0.5)  # two roundings to float32
    weights = [math.floor(power) if real else 0 for power, real in zip(powers, seen, strict=True)]
    row, exact = exact_row(weights, values, edges, None if pruning else levels, unit, (relative, renormalize))
    assert found_codes[0, 0, 0].tolist() == row
    assert found[0, 0, 0].tolist() == [float(value * np.float32(scale)) for value in exact]


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize("bits", [None, 2, 3, 8])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_native_kernels_give_the_same_bits(form: Any, bits: int | None, isa: str, monkeypatch: Any) -> None:
    if isa not in native.isas():
        pytest.skip(f"this CPU or build has no {isa}")
    monkeypatch.setattr(native, "isa", lambda: isa)
    for kind in ("none", "causal", "left", "right", "holes"):
        for how in WAYS:
            case, mask = draw(form, spread=1.0 if kind == "none" else 4.0), masks(form, kind)
            check_native(case, mask, **book_of(form[1], bits, *how))
    heads = torch.arange(form[1])[:, None, None] != 1  # head 1 sees nothing
    blind = heads.expand(form[0], -1, form[3], form[4])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        context, codes = check_native(draw(form), blind, **book_of(form[1], bits, True, False))
        assert not context[:, :, 1].any() and not codes[:, 1].any()


def check_native(case: Any, mask: Any, **options: Any) -> Any:
    wanted = int8_attention(*case, mask, scaling=0.3, **options)
    with kernels.using("native"):
        found = kernels.backend().int8_attention(*case, mask, scaling=0.3, **options)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    assert wanted[0].isfinite().all()
    return wanted


@pytest.mark.skipif(not native.available(), reason="without the native library")
def test_the_native_backend_hands_soft_caps_and_added_masks_on() -> None:
    form = (2, 4, 2, 5, 7, 6)
    options = book_of(4, 3, True, False)
    bias = torch.randn((2, 1, 5, 7), generator=torch.Generator().manual_seed(2))
    check_native(draw(form), bias, **options)
    check_native(draw(form), masks(form, "holes"), softcap=2.0, **options)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(2, 40), st.floats(0.1, 30), st.sampled_from(WAYS), st.sampled_from([None, 3]))
def test_a_query_alone_with_a_cache_has_the_codes_that_it_has_among_others(
    seed: int, keys: int, spread: float, how: Any, bits: int | None
) -> None:
    form = (2, 4, 2, keys, keys, 8)
    query, key, value, scale = draw(form, seed, spread)
    options = {"scaling": 0.3, **book_of(4, bits, *how, seed=seed % 97)}
    context, codes = int8_attention(query, key, value, scale, masks(form, "causal"), **options)
    for n in {1, keys // 2, keys}:
        step = query[:, :, n - 1 : n], key[:, :, :n], value[:, :, :n]
        alone, its_codes = int8_attention(*step, scale, None, **options)
        assert torch.equal(its_codes[:, :, 0], codes[:, :, n - 1, :n])
        assert torch.equal(alone[:, 0], context[:, n - 1])
        assert not codes[:, :, n - 1, n:].any()


@pytest.mark.parametrize("how", WAYS)
def test_it_is_near_attention_with_the_levels_of_float_probabilities(how: Any) -> None:
    relative, renormalize = how
    form = (1, 2, 1, 40, 40, 16)
    query, key, value, _ = draw(form, 3, 1.0)
    scale = value.abs().amax((0, 2, 3)) / 127
    float_book = Codebook.log(4, 1e-3)
    levels, units = whole_levels(float_book.levels.expand(2, -1))
    book = WholeCodebook(whole_edges(float_book.edges.expand(2, -1)), levels, *how)
    context, _ = int8_attention(query, key, value, scale, None, scaling=0.3, book=book, level_unit=units.float())
    rows = (query.double() @ key.double().mT * 0.3).softmax(-1)
    top = rows.amax(-1, keepdim=True) if relative else 1.0
    standing = float_book.values(float_book.codes(rows / top)) * top
    standing = standing / standing.sum(-1, keepdim=True) if renormalize else standing
    wanted = standing @ value.double()
    assert (context.transpose(1, 2) - wanted).norm() < 0.06 * wanted.norm()  # codes next to edges differ


@pytest.mark.parametrize("renormalize", [False, True])
def test_pruning_nothing_is_attention_without_a_codebook(renormalize: bool) -> None:
    form = (2, 4, 2, 9, 70, 8)
    book = WholeCodebook(torch.zeros(4, 1, dtype=torch.int32), None, True, renormalize)
    found, codes = int8_attention(*draw(form), None, scaling=0.3, book=book)
    wanted, plain = int8_attention(*draw(form), None, scaling=0.3)
    assert (codes.int() - plain.int()).abs().max() <= 1  # weights have 14 places behind the point, not 8
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("how", WAYS)
def test_pruning_keeps_the_mass_of_what_is_kept(how: Any) -> None:
    """Values of one are their own mean; without renormalisation the context is the mass that is left."""
    relative, renormalize = how
    form = (1, 2, 2, 30, 50, 8)
    query, key, value, _ = draw(form)
    edge = torch.full((2, 1), 1 << 18, dtype=torch.int32)
    ones, scale = torch.ones_like(value), torch.full((2,), 1 / 127)
    found, codes = int8_attention(
        query, key, ones, scale, None, scaling=0.3, book=WholeCodebook(edge, None, relative, renormalize)
    )
    rows = (query.double() @ key.double().mT * 0.3).softmax(-1)
    kept = rows >= 2.0**-6 * (rows.amax(-1, keepdim=True) if relative else 1)
    assert ((codes > 0) <= kept).float().mean() > 0.98 and (codes > 0).float().mean() < 0.9
    wanted = torch.ones_like(rows.sum(-1)) if renormalize else (rows * kept).sum(-1)
    assert (found[..., 0].mT.double() - wanted).abs().max() < 0.05


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("bits", [None, 3])
def test_damage_stays_visible_where_it_is_looked_at(backend: str, damage: float, where: int, bits: int | None) -> None:
    if backend == "native" and not native.available():
        pytest.skip("without the native library")
    form = (1, 2, 1, 4, 4, 8)
    case = [x.clone() for x in draw(form)]
    case[where][0, 0, 2, 3] = damage
    with kernels.using(backend):
        context, _ = kernels.backend().int8_attention(
            *case, masks(form, "causal"), scaling=0.3, **book_of(2, bits, True, False)
        )
    hurt = context.isnan().any(-1)[0]
    expected = torch.zeros(4, 2, dtype=torch.bool)
    if where == 0:
        expected[2, 0] = True
    else:
        expected[2:] = True
    assert torch.equal(hurt, expected)
    assert context[0][~expected].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_what_sums_have_no_room_for_is_refused(backend: str) -> None:
    if backend == "native" and not native.available():
        pytest.skip("without the native library")
    options = book_of(1, 2, True, True)
    most = (2**31 - 1) // (127 * LEVEL_MAX)
    one = torch.ones(1, 1, 1, 2)
    scale = torch.ones(1) / 127
    with kernels.using(backend):
        run = kernels.backend().int8_attention
        many = one.expand(1, 1, most + 1, 2)
        with pytest.raises(InputError, match=f"adds up {most + 1} levels of up to 16383; int32 has room for {most}"):
            run(one, many, many, scale, None, scaling=1.0, **options)
        # All at the highest level: the widest sum that is allowed.
        edges = torch.ones((1, 3), dtype=torch.int32)
        book = WholeCodebook(edges, options["book"].levels, True, True)
        context, codes = run(one, many[:, :, 1:], many[:, :, 1:], scale, None, scaling=1.0, book=book)
        assert (codes == 3).all() and context.flatten().tolist() == pytest.approx([1.0, 1.0], rel=1e-6)
        many = one.expand(1, 1, MAX_CODED_KEYS + 1, 2)
        pruned = WholeCodebook(edges[:, :1], None, True, True)
        with pytest.raises(InputError, match="65537 weights; sums are exact for 65536"):
            run(one, many, many, scale, None, scaling=1.0, book=pruned)


def test_as_many_keys_as_are_allowed_are_exact() -> None:
    """Equal weights, whose sum is the largest there is: each has a share of 2^-16, where an edge lies."""
    one = torch.ones(1, 1, 1, 1)
    many, scale = one.expand(1, 1, MAX_CODED_KEYS, 1), torch.ones(1) / 127
    levels = torch.tensor([[0, 5, 127]], dtype=torch.int32)
    for edge, code in (((1 << 8), 2), ((1 << 8) + 1, 1)):
        book = WholeCodebook(torch.tensor([[1, edge]], dtype=torch.int32), levels, False, False)
        assert MAX_CODED_KEYS * attention.LEVELS << 14 < 1 << 38
        for backend in ("reference", "native") if native.available() else ("reference",):
            with kernels.using(backend):
                context, codes = kernels.backend().int8_attention(
                    one, many, many, scale, None, scaling=1.0, book=book, level_unit=torch.tensor([2.0**-20])
                )
            assert (codes == code).all()
            assert context.item() == pytest.approx(int(levels[0, code]) / 16)
