"""Native kernels at the ends of what they are promised: shapes, shifts, ties, damage, and threads for little work."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from qtool.kernels import integer, native, reference
from qtool.kernels.integer import Native
from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.qtensor import tile

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "")
END = 1 << 31
OFFSETS = {"portable": 0, "avx2": 0, "avx512vnni": 127}
SIZES = [*range(1, 71), 255, 768]


@pytest.fixture(params=native.ISAS, scope="module", autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set; threads share even what one would do alone."""
    if request.param not in native.isas():
        pytest.skip(f"this CPU has no {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "isa", lambda: request.param)
        patch.setattr(integer, "_ALONE", -1)
        assert native.code_offset() == OFFSETS[request.param]
        yield request.param


def drawn(seed: int, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int64).to(dtype)


def ratios(seed: int, low: int, high: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Multipliers of every kind that a dyadic number has, with shifts from `low` to `high`."""
    multiplier = drawn(seed, 1 << 30, END - 1, *shape) * (2 * drawn(seed + 1, 0, 1, *shape) - 1)
    kinds = drawn(seed + 2, 0, 9, *shape)
    for kind, value in enumerate((0, 1 << 30, -(1 << 30), END - 1, 1 - END)):
        multiplier = multiplier.masked_fill(kinds == kind, value)
    return multiplier.int(), drawn(seed + 3, low, high, *shape)


# Rows


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_quantize_rows_of_every_width_up_to_31_bits(unsigned: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    for width in SIZES:
        x = drawn(width, 0 if unsigned else 1 - END, END - 1, 11, width)
        x[1], x[2], x[3, -1], x[4] = 0, END - 1, END - 1, 1
        x[5:] >>= drawn(width, 0, 30, 6, 1)
        if not unsigned:
            x[6], x[7, 0] = 1 - END, 1 - END
        found, wanted = (ops.quantize_rows(x, unsigned=unsigned) for ops in (Native, reference.Reference))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True)), width


def test_rows_that_are_not_contiguous() -> None:
    x = drawn(0, -1000, 1000, 20, 13).t()
    for a, b in zip(Native.quantize_rows(x), reference.quantize_rows(x), strict=True):
        assert torch.equal(a, b)
    ratio, bias = ratios(1, 28, 40, 20), drawn(2, -99, 99, 20)
    given = x, torch.tensor([3]), ratio, bias, 22
    assert torch.equal(Native.integer_norm(*given), reference.integer_norm(*given))


# Products


def linear_matches(
    codes: torch.Tensor, amax: torch.Tensor | None, weight: torch.Tensor, unsigned: bool, *rest: Any
) -> bool:
    exact, mine = reference.operand(weight, "integer"), Native().prepare(tile(weight), tuple(weight.shape))
    sums = weight.sum(1, dtype=torch.int32) if unsigned else None
    assert torch.equal(Native().row_sums(mine), weight.sum(1, dtype=torch.int32))
    wanted = reference.integer_linear(codes, amax, exact, sums, *rest)
    return torch.equal(Native.integer_linear(codes, amax, mine, sums, *rest), wanted)


@pytest.mark.parametrize("kind", ["signed", "unsigned", "static"])
def test_every_shift_and_multiplier(kind: str) -> None:
    shift = torch.arange(1, 63, dtype=torch.int32).repeat_interleave(7)
    kinds = torch.tensor([0, 1 << 30, -(1 << 30), END - 1, 1 - END, (1 << 30) + 1, 1610612737], dtype=torch.int32)
    to_output = kinds.repeat(62), shift
    outputs = len(shift)
    weight, codes = drawn(0, -127, 127, outputs, 12, dtype=torch.int8), drawn(1, -127, 127, 9, 12, dtype=torch.int8)
    weight[:, 3:] = weight[:, 3:].sign()
    codes[0], codes[1], codes[2, 1:] = 0, 127, 0
    amax = None if kind == "static" else drawn(2, 1, (1 << 21) - 1, 9, 1, dtype=torch.int64)
    align = torch.tensor([0 if kind == "static" else 9])
    for reach in (0, 3, 1 << 29):
        bias = drawn(3, -reach, reach, outputs)
        for bits in (2, 8, 16, 24, 31):
            assert linear_matches(codes, amax, weight, kind == "unsigned", align, bias, to_output, bits)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", ["signed", "unsigned", "static"])
@pytest.mark.parametrize("inputs", [1, 2, 5, 70, 768, 3072])
def test_sums_at_their_ends(inputs: int, kind: str, sign: int) -> None:
    """All codes at ±127: the largest sums there are, and pairs of products that 16 bits do not hold."""
    for outputs, rows in ((1, 1), (16, 8), (50, 33), (256, 7)):
        weight = torch.full((outputs, inputs), 127 * sign, dtype=torch.int8)
        codes = torch.full((rows, inputs), 127, dtype=torch.int8)
        codes[1::2] = -127
        amax = None if kind == "static" else torch.full((rows, 1), (1 << 21) - 1)
        align = torch.tensor([0 if amax is None else max(0, (inputs * 127 * 254 << 21).bit_length() - 30)])
        bias = drawn(0, -(1 << 29), 1 << 29, outputs)
        assert linear_matches(codes, amax, weight, kind == "unsigned", align, bias, ratios(1, 31, 50, outputs), 22)


@hypothesis.settings(max_examples=60, suppress_health_check=list(hypothesis.HealthCheck))
@hypothesis.given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    rows=st.integers(0, 40),
    kind=st.sampled_from(["signed", "unsigned", "static"]),
    threads=st.sampled_from([1, 2, 3, 5]),
    bits=st.integers(2, 31),
    seed=st.integers(0, 1 << 20),
)
def test_products_of_any_shape(
    inputs: int, outputs: int, rows: int, kind: str, threads: int, bits: int, seed: int
) -> None:
    torch.set_num_threads(threads)
    weight, codes = (drawn(seed + i, -127, 127, n, inputs, dtype=torch.int8) for i, n in enumerate((outputs, rows)))
    amax = None if kind == "static" else drawn(seed, 1, (1 << 20) - 1, rows, 1, dtype=torch.int64)
    align = torch.tensor([0 if amax is None else max(0, (inputs * 127 * 254 << 20).bit_length() - 30)])
    bias = drawn(seed, -(1 << 20), 1 << 20, outputs)
    assert linear_matches(codes, amax, weight, kind == "unsigned", align, bias, ratios(seed, 1, 62, outputs), bits)


# LayerNorm


@pytest.mark.parametrize("threads", [1, 3])
def test_norm_of_every_size(threads: int) -> None:
    torch.set_num_threads(threads)
    top = (1 << 23) - 1
    for size in [*SIZES, 1024]:
        x = drawn(size, -top, top, 13, size)
        x[0], x[1], x[2], x[3] = 0, top, -top, top * (1 - 2 * (torch.arange(size) % 2))
        x[4:6] = drawn(size, 0, 1, 2, size)  # variances below one: reciprocals of more than 47 bits
        x[6], x[6, -1], x[7], x[7, 0] = 0, 1, top, -top
        x[8:] >>= drawn(size, 0, 23, 5, 1)
        ratio, bias = ratios(size, 29, 60, size), drawn(size, -(1 << 21), 1 << 21, size)
        for eps in (0, 1, 1 << 20, 1 << 40):
            for bits in (8, 22, 30):
                given = x, torch.tensor([eps]), ratio, bias, bits
                assert torch.equal(Native.integer_norm(*given), reference.integer_norm(*given)), (size, eps, bits)


# Attention


@pytest.mark.parametrize("size", [4, 7, 8, 20, 32, 64])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 3), (2, 1), (9, 2), (65, 1)])
def test_attention_of_extremes(tokens: int, heads: int, size: int) -> None:
    """Ties between all keys, scores that saturate both ways, values that all pull one way, holes of every kind."""
    query = drawn(size, -32767, 32767, 6, tokens, heads, size)
    key, value = (drawn(size + i, -127, 127, 6, tokens, heads, size) for i in (1, 2))
    query[0], key[1], value[1] = 0, 127, 127
    query[2], key[2], value[2] = 32767, 127 * (1 - 2 * (torch.arange(tokens) % 2))[:, None, None], -127
    real = torch.ones(6, tokens, dtype=torch.bool)
    real[3], real[4, ::2], real[5, : tokens // 2] = False, False, False
    align = torch.tensor([max(0, (size * 127 * 127 * 32767).bit_length() - 30)])
    for grid in (6, 10, 12):
        for bits in (8, 14, 15, 16):
            scores = ratios(grid, 31, 55, heads, 1, 1)
            given = query, key, value, real, align, scores, ratios(bits, 31, 45, heads, 1, size)
            widths: dict[str, Any] = {"grid": grid, "bits": bits, "context_bits": 16}
            wanted = reference.integer_attention(*given, **widths)
            assert torch.equal(Native.integer_attention(*given, **widths), wanted), (grid, bits)
            assert not wanted[3].any()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_attention_of_a_long_text(threads: int) -> None:
    torch.set_num_threads(threads)
    query = drawn(0, -32767, 32767, 2, 300, 1, 20)
    key, value = (drawn(i, -127, 127, 2, 300, 1, 20) for i in (1, 2))
    real = drawn(3, 0, 4, 2, 300) > 0
    given = query, key, value, real, torch.tensor([8]), ratios(4, 45, 52, 1, 1, 1), ratios(5, 31, 40, 1, 1, 20)
    widths: dict[str, Any] = {"grid": 10, "bits": 14, "context_bits": 16}
    assert torch.equal(Native.integer_attention(*given, **widths), reference.integer_attention(*given, **widths))


# Float activations


def same_product(x: torch.Tensor, stored: QTensor, bias: torch.Tensor | None, act: torch.Tensor | None) -> bool:
    shape, width = stored.shape, stored.spec.block[1]
    results = [
        ops.int8_linear(x, ops.prepare(stored.codes, shape, width), stored.params.scale, bias, act)
        for ops in (Native(), reference.Reference())
    ]
    return torch.equal(*results)


def stored_weight(outputs: int, inputs: int, weights: str = "int8:channel:sym") -> QTensor:
    generator = torch.Generator().manual_seed(outputs * inputs)
    return QTensor.quantize(torch.randn(outputs, inputs, generator=generator), QuantSpec.parse(weights), layout="tiled")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("threads", [1, 3])
def test_float_products_of_every_width(static: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    for inputs in SIZES:
        outputs = 1 + inputs * 7 % 50
        x = torch.randn(9, inputs, generator=torch.Generator().manual_seed(inputs))
        act = torch.tensor([0.01]) if static else None
        assert same_product(x, stored_weight(outputs, inputs), torch.linspace(-1, 1, outputs), act), inputs


@pytest.mark.parametrize("inputs", [5, 24, 67])
def test_ties_subnormals_and_the_largest_floats(inputs: int) -> None:
    stored = stored_weight(33, inputs)
    ties = (torch.arange(inputs) % 254 - 127 + 0.5).clamp(-126.5, 126.5)
    ties[0] = 127  # the scale is 1 exactly
    tiny, huge = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    rows = [ties, -ties, torch.nextafter(ties, ties - 1), torch.zeros(inputs), -torch.zeros(inputs)]
    rows += [ties * scale for scale in (2.0**-149, 2.0**-140, tiny / 3, tiny, 2.0**-120, 1e-30, 1e30)]
    rows += [ties / 127 * huge, torch.full((inputs,), huge), torch.full((inputs,), -huge)]
    x = torch.stack(rows)
    assert x.isfinite().all()
    assert same_product(x, stored, None, None)
    for act in (1.0, 0.25, tiny, 1e30):
        codes_fit = (x / act).abs().amax(1) < END
        assert codes_fit.any() and same_product(x[codes_fit], stored, None, torch.tensor([act])), act


@pytest.mark.parametrize("value", [2.0**31, 1e20])
def test_static_codes_saturate_however_large_the_quotient(value: float) -> None:
    assert same_product(torch.full((1, 24), value), stored_weight(33, 24), None, torch.tensor([1.0]))


def test_a_subnormal_static_scale() -> None:
    assert same_product(torch.full((1, 24), 1e-41), stored_weight(33, 24), None, torch.tensor([1e-42]))


def test_row_sums_of_a_weight_with_column_blocks() -> None:
    """The sum of each row, says `Backend.row_sums`, however many scales a row has."""
    stored = stored_weight(20, 60, "int8:group:12:sym")
    found, wanted = (ops.row_sums(ops.prepare(stored.codes, (20, 60), 12)) for ops in (Native(), reference.Reference()))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("inputs", [1, 3, 16, 24, 70])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_damage_anywhere_in_a_row_stays_visible(value: float, inputs: int, static: bool) -> None:
    """A maximum that loses a NaN as soon as a number follows would hide it."""
    stored, act = stored_weight(20, inputs), torch.tensor([0.02]) if static else None
    x = torch.randn(inputs, inputs) + 1
    x.fill_diagonal_(value)
    clean = torch.randn(1, inputs)
    operand = Native().prepare(stored.codes, stored.shape)
    y = Native().int8_linear(torch.cat((x, clean)), operand, stored.params.scale, torch.ones(20), act)
    assert not y[:-1].isfinite().any()
    assert y[-1].isfinite().all()


@pytest.mark.parametrize("weights", ["int8", "int4", "int3", "int2"])
@pytest.mark.parametrize(
    "grain", ["channel", "tensor", "rows:4", "rows:10", "group:4", "group:12", "group:10", "block:4x20"]
)
def test_grains_of_scales(weights: str, grain: str) -> None:
    stored = stored_weight(20, 60, f"{weights}:{grain}:sym")
    x = torch.randn(33, 60, generator=torch.Generator().manual_seed(0))
    for rows in (x, x[:1], x[:0], x.t().contiguous().t()):
        for act in (None, torch.tensor([0.03])):
            assert same_product(rows, stored, None, act)
            assert same_product(rows, stored, torch.linspace(-9, 9, 20), act)


@pytest.mark.parametrize("inputs", [1, 4, 9, 30, 70, 768])
@pytest.mark.parametrize("weights", ["int8", "int4", "int3", "int2"])
def test_row_sums(weights: str, inputs: int) -> None:
    for outputs in (1, 16, 50):
        stored = stored_weight(outputs, inputs, f"{weights}:channel:sym")
        found, wanted = (
            ops.row_sums(ops.prepare(stored.codes, stored.shape)) for ops in (Native(), reference.Reference())
        )
        assert torch.equal(found, wanted) and found.dtype == torch.int32
