"""GPTQ and GPFQ against the textbook forms that work on the data themselves, column after column."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import InputError
from qtool.numerics import QuantSpec
from qtool.rounding import Moments, gpfq, gptq, mse, nearest

SPECS = ["int2:channel:sym", "int3:tensor:sym", "int4:group:12:sym", "int4:rows:4:sym", "int8:channel:sym"]
SPECS += ["int4:group:16:asym", "int3:group:20:min"]  # their last group is shorter


def case(seed: int, *, rows: int = 8, columns: int = 36, tokens: int = 200, noise: float = 0.05) -> Any:
    """A weight, correlated inputs `X` and the disturbed ones `Y`, and their moments."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=draw, dtype=torch.float64) / columns**0.5
    spread = torch.rand(columns, generator=draw, dtype=torch.float64).mul(3).exp()
    exact = torch.randn(tokens, columns, generator=draw, dtype=torch.float64) @ mixing * spread
    lowered = exact + noise * exact.std(0) * torch.randn(tokens, columns, generator=draw, dtype=torch.float64)
    exact, lowered = exact.float(), lowered.float()
    weight = torch.randn(rows, columns, generator=draw)
    return weight, exact, lowered, moments(exact, lowered)


def moments(exact: torch.Tensor, lowered: torch.Tensor) -> Moments:
    """In float64, so that the forms on the data see the same numbers."""
    found = Moments(exact.shape[1])
    x, y = exact.double(), lowered.double()
    found.own, found.cross, found.tokens = y.t() @ y, y.t() @ x, len(y)
    return found


