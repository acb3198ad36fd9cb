"""QParams and QTensor: against loops over blocks in plain Python, and through every packing."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.errors import InputError
from qtool.numerics import QParams, QTensor, QuantSpec
from qtool.numerics import qtensor as module
from qtool.numerics.qtensor import (
    Layout,
    pack_nibbles,
    stored_dtype,
    stored_shape,
    tile,
    unpack_nibbles,
    untile,
)

TINY = torch.finfo(torch.float32).tiny
BLOCKS = [(None, None), (1, None), (1, 4), (3, None), (3, 4), (None, 6), (2, 12), (6, 12)]
SHAPES = [(1, 1), (1, 7), (15, 3), (16, 4), (17, 5), (33, 66)]


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def slow_quantize(x: Tensor, spec: QuantSpec) -> tuple[list[list[int]], list[list[float]]]:
    """Codes and scales by Python loops, exact rationals and one rounding of the scale to float32."""
    (rows, columns), values = x.shape, x.tolist()
    high, wide = spec.block[0] or rows, spec.block[1] or columns
    codes = [[0] * columns for _ in range(rows)]
    scales: list[list[float]] = []
    for top in range(0, rows, high):
        scales.append([])
        for left in range(0, columns, wide):
            cells = [(i, j) for i in range(top, top + high) for j in range(left, left + wide)]
            peak = max(abs(values[i][j]) for i, j in cells)
            scale = torch.tensor(peak / spec.qmax, dtype=torch.float64).float().item() if peak else 1.0
            scales[-1].append(scale)
            for i, j in cells:
                code = math.floor(Fraction(values[i][j]) / Fraction(scale) + Fraction(1, 2))
                codes[i][j] = max(-spec.qmax, min(spec.qmax, code))
    return codes, scales


@pytest.mark.parametrize("bits", [2, 4, 8, 11, 16, 20])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_shape_agrees_with_a_loop(bits: int, block: tuple[int | None, int | None]) -> None:
    x, spec = matrix(6, 12, seed=bits), QuantSpec(bits, block=block)
    x[3:, 4:8] = 0.0
    codes, scales = slow_quantize(x, spec)
    quantized = QTensor.quantize(x, spec)
    assert quantized.params.scale.tolist() == scales
    assert quantized.integers().tolist() == codes


@settings(deadline=None)
@given(st.data())
def test_round_trip_is_within_half_a_scale(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
    x = torch.tensor(data.draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns)))
    x = x.view(rows, columns)
    bits, row = data.draw(st.integers(2, 16)), data.draw(st.sampled_from([None, 1]))
    quantized = QTensor.quantize(x, QuantSpec(bits, block=(row, None)))
    scale = quantized.params.scale.double()
    exact = quantized.integers().double() * scale
    assert ((exact - x.double()).abs() <= scale / 2 * (1 + 1e-9)).all()
    assert torch.equal(quantized.dequantize(), exact.float())


@settings(deadline=None)
@given(st.integers(2, 32), st.floats(-1e6, 1e6))
def test_codes_saturate_at_qmax(bits: int, value: float) -> None:
    spec = QuantSpec(bits)
    params = QParams(torch.full((1, 1), 0.5))
    code = QTensor.quantize(torch.tensor([[value]], dtype=torch.float64), spec, params=params).integers().item()
    assert code == max(-spec.qmax, min(spec.qmax, math.floor(Fraction(value) * 2 + Fraction(1, 2))))


def test_ties_round_up() -> None:
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]])
    codes = QTensor.quantize(x, QuantSpec(8), params=QParams(torch.ones(1, 1))).integers()
    assert codes.tolist() == [[-2, -1, 0, 1, 2, 3]]


def test_the_extremes_reach_both_ends() -> None:
    quantized = QTensor.quantize(torch.tensor([[-3.0, 3.0, 1e-20]]), QuantSpec(8))
    assert quantized.integers().tolist() == [[-127, 127, 0]]


@pytest.mark.parametrize(("peak", "scale"), [(0.0, 1.0), (-0.0, 1.0), (1e-45, TINY), (TINY, TINY), (3.0e38, None)])
def test_scales_are_never_zero_subnormal_or_infinite(peak: float, scale: float | None) -> None:
    found = QParams.absmax(torch.tensor([[0.0, -peak]]), QuantSpec(8)).scale
    assert found.dtype == torch.float32
    assert found.item() == (torch.tensor(peak / 127).item() if scale is None else scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_and_strides(dtype: torch.dtype) -> None:
    x = torch.nn.Parameter(matrix(8, 6).to(dtype)).t()
    spec = QuantSpec(8, block=(2, 4))
    plain = QTensor.quantize(x.detach().double().contiguous(), spec)
    quantized = QTensor.quantize(x, spec)
    assert torch.equal(quantized.codes, plain.codes)
    assert not quantized.params.scale.requires_grad


def test_large_matrices_are_quantized_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, spec = matrix(10, 6), QuantSpec(8, block=(5, 3))
    whole = QTensor.quantize(x, spec)
    monkeypatch.setattr(module, "_CHUNK", 18)
    assert torch.equal(QTensor.quantize(x, spec).codes, whole.codes)


@pytest.mark.parametrize(
    ("bits", "layout"),
    [*((bits, "rows") for bits in (2, 4, 5, 8, 16, 32)), *((bits, "tiled") for bits in (2, 4, 5, 8))],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_hold_the_same_codes(bits: int, layout: Layout, shape: tuple[int, int]) -> None:
    x, spec = matrix(*shape), QuantSpec(bits, block=(1, None))
    quantized = QTensor.quantize(x, spec, layout=layout)
    assert quantized.codes.shape == stored_shape(spec, shape, layout)
    assert quantized.codes.dtype == stored_dtype(spec)
    assert quantized.codes.is_contiguous()
    codes, scales = slow_quantize(x, spec)
    assert quantized.integers().tolist() == codes
    exact = torch.tensor(codes, dtype=torch.float64) * torch.tensor(scales, dtype=torch.float64)
    assert torch.equal(quantized.dequantize(), exact.float())


@pytest.mark.parametrize(
    ("bits", "layout", "shape", "dtype"),
    [
        (4, "rows", (17, 1, 4), torch.uint8),
        (4, "tiled", (2, 2, 16, 2), torch.uint8),
        (8, "rows", (17, 1, 7), torch.int8),
        (8, "tiled", (2, 2, 16, 4), torch.int8),
        (16, "rows", (17, 1, 7), torch.int16),
        (32, "rows", (17, 1, 7), torch.int32),
    ],
)
def test_stored_shape(bits: int, layout: Layout, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert stored_shape(QuantSpec(bits), (17, 7), layout) == shape
    assert stored_dtype(QuantSpec(bits)) == dtype


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_tiles_hold_16_rows_of_4_columns(rows: int, columns: int) -> None:
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    stored = tile(codes)
    for block, step, row, column in torch.cartesian_prod(*(torch.arange(size) for size in stored.shape)).tolist():
        i, j = 16 * block + row, 4 * step + column
        expected = codes[i, j] if i < rows and j < columns else 0
        assert stored[block, step, row, column] == expected
    assert torch.equal(untile(stored, (rows, columns)), codes)


@settings(deadline=None)
@given(st.lists(st.integers(-8, 7), min_size=1, max_size=9))
def test_nibbles_are_twos_complement_low_first(codes: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.int8))
    even = [*codes, 0]
    assert packed.tolist() == [even[i] % 16 + 16 * (even[i + 1] % 16) for i in range(0, len(codes), 2)]
    unpacked = unpack_nibbles(packed, len(codes))
    assert unpacked.dtype == torch.int8
    assert unpacked.tolist() == codes


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.tensor([[1.0, bad]])
    with pytest.raises(InputError, match="NaN or infinite"):
        QTensor.quantize(x, QuantSpec(8))
    with pytest.raises(InputError, match="NaN, infinite or zero"):
        QTensor.quantize(x, QuantSpec(8), params=QParams(torch.ones(1, 1)))
    with pytest.raises(InputError, match="NaN or infinite"):
        QParams.absmax(torch.tensor([[1e300]], dtype=torch.float64), QuantSpec(8))


@pytest.mark.parametrize("layout", ["rows", "tiled"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [(None, None), (1, None), (1, 6), (6, None), (9, 12), (None, 4)])
@pytest.mark.parametrize("step", [1, 7, 16, 40, 500])
def test_stretches_are_the_matrix_cut_between_tiles_and_blocks(
    step: int, block: tuple[int | None, int | None], bits: int, layout: Layout
) -> None:
    spec = QuantSpec(bits, block=block)
    whole = QTensor.quantize(matrix(90, 12), spec, layout=layout)
    parts = list(whole.stretches(step))
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), whole.dequantize())
    assert torch.equal(torch.cat([part.integers() for part in parts]), whole.integers())
    assert all(part.codes.data_ptr() - whole.codes.data_ptr() < whole.codes.nbytes for part in parts), "no copies"
    least = math.lcm(block[0] or 1, 16 if layout == "tiled" else 1)
    assert max(part.shape[0] for part in parts) <= max(step, least)


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="NaN, infinite or zero"):
        QTensor.quantize(torch.ones(1, 1), QuantSpec(8), params=QParams(torch.zeros(1, 1)))


def test_asymmetric_specs_are_refused_by_name() -> None:
    spec = QuantSpec.parse("int8:channel:asym")
    for attempt in (QTensor.quantize, QParams.absmax):
        with pytest.raises(InputError, match=r"asymmetric weights \(int8:channel:asym\) are not supported yet"):
            attempt(torch.ones(2, 2), spec)
    codes, params = torch.zeros(2, 1, 2, dtype=torch.int8), QParams(torch.ones(2, 1), minimum=torch.zeros(2, 1))
    with pytest.raises(InputError, match="asymmetric"):
        QTensor(codes, params, spec, (2, 2)).dequantize()


def test_misfits_are_refused() -> None:
    x, spec = torch.ones(2, 4), QuantSpec(8, block=(1, None))
    with pytest.raises(InputError, match=r"scales of shape \(2, 1\) on a 2x4 matrix, found \(1, 1\)"):
        QTensor.quantize(x, spec, params=QParams(torch.ones(1, 1)))
    with pytest.raises(InputError, match="at most 8 bits"):
        QTensor.quantize(x, QuantSpec(16), layout="tiled")
    with pytest.raises(InputError, match="unknown layout 'tile'; did you mean tiled"):
        stored_shape(spec, (2, 4), "tile")  # type: ignore[arg-type]  # what a damaged manifest may hold
    with pytest.raises(InputError, match="groups of 3 columns do not divide 4 columns"):
        QTensor.quantize(x, QuantSpec(4, block=(1, 3)))
    with pytest.raises(InputError, match="empty 0x4 matrix"):
        QTensor.quantize(x[:0], spec)
    with pytest.raises(InputError, match=r"codes of int8:channel:sym .* found \(\(2, 4\), torch.int8\)"):
        QTensor(x.to(torch.int8), QParams(torch.ones(2, 1)), spec, (2, 4))
