"""Float rows by integer codes, on every backend and instruction set, against float64 with a bound on the rounding."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qtool.kernels import native, reference
from qtool.kernels.integer import Native
from qtool.numerics import QTensor, QuantSpec

UNIT = 2.0**-24
SPECS = ["int8:channel:sym", "int4:channel:sym", "int8:tensor:asym", "int4:rows:3:min", "int8:group:8:sym"]
SPECS += ["int4:group:20:min", "int2:group:16:asym", "int8:block:3x12:min", "int4:group:7:min", "int3:group:128:sym"]
INPUTS = [1, 3, 4, 5, 20, 63, 130, 300]


@pytest.fixture(params=["reference", *native.ISAS])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "reference":
        yield reference.Reference()
        return
    if request.param not in native.isas():
        pytest.skip(f"no {request.param} here: {native.reason() or 'this CPU has none'}")
    monkeypatch.setattr(native, "isa", lambda: request.param)
    yield Native()


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(ops: Any, stored: QTensor, x: torch.Tensor, *rest: torch.Tensor | None) -> torch.Tensor:
    width = min(stored.spec.block[1] or stored.shape[1], stored.shape[1])
    found: torch.Tensor = ops.code_linear(x, ops.prepare_codes(stored.codes, stored.shape, width), *rest)
    return found


def spread(values: torch.Tensor, shape: tuple[int, int], width: int) -> torch.Tensor:
    wide = values.double().repeat_interleave(shape[0] // values.shape[0], 0).repeat_interleave(width, 1)
    return wide[:, : shape[1]]


@pytest.mark.parametrize("spelling", SPECS)
@pytest.mark.parametrize("bias", [True, False])
def test_within_the_rounding_of_float32_sums(ops: Any, spelling: str, bias: bool) -> None:
    """Every sum of n products, in any order and with any fused steps, is within n + 4 units of its terms' sizes.

    The terms are x · code · scale and x · offset apart, which is how they may be added.
    """
    spec = QuantSpec.parse(spelling)
    for inputs in INPUTS:
        shape = (33 if spec.block[0] == 3 else 50, inputs)
        width = min(spec.block[1] or inputs, inputs)
        stored = QTensor.quantize(drawn(*shape, seed=inputs) + 0.3, spec, layout="tiled")
        scale, offset = stored.params.scale, stored.params.offsets()
        codes = stored.integers().double() * spread(scale, shape, width)
        zeros = torch.zeros(shape, dtype=torch.float64) if offset is None else spread(offset, shape, width)
        addend = drawn(shape[0], seed=1) if bias else None
        for rows in (0, 1, 2, 3, 9, 17):
            x = drawn(rows, inputs, seed=rows) * torch.logspace(-3, 3, rows)[:, None]
            found = product(ops, stored, x, scale, addend, offset)
            assert found.shape == (rows, shape[0]) and found.dtype == torch.float32
            exact = x.double() @ (codes + zeros).T
            size = x.double().abs() @ (codes.abs() + zeros.abs()).T
            if addend is not None:
                exact, size = exact + addend.double(), size + addend.double().abs()
            assert ((found.double() - exact).abs() <= (inputs + 4) * UNIT * 1.01 * size).all(), (inputs, rows)


def test_sums_are_exact_where_float32_holds_them(ops: Any) -> None:
    """Small whole numbers leave nothing to round: a code that is lost or doubled would show."""
    draw = torch.Generator().manual_seed(0)
    for bits, low, high in ((8, -128, 127), (4, -8, 7)):
        spec = QuantSpec(bits, symmetric=False, block=(1, 20), minimum=True)
        for inputs in (1, 4, 19, 20, 21, 77):
            weight = torch.randint(low, high + 1, (37, inputs), generator=draw).float()
            blocks = spec.scale_shape((37, inputs))
            params = type(QTensor.quantize(weight, spec).params)(torch.ones(blocks), offset=torch.zeros(blocks))
            stored = QTensor.quantize(weight, spec, params=params, layout="tiled")
            for rows in (1, 2, 5):
                x = torch.randint(-9, 10, (rows, inputs), generator=draw).float()
                offset = torch.randint(-3, 4, blocks, generator=draw).float()
                found = product(ops, stored, x, params.scale, None, offset)
                assert torch.equal(found, x @ (weight + spread(offset, (37, inputs), 20).float()).T)


@pytest.mark.parametrize("columns", [1, 7, 8, 16, 33, 130])
@pytest.mark.parametrize("block_rows", [1, 3])
def test_tables_row_by_row(ops: Any, columns: int, block_rows: int) -> None:
    codes = torch.randint(-127, 128, (33, columns), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    scale = drawn(33 // block_rows, 1, seed=2).abs().repeat_interleave(block_rows, 0)
    for rows in (0, 1, 2, 4, 9):
        x = drawn(rows, columns, seed=rows)
        for bias in (None, drawn(33, seed=3)):
            found = ops.row_table_linear(x, codes, scale, bias)
            values = codes.double() * scale.double()
            exact, size = x.double() @ values.T, x.double().abs() @ values.abs().T
            if bias is not None:
                exact, size = exact + bias.double(), size + bias.double().abs()
            assert ((found.double() - exact).abs() <= (columns + 4) * UNIT * 1.01 * size).all()


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("spelling", ["int4:group:32:min", "int8:channel:sym"])
def test_threads_change_nothing(ops: Any, rows: int, spelling: str) -> None:
    stored = QTensor.quantize(drawn(700, 96, seed=0), QuantSpec.parse(spelling), layout="tiled")
    x, found = drawn(rows, 96, seed=1), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(product(ops, stored, x, stored.params.scale, None, stored.params.offsets()))
    if isinstance(ops, Native):
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    else:
        assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_damage_stays_visible(ops: Any) -> None:
    stored = QTensor.quantize(drawn(20, 40, seed=0), QuantSpec.parse("int4:group:16:min"), layout="tiled")
    for rows in (2, 5):
        x = drawn(rows, 40, seed=1)
        x[1, 39] = float("nan")
        y = product(ops, stored, x, stored.params.scale, None, stored.params.offsets())
        assert y[1].isnan().all() and y[0].isfinite().all()


def test_a_changed_scale_or_offset_is_noticed(ops: Any) -> None:
    stored = QTensor.quantize(drawn(20, 40, seed=0), QuantSpec.parse("int4:group:16:min"), layout="tiled")
    operand, x = ops.prepare_codes(stored.codes, stored.shape, 16), drawn(1, 40, seed=1)
    scale, offset = stored.params.scale.clone(), torch.zeros(20, 3)
    before = ops.code_linear(x, operand, scale, None, offset)
    scale *= 2
    assert torch.equal(ops.code_linear(x, operand, scale, None, offset), 2 * before)
    for other in (torch.ones(20, 3), offset.add_(1)):
        found = ops.code_linear(x, operand, scale, None, other)
        assert torch.allclose(found, 2 * before + x.sum(), rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        inner = scale.clone()
        inner.mul_(2)
        assert torch.allclose(ops.code_linear(x, operand, inner, None, None), 4 * before, rtol=1e-4, atol=1e-4)
