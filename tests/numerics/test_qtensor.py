"""QParams and QTensor: against loops over blocks in plain Python, and through every packing."""

import math
from fractions import Fraction
from typing import Any

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


class Slow:
    """Codes, parameters and values by Python loops and exact rationals, one rounding of each parameter to float32."""

    def __init__(self, x: Tensor, spec: QuantSpec, rule: str = "absmax") -> None:
        self.spec, self.rule = spec, rule
        rows, columns = x.shape
        self.codes = [[0] * columns for _ in range(rows)]
        self.values = [[0.0] * columns for _ in range(rows)]
        self.params: list[list[tuple[float, float]]] = []
        high, wide = spec.block[0] or rows, spec.block[1] or columns
        for top in range(0, rows, high):
            self.params.append([])
            for left in range(0, columns, wide):
                cells = [(i, j) for i in range(top, top + high) for j in range(left, min(left + wide, columns))]
                self._block(x.tolist(), cells)

    def _block(self, x: list[list[float]], cells: list[tuple[int, int]]) -> None:
        spec, bottom = self.spec, -(1 << (self.spec.num_bits - 1))
        low, high = min(x[i][j] for i, j in cells), max(x[i][j] for i, j in cells)
        if not spec.minimum:
            low, high = min(low, 0.0), max(high, 0.0)
        steps = (1 << spec.num_bits) - (self.rule == "absmax")
        scale = single((high - low) / steps) if high > low else TINY if spec.minimum else 1.0
        if self.rule == "zeroquant" and high > low:
            low = math.floor(Fraction(low) / Fraction(scale) + Fraction(1, 2)) * scale
        if spec.minimum:
            second = single(low - bottom * scale)
            zero, point = Fraction(second), 0
        else:
            point = math.floor(Fraction(bottom) - Fraction(low) / Fraction(scale) + Fraction(1, 2))
            point = min(point, -bottom - 1)
            zero, second = Fraction(0), float(point)
            assert point >= bottom, "a zero point is a code"
        self.params[-1].append((scale, second))
        for i, j in cells:
            code = math.floor((Fraction(x[i][j]) - zero) / Fraction(scale) + point + Fraction(1, 2))
            self.codes[i][j] = max(bottom, min(-bottom - 1, code))
            self.values[i][j] = single(float((self.codes[i][j] - point) * Fraction(scale) + zero))


def single(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).float().item()


ASYMMETRIC = ["asym", "min"]


@pytest.mark.parametrize("bits", [2, 4, 8, 11])
@pytest.mark.parametrize("block", [*BLOCKS, (1, 5), (3, 7), (None, 100)])
@pytest.mark.parametrize("sign", ASYMMETRIC)
@pytest.mark.parametrize("rule", ["absmax", "zeroquant"])
def test_asymmetric_blocks_agree_with_a_loop(
    bits: int, block: tuple[int | None, int | None], sign: str, rule: str
) -> None:
    x, spec = matrix(6, 12, seed=bits), QuantSpec(bits, symmetric=False, block=block, minimum=sign == "min")
    x[0] += 5  # values of one sign: 0 is not between them
    x[1] -= 5
    x[3:, 4:8] = 0.0
    x[4, 8:] = 0.75
    slow = Slow(x, spec, rule)
    quantized = QTensor.quantize(x, spec, params=module.SCALE_RULES[rule](x, spec))
    second = quantized.params.zero_point if sign == "asym" else quantized.params.offset
    assert second is not None
    found = torch.stack((quantized.params.scale.double(), second.double()), -1)
    assert found.tolist() == [[list(pair) for pair in row] for row in slow.params]
    assert quantized.integers().tolist() == slow.codes
    assert quantized.dequantize().tolist() == slow.values
    offsets = quantized.params.offsets()
    assert offsets is not None and torch.equal(offsets, offsets.float())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [(1, 5), (2, 7), (None, 8), (1, 100)])
def test_the_last_block_of_columns_may_be_shorter(bits: int, block: tuple[int | None, int | None]) -> None:
    x, spec = matrix(6, 12, seed=bits), QuantSpec(bits, block=block)
    whole = QTensor.quantize(x, spec, layout="tiled")
    wide, parts = block[1] or 12, []
    for left in range(0, 12, wide):
        part = x[:, left : left + wide].contiguous()
        parts.append(QTensor.quantize(part, QuantSpec(bits, block=(block[0], None))))
    assert torch.equal(whole.params.scale, torch.cat([part.params.scale for part in parts], 1))
    assert torch.equal(whole.integers(), torch.cat([part.integers() for part in parts], 1))
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts], 1))


