"""Attention of one query a head in float64 against torch's, to the last bit of float32."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.hf import _one_query
from qtool.kernels import integer, native
from qtool.kernels.integer import Native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "")


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Scores, softmax and sum in float64, spelled out."""
    key, value = (x.double().repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("isa", native.ISAS)
@given(
    batch=st.integers(1, 3), groups=st.integers(1, 3), shared=st.integers(1, 10), keys=st.integers(1, 70),
    size=st.integers(1, 70), mask=st.sampled_from(["none", "batch", "heads"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_shape(
    isa: str, batch: int, groups: int, shared: int, keys: int, size: int, mask: str, seed: int
) -> None:
    """States as the cache and the projections leave them: apart from each other in memory, channels together."""
    if isa not in native.isas():
        pytest.skip(f"this CPU has no {isa}")
    heads = groups * shared
    query = drawn(seed, batch, 1, heads + 3, size)[:, :, 3:].transpose(1, 2) * 3
    key, value = drawn(seed + 1, 2, batch, groups, keys + 2, size)[:, :, :, 1 : keys + 1].unbind(0)
    seen = None
    if mask != "none":
        seen = drawn(seed + 2, batch, heads if mask == "heads" else 1, 1, keys) > 0
        seen[..., -1] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "isa", lambda: isa)
        patch.setattr(integer, "_ALONE", -1)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(Native.wide_attention(query, key, value, seen, 0.3))
    wanted = plain(query, key, value, seen, 0.3)
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])
    assert found[0].shape == (batch, 1, heads, size) and found[0].dtype == torch.float32
    # Rounded once, from a double that is right to some 1e-13: the nearest float, or its neighbour where it is a tie.
    assert ((found[0].double() - wanted).abs() <= 2.0**-24 * 1.0001 * wanted.abs() + 1e-13).all()


def test_who_sees_nothing_gets_nothing_and_what_is_hidden_stays_hidden() -> None:
    query, key, value = drawn(0, 2, 2, 1, 8), drawn(1, 2, 1, 4, 8), drawn(2, 2, 1, 4, 8)
    seen = torch.tensor([[True, False, True, True], [False] * 4])[:, None, None]
    key[0, 0, 1], value[0, 0, 1] = float("nan"), float("inf")
    found = Native.wide_attention(query, key, value, seen, 1.0)
    assert not found[1].any() and found.isfinite().all()
    value[0, 0, 2, 3] = float("nan")
    found = Native.wide_attention(query, key, value, seen, 1.0)
    assert found[0, ..., 3].isnan().all() and found[0].isnan().sum() == 2


def test_sizes_of_scores_that_only_a_maximum_takes() -> None:
    query, key, value = torch.full((1, 1, 1, 4), 100.0), torch.eye(4)[None, None] * 1000, torch.eye(4)[None, None]
    assert torch.equal(Native.wide_attention(query, key, value, None, 1.0)[0, 0], torch.full((1, 4), 0.25))
    query[..., 2] = 101
    assert torch.equal(Native.wide_attention(query, key, value, None, 1.0)[0, 0], torch.eye(4)[2:3])


def test_what_is_left_to_torch() -> None:
    query, key = drawn(0, 2, 4, 1, 8), drawn(1, 2, 2, 5, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert _one_query(query, key, key, mask, {"scaling": 1.0, "dropout": 0.0, "position_ids": None, "use_cache": True})
    assert _one_query(query, key, key, None, {})
    assert not _one_query(drawn(0, 2, 4, 2, 8), key, key, None, {}), "several queries"
    assert not _one_query(query.double(), key, key, None, {})
    assert not _one_query(query, key, key, mask.float(), {}), "a mask that is added"
    assert not _one_query(query, key, key, mask[..., :4], {})
    assert not _one_query(query[:1], key, key, None, {}) and not _one_query(query, key[:1], key[:1], None, {})
    assert not _one_query(query, key[..., :4], key[..., :4], None, {}), "heads of another size"
    assert not _one_query(
        query, key, key, torch.ones(2, 1, 5, 1, dtype=torch.bool).transpose(2, 3)[..., ::1][:, [0, 0, 0]], {}
    )
    assert not _one_query(query, key, key.transpose(2, 3).contiguous().transpose(2, 3), None, {})
    assert not _one_query(query, key, key, None, {"dropout": 0.1})
    assert not _one_query(query, key, key, None, {"position_bias": mask})
    assert not _one_query(query.clone().requires_grad_(), key, key, None, {})
