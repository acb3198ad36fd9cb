"""Native kernels give the reference's integers, bit for bit, on every instruction set that this CPU has."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from draws import Draw

from qtool.kernels import native, reference
from qtool.kernels.codebook import WholeCodebook
from qtool.kernels.integer import Native
from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.qtensor import tile

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "")
WIDTHS = [1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 70, 768]
INT32 = (1 << 31) - 1


@pytest.fixture(params=native.ISAS, autouse=True)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param not in native.isas():
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(native, "isa", lambda: request.param)
    assert native.code_offset() == (127 if request.param == "avx512vnni" else 0)
    yield request.param


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("unsigned", [False, True])
def test_quantize_rows(width: int, unsigned: bool) -> None:
    draw = Draw(width)
    for bits in (1, 5, 8, 16, 22, 30):
        limit = (1 << bits) - 1
        x = draw.integers(0 if unsigned else -limit, limit, 9, width)
        x[1], x[2, 0], x[3] = 0, limit, 1
        for rows in (x, x[:0], x[None, :, :]):
            found, wanted = (ops.quantize_rows(rows, unsigned=unsigned) for ops in (Native, reference.Reference))
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("inputs", [*WIDTHS[:-1], 300])
@pytest.mark.parametrize("kind", ["signed", "unsigned", "static"])
def test_integer_linear(inputs: int, kind: str) -> None:
    draw = Draw(inputs)
    for outputs, rows in ((1, 1), (16, 8), (17, 9), (50, 7), (130, 33), (5, 0)):
        weight, codes = draw.codes(outputs, inputs), draw.codes(rows, inputs)
        amax = None if kind == "static" else draw.integers(1, (1 << 21) - 1, rows, 1, dtype=torch.int64)
        reach = int(weight.long().abs().sum(1).max()) * 254 * (1 if amax is None else (1 << 21) - 1)
        align = 0 if amax is None else max(0, reach.bit_length() - 30)
        bias = draw.integers(-(1 << 29), 1 << 29, outputs)
        ratio = draw.ratios(-32, 29, outputs)
        rest = torch.tensor([align]), bias, ratio
        for bits in (8, 12, 22, 31):
            exact, mine = reference.operand(weight), Native().prepare(tile(weight), (outputs, inputs))
            sums = reference.Reference().row_sums(exact)
            assert torch.equal(Native().row_sums(mine), sums)
            given = sums if kind == "unsigned" else None
            wanted = reference.integer_linear(codes, amax, exact, given, *rest, bits)
            assert torch.equal(Native.integer_linear(codes, amax, mine, given, *rest, bits), wanted)
            stored_by_rows = Native().prepare(weight[:, None, :], (outputs, inputs))
            assert torch.equal(Native.integer_linear(codes, amax, stored_by_rows, given, *rest, bits), wanted)


@pytest.mark.parametrize("size", [*WIDTHS, 1024])
def test_integer_norm(size: int) -> None:
    draw = Draw(size)
    ratio, bias = draw.ratios(-25, 2, size), draw.integers(-(1 << 21), 1 << 21, size)
    for bits in (1, 2, 5, 12, 22, 24):
        x = draw.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1, 9, size)
        x[1], x[2] = 5, 0
        x[3, 0] = (1 << 23) - 1
        for eps in (0, 7, 1 << 30):
            for out in (8, 22, 30):
                given = x, torch.tensor([eps]), ratio, bias, out
                assert torch.equal(Native.integer_norm(*given), reference.integer_norm(*given))


@pytest.mark.parametrize(
    ("tokens", "heads", "size"), [(1, 1, 4), (5, 3, 8), (17, 2, 20), (33, 2, 32), (40, 1, 64), (300, 1, 7)]
)
def test_integer_attention(tokens: int, heads: int, size: int) -> None:
    draw = Draw(tokens)
    query = draw.integers(-32767, 32767, 3, tokens, heads, size)
    query[0, 0] = 0
    key, value = (draw.integers(-127, 127, 3, tokens, heads, size) for _ in range(2))
    real = draw.integers(0, 3, 3, tokens) > 0
    real[1] = False
    align = torch.tensor([max(0, (size * 127 * 127 * 32767).bit_length() - 30)])
    for grid, bits in ((6, 14), (10, 14), (12, 16), (8, 8), (10, 15)):
        given = query, key, value, real, align, draw.ratios(-22, -14, heads, 1, 1), draw.ratios(-9, 2, heads, 1, size)
        widths: dict[str, Any] = {"grid": grid, "bits": bits, "context_bits": 16}
        wanted = reference.integer_attention(*given, **widths)
        assert torch.equal(Native.integer_attention(*given, **widths), wanted)
        assert not wanted[1].any()


@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 4), (5, 3, 8), (33, 2, 32), (70, 1, 20)])
@pytest.mark.parametrize("bits", [None, 2, 3, 8])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_integer_attention_in_codes(
    tokens: int, heads: int, size: int, bits: int | None, relative: bool, renormalize: bool
) -> None:
    draw = Draw(tokens)
    query = draw.integers(-32767, 32767, 3, tokens, heads, size)
    query[0, 0] = 0
    key, value = (draw.integers(-127, 127, 3, tokens, heads, size) for _ in range(2))
    real = draw.integers(0, 3, 3, tokens) > 0
    real[1] = False
    align = torch.tensor([max(0, (size * 127 * 127 * 32767).bit_length() - 30)])
    count = 1 if bits is None else (1 << bits) - 1
    edges = (1 << draw.integers(0, 20, heads, count)) + draw.integers(0, 1 << 14, heads, count)
    levels = draw.integers(1, 127, heads, count + 1)
    levels[0, -1] = 16383  # one head of two digits
    levels[:, 0] = 0
    book = WholeCodebook(edges.sort(-1).values, None if bits is None else levels, relative, renormalize)
    seen = 0
    for grid in (6, 10, 12):
        for out in (-22, -9, 2):
            given = (
                query,
                key,
                value,
                real,
                align,
                draw.ratios(-22, -14, heads, 1, 1),
                draw.ratios(out, out, heads, 1, size),
            )
            widths: dict[str, Any] = {"grid": grid, "bits": 14, "context_bits": 16, "book": book}
            wanted = reference.integer_attention(*given, **widths)
            assert torch.equal(Native.integer_attention(*given, **widths), wanted)
            assert not wanted[1].any()
            seen += int(wanted.count_nonzero())
    assert seen > 0


WEIGHTS = ["int8:channel:sym", "int8:tensor:sym", "int6:rows:4:sym", "int8:group:8:sym", "int8:block:4x12:sym"]
WEIGHTS += ["int8:group:6:sym", "int4:channel:sym", "int4:group:8:sym", "int3:group:24:sym", "int2:channel:sym"]
WEIGHTS += ["int4:group:264:sym", "int8:group:20:sym", "int4:group:20:sym", "int8:group:7:sym"]
WEIGHTS += ["int8:channel:asym", "int8:group:8:asym", "int4:channel:asym", "int4:group:20:asym", "int2:rows:4:asym"]
WEIGHTS += ["int8:channel:min", "int4:group:8:min", "int8:block:4x20:min", "int4:group:7:min", "int4:group:264:min"]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("static", [False, True])
def test_float_linear_has_the_bits_of_the_reference(weights: str, static: bool) -> None:
    inputs = 528 if "264" in weights else 24
    draw = torch.Generator().manual_seed(0)
    spec = QuantSpec.parse(weights)
    for outputs, rows in ((20, 1), (48, 9), (100, 33), (4, 0)):
        stored = QTensor.quantize(torch.randn(outputs, inputs, generator=draw), spec, layout="tiled")
        x = torch.randn(rows, inputs, generator=draw) * torch.logspace(-4, 4, rows)[:, None]
        x[1:2] = 0
        act = torch.tensor([0.02]) if static else None
        bias = torch.randn(outputs, generator=draw)
        offsets = stored.params.offsets()
        results = []
        for ops in (Native(), reference.Reference()):
            operand = ops.prepare(stored.codes, (outputs, inputs), spec.block[1])
            rest = act, offsets
            results += [ops.int8_linear(x, operand, stored.params.scale, given, *rest) for given in (bias, None)]
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("inputs", [4, 17, 300])
def test_the_smallest_code_of_asymmetric_weights(inputs: int) -> None:
    """-128 has no opposite in a byte: a product that turns its sign would lose it."""
    codes = torch.full((33, inputs), -128, dtype=torch.int8)
    codes[1::3] = torch.tensor([-128, 127], dtype=torch.int8).repeat(inputs)[:inputs]
    x = torch.stack([torch.full((inputs,), value) for value in (-1.0, 1.0, 0.5, 0.0)])
    scale, offset = torch.full((33, 1), 0.01), torch.full((33, 1), 0.3)
    mine, exact = (ops.prepare(tile(codes), (33, inputs)) for ops in (Native(), reference.Reference()))
    found = Native().int8_linear(x, mine, scale, None, None, offset)
    assert torch.equal(found, reference.Reference().int8_linear(x, exact, scale, None, None, offset))
    wanted = x.double() @ (codes.double() * scale.double() + offset.double()).T
    assert (found.double() - wanted).abs().max() < 0.01 * inputs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("static", [False, True])
def test_damage_stays_visible(value: float, static: bool) -> None:
    stored = QTensor.quantize(torch.randn(20, 40), QuantSpec.parse("int8:channel:sym"), layout="tiled")
    x = torch.randn(3, 40)
    x[1, 39] = value
    operand = Native().prepare(stored.codes, (20, 40))
    y = Native().int8_linear(x, operand, stored.params.scale, None, torch.tensor([0.02]) if static else None)
    assert not y[1].isfinite().any()
    assert y[0].isfinite().all() and y[2].isfinite().all()


def test_a_changed_scale_is_noticed() -> None:
    stored = QTensor.quantize(torch.randn(20, 40), QuantSpec.parse("int8:channel:sym"), layout="tiled")
    operand, scale, x = Native().prepare(stored.codes, (20, 40)), stored.params.scale.clone(), torch.randn(3, 40)
    before = Native().int8_linear(x, operand, scale, None, None)
    scale *= 2
    assert torch.equal(Native().int8_linear(x, operand, scale, None, None), 2 * before)
