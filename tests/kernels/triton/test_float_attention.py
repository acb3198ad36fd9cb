"""The kernel of attention with float scores gives the specification's bits; shapes are around the sizes of programs."""

import math
from typing import Any

import pytest
import torch
from draws import Draw

from qtool.errors import InputError
from qtool.kernels import attention
from qtool.kernels.attention import MAX_CODED_KEYS
from qtool.kernels.codebook import LEVEL_MAX, WholeCodebook
from qtool.kernels.triton import float_attention
from qtool.kernels.triton.backend import Triton

Form = tuple[int, int, int, int, int, int]
FORMS: list[Form] = [
    (1, 1, 1, 1, 1, 3), (2, 4, 2, 5, 7, 6), (1, 6, 2, 1, 33, 4), (1, 2, 2, 16, 32, 32), (1, 3, 1, 11, 70, 33)
]  # fmt: skip
"""Batch, heads, groups, queries, keys, size; interpreted programs have 16 rows, which heads share, and 32 keys."""
WAYS = [(relative, renormalize) for relative in (False, True) for renormalize in (False, True)]


def draw(form: Form, *, spread: float = 2.0) -> tuple[torch.Tensor, ...]:
    """Query, key, value and the scale of values, which saturate here and there."""
    batch, heads, groups, queries, keys, size = form
    normal = Draw(sum(form)).normal
    query, key = normal(batch, heads, queries, size) * spread, normal(batch, groups, keys, size)
    value = normal(batch, groups, keys, size)
    return query, key, value, value.abs().amax((0, 2, 3)) / 150


def masks(form: Form) -> list[torch.Tensor | None]:
    """None; causal for all texts; of each head and text; and with strides of which none is 1."""
    batch, heads, _, queries, keys, _ = form
    drawn = Draw(keys).integers(0, 2, batch, heads, queries, keys) > 0
    drawn[0, 0, 0] = False  # a row that sees nothing
    turned = drawn.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    causal = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    return [None, causal, drawn, turned]


def book_of(heads: int, bits: int | None, relative: bool, renormalize: bool) -> dict[str, Any]:
    """Drawn codebooks: edges from 2^-20 to 2^-1, head 0 with levels of two digits, the others of one."""
    draws = Draw(heads)
    count = 1 if bits is None else (1 << bits) - 1
    edges = (1 << draws.integers(4, 23, heads, count)) + draws.integers(0, (1 << 14) - 1, heads, count)
    levels = draws.integers(1, 127, heads, count + 1)
    levels[:, 0], levels[0, -1] = 0, LEVEL_MAX
    book = WholeCodebook(edges.sort(-1).values, None if bits is None else levels, relative, renormalize)
    return {"book": book, "level_unit": draws.normal(heads).abs() / 100}


