"""INT8 attention against the same formula in exact Python integers and float64, row by row."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool import kernels
from qtool.errors import InputError
from qtool.kernels import attention, native
from qtool.kernels.attention import LEVELS, exp2, int8_attention

FORMS = [(1, 2, 2, 5, 5, 8), (2, 4, 2, 3, 7, 6), (3, 6, 1, 1, 9, 4), (2, 2, 2, 1, 1, 3), (1, 3, 3, 4, 130, 16)]
"""Batch, heads, groups, queries, keys, size."""


def draw(form: Any, seed: int = 0, spread: float = 2.0) -> tuple[torch.Tensor, ...]:
    batch, heads, groups, queries, keys, size = form
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn((batch, heads, queries, size), generator=generator) * spread
    key, value = (torch.randn((batch, groups, keys, size), generator=generator) for _ in range(2))
    return query, key, value, value.abs().amax((0, 2, 3)) / 150  # so that some values saturate


def masks(form: Any, kind: str) -> torch.Tensor | None:
    """Boolean `[batch, 1, queries, keys]`."""
    batch, _, _, queries, keys, _ = form
    if kind == "none":
        return None
    at = torch.arange(keys)
    seen = at[None, None, None].expand(batch, 1, queries, keys) >= 0
    if kind == "causal":
        return seen & (at <= torch.arange(keys - queries, keys)[:, None])
    lengths = 1 + torch.arange(batch).view(-1, 1, 1, 1) * 2
    left, right = at >= keys - lengths, at < lengths
    holes = (at + torch.arange(batch).view(-1, 1, 1, 1)) % 3 != 1
    return seen & {"left": left, "right": right, "holes": holes}[kind]


def half_up(x: Fraction | float) -> int:
    return math.floor(Fraction(x) + Fraction(1, 2))


def codes_of(row: list[float]) -> tuple[list[int], Fraction]:
    """Codes of a row in ±127, with the scale that float32 has."""
    scale = torch.tensor(max(abs(x) for x in row)).div(127).item()
    return [half_up(torch.tensor(x).div(scale).item()) for x in row], Fraction(scale)


def by_hand(case: Any, mask: torch.Tensor | None, scaling: float, at: tuple[int, int, int]) -> tuple[Any, Any]:
    """The codes of one query and its context, from integers; the weights are rounded from float64 exponentials."""
    query, key, value, scale = case
    b, h, i = at
    g = h * key.shape[1] // query.shape[1]
    seen = [j for j in range(key.shape[2]) if mask is None or bool(mask[b, 0, i, j])]
    q, unit = codes_of(query[b, h, i].tolist())
    scores = {}
    for j in seen:
        k, k_unit = codes_of(key[b, g, j].tolist())
        scores[j] = sum(x * y for x, y in zip(q, k, strict=True)) * float(unit * k_unit) * scaling
    codes, total = [0] * key.shape[2], 0
    for j in seen:
        before = half_up(Fraction(total, 256))
        total += half_up(math.exp(scores[j] - max(scores.values())) * LEVELS * 256)
        codes[j] = half_up(Fraction(total, 256)) - before
    context = []
    for c in range(value.shape[3]):
        v = [max(-127, min(127, half_up(value[b, g, j, c].div(scale[g]).item()))) for j in range(key.shape[2])]
        acc = sum(x * y for x, y in zip(codes, v, strict=True))
        context.append(float(Fraction(acc, max(1, sum(codes))) * Fraction(scale[g].item())))
    return codes, context


@pytest.mark.parametrize("kind", ["none", "causal", "left", "right", "holes"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_codes_and_context_are_those_of_the_formula(form: Any, kind: str) -> None:
    case, mask = draw(form), masks(form, kind)
    context, codes = int8_attention(*case, mask, scaling=form[-1] ** -0.5)
    assert context.shape == (form[0], form[3], form[1], form[5]) and codes.dtype == torch.uint8
    off = 0
    for b in range(form[0]):
        for h in range(form[1]):
            for i in range(form[3]):
                wanted, exact = by_hand(case, mask, form[-1] ** -0.5, (b, h, i))
                found = codes[b, h, i].tolist()
                if found == wanted:
                    torch.testing.assert_close(
                        context[b, i, h].double(), torch.tensor(exact).double(), rtol=1e-5, atol=1e-7
                    )
                else:  # a sum within 2e-7 of a half may round the other way
                    off += 1
                    assert max(abs(x - y) for x, y in zip(found, wanted, strict=True)) == 1
    assert off <= form[0] * form[1] * form[3] / 20


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_is_attention(form: Any) -> None:
    query, key, value, _ = case = draw(form, spread=1.0)
    case = (*case[:3], value.abs().amax((0, 2, 3)) / 127)
    mask = masks(form, "causal")
    assert mask is not None
    context, codes = int8_attention(*case, mask, scaling=0.3)
    wide = [x.double().repeat_interleave(form[1] // form[2], 1) for x in (key, value)]
    scores = (query.double() @ wide[0].transpose(-1, -2) * 0.3).masked_fill(~mask, -math.inf)
    exact = scores.softmax(-1)
    found = codes.double() / codes.sum(-1, keepdim=True)
    assert (found - exact).abs().max() < 0.02
    assert (context.transpose(1, 2) - exact @ wide[1]).norm() < 0.03 * (exact @ wide[1]).norm()


def test_small_probabilities_of_a_long_row_add_up() -> None:
    """One key draws nine tenths, and each of 400 others less than half a code: their values still count."""
    keys = 401
    query, key = torch.ones(1, 1, 1, 1), torch.full((1, 1, keys, 1), 0.0)
    key[..., 0, 0] = math.log(9 * 400)
    value = torch.ones(1, 1, keys, 1)
    value[..., 0, 0] = 0
    context, codes = int8_attention(query, key, value, torch.tensor([1 / 127]), None, scaling=1.0)
    assert codes[0, 0, 0, 0] == LEVELS and codes[0, 0, 0, 1:].max() == 1
    assert context.item() == pytest.approx(0.1, rel=0.02)


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(2, 40), st.integers(1, 3), st.floats(0.1, 30))
def test_a_query_alone_with_a_cache_has_the_codes_that_it_has_among_others(
    seed: int, keys: int, batch: int, spread: float
) -> None:
    form = (batch, 4, 2, keys, keys, 8)
    query, key, value, scale = draw(form, seed, spread)
    context, codes = int8_attention(query, key, value, scale, masks(form, "causal"), scaling=0.3)
    for n in {1, keys // 2, keys}:
        step = query[:, :, n - 1 : n], key[:, :, :n], value[:, :, :n]
        alone, its_codes = int8_attention(*step, scale, None, scaling=0.3)
        assert torch.equal(its_codes[:, :, 0], codes[:, :, n - 1, :n])
        assert torch.equal(alone[:, 0], context[:, n - 1])
        assert not codes[:, :, n - 1, n:].any()


@settings(max_examples=25)
@given(st.integers(0, 2**32), st.integers(1, 30), st.integers(0, 20), st.integers(0, 20))
def test_padding_and_neighbours_change_nothing(seed: int, tokens: int, before: int, behind: int) -> None:
    form = (1, 2, 2, tokens, tokens, 8)
    query, key, value, scale = draw(form, seed)
    context, codes = int8_attention(query, key, value, scale, None, scaling=0.4)
    padded = [torch.nn.functional.pad(x, (0, 0, before, behind), value=3.5) for x in (query, key, value)]
    wide = [torch.cat([torch.flip(x, (0, 2)) * 9, x, x * 0]) for x in padded]
    seen = torch.zeros(3, 1, 1, before + tokens + behind, dtype=torch.bool)
    seen[..., before : before + tokens] = True
    found, found_codes = int8_attention(*wide, scale, seen, scaling=0.4)
    here = slice(before, before + tokens)
    assert torch.equal(found_codes[1, :, here, here], codes[0]) and torch.equal(found[1, here], context[0])


def test_additive_masks_and_soft_caps_count() -> None:
    form = (2, 4, 2, 5, 7, 8)
    case, seen = draw(form), masks(form, "holes")
    assert seen is not None
    hidden = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for add in (hidden, hidden.masked_fill(~seen, -math.inf), hidden.half()):
        for found, wanted in zip(
            int8_attention(*case, add, scaling=0.3), int8_attention(*case, seen, scaling=0.3), strict=True
        ):
            assert torch.equal(found, wanted)
    bias = torch.randn((2, 4, 5, 7), generator=torch.Generator().manual_seed(1))
    query, key, _, _ = case
    wide = key.double().repeat_interleave(2, 1)
    scores = query.double() @ wide.transpose(-1, -2) * 0.3
    for softcap in (None, 1.5):
        capped = scores if softcap is None else softcap * (scores / softcap).tanh()
        _, codes = int8_attention(*case, bias, scaling=0.3, softcap=softcap)
        assert ((codes / codes.sum(-1, keepdim=True)) - (capped + bias).softmax(-1)).abs().max() < 0.02


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    form = (1, 2, 2, 3, 4, 8)
    seen = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    seen[..., 1, :] = False
    context, codes = int8_attention(*draw(form), seen, scaling=0.3)
    assert not codes[:, :, 1].any() and not context[:, 1].any() and context[:, 0].all()


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_damage_stays_visible_where_it_is_looked_at(damage: float, where: int) -> None:
    form = (1, 2, 1, 4, 4, 8)
    case = [x.clone() for x in draw(form)]
    case[where][0, 0, 2, 3] = damage
    context, _ = int8_attention(*case, masks(form, "causal"), scaling=0.3)
    hurt = context.isnan().any(-1)[0]
    expected = torch.zeros(4, 2, dtype=torch.bool)
    if where == 0:
        expected[2, 0] = True
    else:
        expected[2:] = True
    assert torch.equal(hurt, expected)
    assert context[0][~expected].isfinite().all()


def test_more_keys_than_an_accumulator_holds_are_refused() -> None:
    keys = attention.MAX_KEYS
    assert keys * LEVELS * 127 < 2**31 <= (keys + 1) * LEVELS * 127
    one = torch.ones(1, 1, 1, 2)
    many = one.expand(1, 1, keys + 1, 2)
    with pytest.raises(InputError, match="66572 keys"):
        int8_attention(one, many, many, torch.ones(1), None, scaling=1.0)


def test_the_widest_sums_are_exact() -> None:
    """As many keys as are allowed, all of the largest code."""
    keys = attention.MAX_KEYS
    one = torch.ones(1, 1, 1, 1)
    context, codes = int8_attention(
        one, one.expand(1, 1, keys, 1), one.expand(1, 1, keys, 1), torch.tensor([1 / 127]), None, scaling=1.0
    )
    assert (codes == LEVELS).all() and context.item() == pytest.approx(1.0, abs=1e-6)


def test_powers_of_two_are_close_and_exact_where_they_can_be() -> None:
    x = torch.linspace(-30, 0, 100_001)
    assert (exp2(x).double() / x.double().exp2() - 1).abs().max() < 2e-7
    whole = torch.arange(-30, 1).float()
    assert torch.equal(exp2(whole), torch.tensor([2.0**n for n in range(-30, 1)]))


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize(
    "form", [*FORMS, (2, 6, 2, 33, 70, 20), (1, 3, 3, 128, 128, 32), (3, 4, 1, 17, 17, 65)], ids=str
)
def test_native_kernels_give_the_same_bits(form: Any, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in native.isas():
        pytest.skip(f"this CPU or build has no {isa}")
    monkeypatch.setattr(native, "isa", lambda: isa)
    for kind in ("none", "causal", "left", "right", "holes"):
        for spread in (0.0, 1.0, 30.0):
            case, mask = draw(form, spread=spread), masks(form, kind)
            check_native(case, mask, scaling=0.3)
            wide = None if mask is None else mask.expand(-1, form[1], -1, -1).contiguous()
            check_native(
                case, wide if wide is None else wide & (torch.arange(form[1])[:, None, None] != 1), scaling=0.3
            )
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        check_native(draw(form), masks(form, "causal"), scaling=0.3)


def check_native(case: Any, mask: Any, **options: Any) -> None:
    wanted = int8_attention(*case, mask, **options)
    with kernels.using("native"):
        found = kernels.backend().int8_attention(*case, mask, **options)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.skipif(not native.available(), reason="without the native library")
@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_native_kernels_show_the_same_damage(damage: float, where: int) -> None:
    form = (2, 4, 2, 5, 19, 6)
    case = [x.clone() for x in draw(form)]
    case[where][0, 0, 2, 3] = damage
    with kernels.using("native"):
        found, _ = kernels.backend().int8_attention(*case, masks(form, "causal"), scaling=0.3)
    wanted, _ = int8_attention(*case, masks(form, "causal"), scaling=0.3)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not native.available(), reason="without the native library")
def test_the_native_backend_hands_soft_caps_and_added_masks_on() -> None:
    form = (2, 4, 2, 5, 7, 6)
    bias = torch.randn((2, 1, 5, 7), generator=torch.Generator().manual_seed(2))
    check_native(draw(form), bias, scaling=0.3)
    check_native(draw(form), masks(form, "holes"), scaling=0.3, softcap=2.0)
