"""The kernels of steps against softmax and sums in float64 that are spelled out; keys are cut in several ways."""

import pytest
import torch
from draws import Draw

from qtool.kernels.reference import Reference
from qtool.kernels.triton import tuning, wide_attention
from qtool.kernels.triton.backend import Triton

Form = tuple[int, int, int, int, int]
FORMS: list[Form] = [
    (1, 1, 1, 1, 1), (2, 4, 2, 17, 6), (1, 3, 3, 50, 32), (3, 4, 1, 33, 5), (1, 9, 1, 16, 90), (2, 2, 2, 64, 40),
    (1, 7, 1, 19, 130),
]  # fmt: skip
"""Batch, heads, groups, keys, size; interpreted programs take 16 keys at a time."""


def drawn(form: Form, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, keys and values as projections and caches leave them: apart in memory, channels side by side."""
    batch, heads, groups, keys, size = form
    normal = Draw(sum(form)).normal
    query = normal(batch, 1, heads + 3, size)[:, :, 3:].transpose(1, 2) * 3
    key, value = normal(2, batch, groups, keys + 2, size)[:, :, :, 1 : keys + 1].unbind(0)
    return query.to(device), key.to(device), value.to(device)


def masks(form: Form, device: torch.device) -> list[torch.Tensor | None]:
    batch, heads, _, keys, _ = form
    seen = Draw(keys).integers(0, 1, batch, heads, 1, keys) > 0
    seen[..., keys // 2] = True
    return [None, seen[:, :1].to(device), seen.to(device), seen[:1, :1].to(device)]


@pytest.mark.parametrize("processors", [1, 9])
@pytest.mark.parametrize("form", FORMS)
def test_every_shape(form: Form, processors: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "machine", lambda: (9, processors))
    query, key, value = drawn(form, device)
    for mask in masks(form, device):
        found = Triton.wide_attention(query, key, value, mask, 0.3)
        wanted = spelled_out(query, key, value, mask, 0.3)
        assert found.shape == wanted.shape and found.dtype == torch.float32
        # Rounded once, from a double that is right to some 1e-13: the nearest float, or its neighbour in a tie.
        assert ((found.double() - wanted).abs() <= 2.0**-24 * 1.0001 * wanted.abs() + 1e-13).all()


def spelled_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """float64 `[batch, 1, heads, size]`, a head at a time."""
    batch, heads, _, size = query.shape
    result = torch.empty((batch, 1, heads, size), dtype=torch.float64, device=query.device)
    for text in range(batch):
        for head in range(heads):
            group = head // (heads // key.shape[1])
            scores = (key[text, group].double() * query[text, head].double()).sum(-1) * scaling
            if mask is not None:
                scores[~mask.expand(batch, heads, -1, -1)[text, head, 0]] = -torch.inf
            result[text, 0, head] = scores.softmax(0) @ value[text, group].double()
    return result


def test_cuts_of_the_keys_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the shapes above would all be one program's."""
    monkeypatch.setattr(tuning, "machine", lambda: (9, 4))
    monkeypatch.setattr(tuning, "interpreted", lambda: True)
    assert [tuning.keys_of(groups, 1, 64, 16).per for groups in (1, 4, 8, 20)] == [1, 2, 4, 4]
    assert [tuning.keys_of(1, shared, 64, 256).heads for shared in (1, 2, 3, 7)] == [1, 2, 2, 2]


@pytest.mark.parametrize("ops", [Triton, Reference])
def test_who_sees_nothing_gets_nothing_and_what_is_hidden_stays_hidden(
    ops: type[Reference], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "machine", lambda: (9, 100))
    query, key, value = drawn((2, 2, 1, 40, 8), device)
    seen = torch.ones((2, 2, 1, 40), dtype=torch.bool, device=device)
    seen[0, :, 0, 20], seen[1, 0] = False, False
    seen[0, 0, 0, 30] = False
    key, value = key.clone(), value.clone()
    key[0, 0, 20], value[0, 0, 20] = float("nan"), float("inf")
    found = ops.wide_attention(query, key, value, seen, 1.0)
    assert not found[1, 0, 0].any() and found[1, 0, 1].any() and found.isfinite().all()
    value[0, 0, 30, 3] = float("nan")  # the second head sees it, and the first does not
    found = ops.wide_attention(query, key, value, seen, 1.0)
    assert found[0, 0, 1, 3].isnan() and found.isnan().sum() == 1
    nothing = torch.full_like(key, -torch.inf)  # what is seen weighs nothing
    assert not ops.wide_attention(query.abs(), nothing, value[1:].expand_as(value), seen, 1.0).any()
    key[0, 0, 31, 0] = float("nan")
    assert ops.wide_attention(query, key, value, seen, 1.0).isnan().sum() == 16


def test_sizes_of_scores_that_only_a_maximum_takes(device: torch.device) -> None:
    query, keys = torch.full((1, 1, 1, 4), 100.0, device=device), torch.eye(4, device=device)[None, None]
    assert torch.equal(Triton.wide_attention(query, keys * 1000, keys, None, 1.0).cpu()[0, 0], torch.full((1, 4), 0.25))
    query[..., 2] = 101
    assert torch.equal(Triton.wide_attention(query, keys * 1000, keys, None, 1.0).cpu()[0, 0], torch.eye(4)[2:3])


@pytest.mark.parametrize("form", [(1, 1, 1, 5, 300), (0, 1, 1, 5, 8)])
def test_what_is_left_to_torch(form: Form, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_attention, "attend", lambda *given: pytest.fail("launched"))
    query, key, value = drawn(form, device)
    assert Triton.wide_attention(query, key, value, None, 1.0).shape == (form[0], 1, form[1], form[4])