@settings(deadline=None)
@given(st.data())
def test_asymmetric_round_trip_is_within_half_a_scale(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    numbers = st.floats(-(2.0**99), 2.0**99, width=32)
    x = torch.tensor(data.draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns)))
    x = x.view(rows, columns)
    block = (data.draw(st.sampled_from([None, 1])), data.draw(st.sampled_from([None, 2, 4])))
    spec = QuantSpec(data.draw(st.integers(2, 8)), symmetric=False, block=block, minimum=data.draw(st.booleans()))
    quantized = QTensor.quantize(x, spec)
    step = module.on_blocks(
        torch.ones(x.shape, dtype=torch.float64),
        "mul",
        quantized.params.scale.double().expand(rows, -1),
        block[1] or columns,
    )
    # What float32 cannot hold of a minimum is lost, and one rounding of each value.
    size = x.double().abs().amax() + step * 2**spec.num_bits
    assert ((quantized.dequantize().double() - x.double()).abs() <= step / 2 * (1 + 1e-6) + size * 2.0**-23).all()
    if quantized.params.zero_point is not None:
        assert not QTensor.quantize(torch.zeros_like(x), spec, params=quantized.params).dequantize().any(), "0 is exact"


def test_scales_of_q4_1_are_found_again() -> None:
    """The values of a GGUF file, code · scale + minimum in float16 for 32 inputs, come back as they were."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 4, 32), generator=draw)
    codes[..., 0], codes[..., 1] = 0, 15
    scale, minimum = (torch.randn(8, 4, 1, generator=draw).half().float() for _ in range(2))
    values = (codes * scale.abs() + minimum).flatten(1)
    quantized = QTensor.quantize(values, QuantSpec.parse("int4:group:32:min"))
    assert torch.equal(quantized.integers(), (codes - 8).flatten(1).to(torch.int8))
    assert torch.allclose(quantized.dequantize(), values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_scale_rule_of_the_published_code(bits: int) -> None:
    """Symmetric: max|x| / 2^(b-1), which clips the largest value by a step; the smallest code is not ours."""
    x = matrix(5, 9, seed=bits)
    x[2] = 0
    spec = QuantSpec(bits, block=(1, None))
    found = QTensor.quantize(x, spec, params=QParams.zeroquant(x, spec))
    for row, scale, codes in zip(x.tolist(), found.params.scale[:, 0].tolist(), found.integers().tolist(), strict=True):
        peak = max(abs(value) for value in row)
        assert scale == (single(2 * peak / 2**bits) if peak else 1.0)
        rounded = [math.floor(Fraction(value) / Fraction(scale) + Fraction(1, 2)) for value in row]
        assert codes == [max(-spec.qmax, min(spec.qmax, code)) for code in rounded]
    assert (found.integers().abs().amax(1) == torch.where(x.any(1), spec.qmax, 0)).all()


@pytest.mark.parametrize("sign", ["sym", *ASYMMETRIC])
@pytest.mark.parametrize("rule", [QParams.absmax, QParams.zeroquant])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_rule_takes_what_is_not_finite(sign: str, rule: Any, bad: float) -> None:
    x = matrix(4, 6)
    x[1, 5] = bad
    with pytest.raises(InputError, match="4x6 matrix: it holds NaN or infinite values"):
        rule(x, QuantSpec.parse(f"int4:group:4:{sign}"))


def test_parameters_of_another_kind_are_refused() -> None:
    x, ones = torch.ones(2, 2), torch.ones(2, 1)
    point = ones.to(torch.int8)
    for spelling, params, says in [
        ("int8:channel:sym", QParams(ones, offset=ones), "no offsets"),
        ("int8:channel:asym", QParams(ones), "has zero points of shape"),
        ("int8:channel:asym", QParams(ones, point[:1]), "has zero points of shape"),
        ("int8:channel:asym", QParams(ones, offset=ones), "has zero points of shape"),
        ("int8:channel:min", QParams(ones, point), "no zero points"),
    ]:
        with pytest.raises(InputError, match=says):
            QTensor.quantize(x, QuantSpec.parse(spelling), params=params)


def test_misfits_are_refused() -> None:
    x, spec = torch.ones(2, 4), QuantSpec(8, block=(1, None))
    with pytest.raises(InputError, match=r"scales of shape \(2, 1\) on a 2x4 matrix, found \(1, 1\)"):
        QTensor.quantize(x, spec, params=QParams(torch.ones(1, 1)))
    with pytest.raises(InputError, match="at most 8 bits"):
        QTensor.quantize(x, QuantSpec(16), layout="tiled")
    with pytest.raises(InputError, match="unknown layout 'tile'; did you mean tiled"):
        stored_shape(spec, (2, 4), "tile")  # type: ignore[arg-type]  # what a damaged manifest may hold
    with pytest.raises(InputError, match="groups of 3 rows do not divide 2 rows"):
        QTensor.quantize(x, QuantSpec(4, block=(3, None)))
    with pytest.raises(InputError, match="empty 0x4 matrix"):
        QTensor.quantize(x[:0], spec)
    with pytest.raises(InputError, match=r"codes of int8:channel:sym .* found \(\(2, 4\), torch.int8\)"):
        QTensor(x.to(torch.int8), QParams(torch.ones(2, 1)), spec, (2, 4))