def column_scales(tensor: Any, columns: int) -> Any:
    """Scales and offsets, float64 `[rows, columns]` each."""
    width = tensor.spec.block[1] or columns
    offset = tensor.params.offsets()
    fields = tensor.params.scale, torch.zeros_like(tensor.params.scale) if offset is None else offset
    rows = [field.double().repeat_interleave(tensor.shape[0] // field.shape[0], 0) for field in fields]
    return torch.stack([row.repeat_interleave(width, 1)[:, :columns] for row in rows])


def round_to(values: torch.Tensor, grid: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    scale, offset = grid
    return ((values - offset) / scale + 0.5).floor().clamp(spec.qmin, spec.qmax)


def value_of(codes: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    return codes * grid[0] + grid[1]


def order_of(lowered: torch.Tensor) -> list[int]:
    energy = lowered.double().square().sum(0)
    return sorted(range(len(energy)), key=lambda column: (-float(energy[column]), column))


def brain_surgeon(weight: torch.Tensor, hessian: torch.Tensor, grid: torch.Tensor, order: list[int], spec: Any) -> Any:
    """Optimal brain quantization in a fixed order: the inverse is that of the columns that are left, each time anew."""
    values, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.int64)
    for place, column in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        found = round_to(values[:, column], grid[:, :, column], spec)
        codes[:, column] = found.long()
        error = (values[:, column] - value_of(found, grid[:, :, column])) / inverse[0, 0]
        values[:, left] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("spelling", SPECS)
def test_gptq_is_optimal_brain_quantization(spelling: str) -> None:
    spec = QuantSpec.parse(spelling)
    weight, _, lowered, known = case(1)
    known.cross = known.own  # no correction of inputs: the weight itself is rounded
    found = gptq(weight, spec, known, layout="rows")
    damped = known.own + 0.01 * known.own.diagonal().mean() * torch.eye(36, dtype=torch.float64)
    wanted = brain_surgeon(weight, damped, column_scales(found, 36), order_of(lowered), spec)
    assert torch.equal(found.integers().long(), wanted)


def test_gptq_of_more_columns_than_a_block() -> None:
    spec = QuantSpec.parse("int4:channel:sym")
    weight, _, lowered, known = case(2, rows=4, columns=300, tokens=900)
    known.cross = known.own
    found = gptq(weight, spec, known, layout="rows")
    damped = known.own + 0.01 * known.own.diagonal().mean() * torch.eye(300, dtype=torch.float64)
    wanted = brain_surgeon(weight, damped, column_scales(found, 300), order_of(lowered), spec)
    assert torch.equal(found.integers().long(), wanted)


@pytest.mark.parametrize("spelling", SPECS)
@pytest.mark.parametrize("columns", [36, 300])
def test_gpfq_follows_the_path(spelling: str, columns: int) -> None:
    """The recursion over the data itself; what it ends with is the error of the outputs."""
    spec = QuantSpec.parse(spelling)
    weight, exact, lowered, known = case(3, columns=columns, tokens=400)
    found = gpfq(weight, spec, known, layout="rows")
    grid, x, y = column_scales(found, columns), exact.double(), lowered.double()
    path = torch.zeros(len(weight), len(x), dtype=torch.float64)
    codes = torch.zeros(weight.shape, dtype=torch.int64)
    for column in order_of(lowered):
        path += weight[:, column].double()[:, None] * x[:, column]
        wish = path @ y[:, column] / y[:, column].square().sum()
        codes[:, column] = round_to(wish, grid[:, :, column], spec).long()
        path -= value_of(codes[:, column], grid[:, :, column])[:, None] * y[:, column]
    assert torch.equal(found.integers().long(), codes)
    torch.testing.assert_close(path.t(), x @ weight.double().t() - y @ value_of(codes, grid).t(), rtol=1e-9, atol=1e-9)


def output_error(weight: torch.Tensor, tensor: Any, exact: torch.Tensor, lowered: torch.Tensor) -> float:
    wanted, values = exact.double() @ weight.double().t(), tensor.dequantize().double()
    return float((lowered.double() @ values.t() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_both_leave_smaller_errors_than_the_matrix_alone(bits: int, seed: int) -> None:
    spec = QuantSpec.parse(f"int{bits}:channel:sym")
    weight, exact, lowered, known = case(seed, tokens=2000)
    errors = [output_error(weight, rounded, exact, lowered) for rounded in (
        gptq(weight, spec, known), gpfq(weight, spec, known), mse(weight, spec))]  # fmt: skip
    assert errors[0] < 0.85 * errors[2] and errors[1] < 0.9 * errors[2]


def test_inputs_are_corrected() -> None:
    """With the float model's inputs in sight, outputs are closer to float's than with the disturbed ones alone."""
    spec = QuantSpec.parse("int8:channel:sym")
    weight, exact, lowered, known = case(5, noise=0.2, tokens=2000)
    blind = moments(lowered, lowered)
    errors = [output_error(weight, gptq(weight, spec, one), exact, lowered) for one in (known, blind)]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("rounding", [gptq, gpfq])
@given(seed=st.integers(0, 2**31), spelling=st.sampled_from(SPECS))
def test_columns_that_nothing_reaches_are_rounded_to_nearest(rounding: Any, seed: int, spelling: str) -> None:
    spec = QuantSpec.parse(spelling)
    weight, exact, lowered, _ = case(seed, tokens=60)
    exact[:, ::5] = lowered[:, ::5] = 0
    found = rounding(weight, spec, moments(exact, lowered), layout="rows")
    wanted = round_to(weight.double(), column_scales(found, 36), spec)
    assert torch.equal(found.integers()[:, ::5].long(), wanted[:, ::5].long())
    assert spec.qmin <= int(found.integers().min()) and int(found.integers().max()) <= spec.qmax


@pytest.mark.parametrize("rounding", [gptq, gpfq])
def test_without_any_input_all_is_nearest(rounding: Any) -> None:
    spec = QuantSpec.parse("int4:channel:sym")
    weight = case(0)[0]
    silent = torch.zeros(10, 36)
    assert torch.equal(rounding(weight, spec, moments(silent, silent)).codes, mse(weight, spec).codes)


@pytest.mark.parametrize("rounding", [gptq, gpfq])
def test_what_nearest_refuses_is_refused(rounding: Any) -> None:
    weight, _, _, known = case(0)
    with pytest.raises(InputError, match="NaN or infinite"):
        rounding(weight.index_fill(1, torch.tensor([3]), torch.nan), QuantSpec.parse("int4:channel:sym"), known)
    with pytest.raises(InputError, match="do not divide"):
        nearest(weight, QuantSpec.parse("int4:rows:7:sym"))
    with pytest.raises(InputError, match="do not divide"):
        rounding(weight, QuantSpec.parse("int4:rows:7:sym"), known)


def test_moments_are_sums_of_products() -> None:
    _, exact, lowered, wanted = case(7)
    found = Moments(36)
    for rows in torch.arange(200).split(64):
        found.update(exact[rows], lowered[rows])
    assert found.tokens == 200
    torch.testing.assert_close(found.own, wanted.own, rtol=1e-4, atol=1e-4 * float(wanted.own.abs().max()))
    torch.testing.assert_close(found.cross, wanted.cross, rtol=1e-4, atol=1e-4 * float(wanted.cross.abs().max()))


def test_rows_count_by_what_they_are_given() -> None:
    """Twice is as if a row were there twice, nothing as if it were not; counts of other rows do not count at all."""
    _, exact, lowered, _ = case(9, tokens=60)
    counts = torch.arange(60) % 3
    found, wanted, plain = Moments(36), Moments(36), Moments(36)
    found.update(exact, lowered, counts)
    wanted.update(exact.repeat_interleave(counts, 0), lowered.repeat_interleave(counts, 0))
    scale = float(wanted.own.abs().max())
    torch.testing.assert_close(found.own, wanted.own, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(found.cross, wanted.cross, rtol=1e-5, atol=1e-5 * scale)
    other = Moments(36)
    other.update(exact, lowered, counts[:50])
    plain.update(exact, lowered)
    assert torch.equal(other.own, plain.own) and torch.equal(other.cross, plain.cross)


def test_rows_without_partners_count_alone() -> None:
    _, exact, lowered, _ = case(8)
    found = Moments(36)
    found.update(exact[:50], lowered)
    assert torch.equal(found.own, found.cross) and found.tokens == 200
