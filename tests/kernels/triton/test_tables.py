"""Float rows by the codes of a table, against float64 with a bound on the rounding."""

from typing import Any

import pytest
import torch

from qtool.kernels.reference import Reference
from qtool.kernels.triton import tables
from qtool.kernels.triton.backend import Triton

UNIT = 2.0**-24
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
NO_NUMBERS = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # from the interpreter


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)


@pytest.fixture(autouse=True)
def unaided(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel is meant to compute, the reference must not."""

    def refused(*_: Any) -> None:
        raise AssertionError("the reference was asked")

    if "reference" not in request.node.name:
        monkeypatch.setattr(Reference, "row_table_linear", refused)


@pytest.mark.parametrize("columns", [1, 16, 33, 130])
@pytest.mark.parametrize("tokens", [1, 2, 17, 40])
def test_within_the_rounding_of_float32_sums(columns: int, tokens: int, device: torch.device) -> None:
    """Every sum of n exact products, in any order, is within n + 4 units of its terms' sizes."""
    codes, scale = codes_of(35, columns), drawn(35, 1, seed=2).abs()
    x = drawn(tokens, columns, seed=3) * torch.logspace(-3, 3, tokens)[:, None]
    values = codes.double() * scale.double()
    for bias in (None, drawn(35, seed=4)):
        there = None if bias is None else bias.to(device)
        found = Triton().row_table_linear(x.to(device), codes.to(device), scale.to(device), there).cpu()
        exact, size = x.double() @ values.T, x.double().abs() @ values.abs().T
        if bias is not None:
            exact, size = exact + bias.double(), size + bias.double().abs()
        assert found.shape == exact.shape and found.dtype == torch.float32
        assert ((found.double() - exact).abs() <= (columns + 4) * UNIT * 1.01 * size).all()


@pytest.mark.parametrize("tokens", [1, 5])
def test_small_whole_numbers_leave_nothing_to_round(tokens: int, device: torch.device) -> None:
    """A code that is lost or doubled would show."""
    for columns in (1, 31, 32, 77):
        codes = codes_of(37, columns)
        x = torch.randint(-9, 10, (tokens, columns), generator=torch.Generator().manual_seed(columns)).float()
        found = Triton().row_table_linear(x.to(device), codes.to(device), torch.ones(37, 1, device=device), None)
        assert torch.equal(found.cpu(), x @ codes.float().T)


@NO_NUMBERS
def test_three_numbers_of_16_bits_make_one_of_32(device: torch.device) -> None:
    x = torch.tensor([[1 / 3, -HUGE, HUGE, TINY, 0.0, 16777215.0, -1e-3], [float("inf"), float("nan"), *[1.0] * 5]])
    planes = tables.split_floats(x.to(device)).cpu()
    assert torch.equal(planes[:, 0].bfloat16().to(planes.dtype), planes[:, 0])
    assert torch.equal(planes[:, 0].double().sum(0)[:7], x[0].double()) and not planes[:, :, 7:].any()
    whole = planes[:, 1, :7].double().sum(0)
    assert whole[0] == float("inf") and whole[1].isnan() and torch.equal(whole[2:], torch.ones(5).double())


@NO_NUMBERS
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage_stays_visible_and_in_its_row(tokens: int, value: float, device: torch.device) -> None:
    x = drawn(tokens, 40, seed=1)
    x[0, 39] = value
    y = Triton().row_table_linear(x.to(device), codes_of(20, 40).to(device), torch.ones(20, 1, device=device), None)
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


def test_wide_codes_and_no_rows_are_the_reference(device: torch.device) -> None:
    wide = torch.full((3, 5), 1000, dtype=torch.int16, device=device)
    x, scale = torch.ones(2, 5, device=device), torch.ones(3, 1, device=device)
    assert (Triton().row_table_linear(x, wide, scale, None) == 5000).all()
    assert Triton().row_table_linear(x[:0], wide.to(torch.int8), scale, None).shape == (0, 3)