def on(device: torch.device, value: Any) -> Any:
    """Every tensor in it on a device."""
    if isinstance(value, WholeCodebook):
        return WholeCodebook(on(device, value.edges), on(device, value.levels), value.relative, value.renormalize)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def check(case: Any, mask: Any, device: torch.device, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's context and codes, which are the specification's to the bit."""
    options = {"scaling": 0.3, **options}
    wanted = attention.int8_attention(*case, mask, **options)
    there = {name: on(device, value) for name, value in options.items()}
    found = Triton.int8_attention(*(on(device, part) for part in (*case, mask)), **there)
    context, codes = (part.cpu() for part in found)
    assert torch.equal(codes, wanted[1]) and codes.dtype == wanted[1].dtype
    assert context.dtype == wanted[0].dtype and context.shape == wanted[0].shape
    bits = [torch.where(part.isnan(), math.nan, part).contiguous().view(torch.int32) for part in (context, wanted[0])]
    assert torch.equal(*bits)  # 0 and -0 are not the same
    return context, codes


@pytest.fixture
def kernel_only(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts launches, so that what is handed to the reference does not pass for the kernel's."""
    seen: list[int] = []
    launch = float_attention.attend

    def counting(*args: Any) -> None:
        seen.append(1)
        launch(*args)

    monkeypatch.setattr(float_attention, "attend", counting)
    return seen


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_context_and_codes(form: Form, device: torch.device, kernel_only: list[int]) -> None:
    for mask in masks(form):
        for spread in (0.0, 1.0, 30.0):
            context, codes = check(draw(form, spread=spread), mask, device)
            assert context.isfinite().all()
            seen = torch.ones(codes.shape) if mask is None else mask.expand(codes.shape)
            assert codes.amax(-1).eq(254).equal(seen.bool().any(-1))
    assert len(kernel_only) == 12


@pytest.mark.parametrize("form", FORMS[1:], ids=str)
@pytest.mark.parametrize("bits", [None, 1, 3])
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_codebooks(
    form: Form, bits: int | None, how: tuple[bool, bool], device: torch.device, kernel_only: list[int]
) -> None:
    options = book_of(form[1], bits, *how)
    for mask in masks(form)[1:3]:
        context, codes = check(draw(form), mask, device, **options)
        assert context.any() and codes.any() and context.isfinite().all()
    assert len(kernel_only) == 2


def test_many_codes_and_parts_of_other_tensors(device: torch.device) -> None:
    """Operands that are views, such as of a cache; 255 edges."""
    form = (1, 2, 1, 3, 40, 8)
    query, key, value, scale = draw(form)
    turned = (query.transpose(1, 2).contiguous().transpose(1, 2), key.mT.contiguous().mT, value.repeat(1, 1, 2, 1))
    case = (*turned[:2], turned[2][:, :, 40:], scale)
    options = book_of(2, 8, False, True)
    found = check(case, None, device, **options)
    assert torch.equal(found[0], check((query, key, value, scale), None, device, **options)[0])


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # numpy's, interpreting
@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("bits", ["none", None, 3])
def test_damage_is_where_it_is_seen(
    damage: float, where: int, bits: int | str | None, device: torch.device, kernel_only: list[int]
) -> None:
    form = (2, 4, 2, 5, 35, 6)
    case = [part.clone() for part in draw(form)]
    case[where][0, 0, 2, 3] = damage
    options = {} if isinstance(bits, str) else book_of(4, bits, False, False)
    for mask in masks(form)[1:3]:
        context, _ = check(case, mask, device, **options)
        assert mask is not None
        lost = context.isnan().any(-1).transpose(1, 2)
        if where:
            sees = mask.expand(2, 4, 5, 35)[..., 2].clone()
            sees[1], sees[:, 2:] = False, False
            assert torch.equal(lost, sees)
        else:
            assert lost.sum() == 1 and lost[0, 0, 2]
    assert len(kernel_only) == 2


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_scores_beyond_float32(device: torch.device) -> None:
    case = [part.clone() for part in draw((1, 2, 2, 3, 35, 4))]
    case[0][0, 0] *= 1e20
    case[1][0, 0] *= 1e20
    context, _ = check(case, None, device)
    assert context[:, :, 0].isnan().all() and context[:, :, 1].isfinite().all()


def test_what_the_reference_does_itself(device: torch.device, kernel_only: list[int]) -> None:
    form = (1, 2, 1, 3, 5, 4)
    check(draw(form), None, torch.device("cpu"), softcap=2.0)
    check(draw(form), Draw(1).normal(1, 1, 3, 5), torch.device("cpu"))
    check(draw((1, 1, 1, 2, 3, float_attention.MAX_SIZE + 1)), None, torch.device("cpu"))
    assert not kernel_only
    empty = draw((1, 2, 1, 0, 5, 4))
    context, codes = Triton.int8_attention(*(on(device, part) for part in empty), None, scaling=1.0)
    assert context.shape == (1, 0, 2, 4) and codes.shape == (1, 2, 0, 5) and not kernel_only


def test_more_keys_than_sums_have_room_for(device: torch.device) -> None:
    one = torch.ones((1, 1, 1, 1), device=device)
    for keys, options in ((attention.MAX_KEYS, {}), (MAX_CODED_KEYS, book_of(1, None, False, False))):
        many = one.expand(1, 1, keys + 1, 1)
        with pytest.raises(InputError, match=f"adds up {keys + 1}"):
            Triton.int8_attention(one, many, many, one.flatten(), None, scaling=1.0, **options)
