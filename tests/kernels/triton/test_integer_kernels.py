"""Kernels of integer models give the reference's integers, bit for bit; shapes are around the sizes of programs."""

from typing import Any

import pytest
import torch
from draws import Draw

from qtool.kernels import reference
from qtool.kernels.codebook import WholeCodebook
from qtool.kernels.reference import Reference
from qtool.kernels.triton.backend import Triton
from qtool.numerics.qtensor import tile

INT32 = (1 << 31) - 1


def moved(value: Any, device: torch.device) -> Any:
    """Every tensor in it on a device."""
    if isinstance(value, WholeCodebook):
        return WholeCodebook(
            *(moved(x, device) for x in (value.edges, value.levels)), value.relative, value.renormalize
        )
    if isinstance(value, tuple | list):
        return type(value)(moved(x, device) for x in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(found.cpu(), wanted) and found.dtype == wanted.dtype


@pytest.mark.parametrize("width", [1, 3, 16, 33, 130])
@pytest.mark.parametrize("unsigned", [False, True])
def test_quantize_rows(width: int, unsigned: bool, device: torch.device) -> None:
    draw = Draw(width)
    for bits in (1, 8, 22, 31):
        limit = (1 << bits) - 1
        x = draw.integers(0 if unsigned else -limit, limit, 9, width)
        x[1], x[2, 0], x[3] = 0, limit, 1
        for rows in (x, x[:0], x[None, :, :], x[:, ::2]):
            found = Triton.quantize_rows(rows.to(device), unsigned=unsigned)
            wanted = reference.quantize_rows(rows, unsigned=unsigned)
            assert all(same(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("width", [1, 2, 16, 33, 130])
def test_integer_norm(width: int, device: torch.device) -> None:
    draw = Draw(width)
    for bits in (1, 8, 23, 24):
        limit = (1 << (bits - 1)) - 1
        x = draw.integers(-limit, limit, 17, width)
        x[1], x[2], x[3, 0] = 0, limit, -limit
        eps = torch.tensor([max(1, width * bits)])
        bias = draw.integers(-(1 << 22), 1 << 22, width)
        for low, high, out in ((-32, -8, 22), (-6, 2, 22), (-24, -20, 8)):
            given = x, eps, draw.ratios(low, high, width), bias, out
            assert same(Triton.integer_norm(*moved(given, device)), reference.integer_norm(*given))


@pytest.mark.parametrize("inputs", [1, 16, 33, 96])
@pytest.mark.parametrize("kind", ["signed", "unsigned", "static"])
def test_integer_linear(inputs: int, kind: str, device: torch.device) -> None:
    draw = Draw(inputs)
    for outputs, rows in ((1, 1), (32, 16), (33, 17), (70, 9), (5, 0)):
        weight, codes = draw.codes(outputs, inputs), draw.codes(rows, inputs)
        amax = None if kind == "static" else draw.integers(1, (1 << 21) - 1, rows, 1, dtype=torch.int64)
        reach = int(weight.long().abs().sum(1).max()) * 254 * (1 if amax is None else (1 << 21) - 1)
        align = 0 if amax is None else max(0, reach.bit_length() - 30)
        bias = draw.integers(-(1 << 29), 1 << 29, outputs)
        exact = reference.operand(weight)
        mine = Triton().prepare(tile(weight).to(device), (outputs, inputs))
        sums = Reference().row_sums(exact)
        assert same(Triton().row_sums(mine), sums)
        given = sums if kind == "unsigned" else None
        rest = torch.tensor([align]), bias, draw.ratios(-32, 29, outputs)
        for bits in (8, 22, 31):
            wanted = reference.integer_linear(codes, amax, exact, given, *rest, bits)
            found = Triton.integer_linear(
                *moved((codes, amax), device), mine, moved(given, device), *moved(rest, device), bits
            )
            assert same(found, wanted)


def attention_operands(tokens: int, heads: int, size: int, out: tuple[float, float]) -> tuple[Any, ...]:
    draw = Draw(tokens + size)
    query = draw.integers(-32767, 32767, 3, tokens, heads, size)
    query[0, 0] = 0
    key, value = (draw.integers(-127, 127, 3, tokens, heads, size) for _ in range(2))
    real = draw.integers(0, 3, 3, tokens) > 0
    real[1] = False
    real[2] = True
    align = torch.tensor([max(0, (size * 127 * 127 * 32767).bit_length() - 30)])
    return query, key, value, real, align, draw.ratios(-22, -14, heads, 1, 1), draw.ratios(*out, heads, 1, size)


@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 4), (5, 3, 8), (33, 2, 32), (70, 1, 20)])
def test_integer_attention(tokens: int, heads: int, size: int, device: torch.device) -> None:
    given = attention_operands(tokens, heads, size, (-9, 2))
    for grid, bits in ((6, 14), (10, 14), (12, 16), (8, 8), (10, 15)):
        widths: dict[str, Any] = {"grid": grid, "bits": bits, "context_bits": 16}
        wanted = reference.integer_attention(*given, **widths)
        assert same(Triton.integer_attention(*moved(given, device), **widths), wanted)
        assert not wanted[1].any() and wanted[2].any()


@pytest.mark.parametrize(("tokens", "heads", "size"), [(5, 3, 8), (33, 1, 32)])
@pytest.mark.parametrize("bits", [None, 2, 4])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_integer_attention_in_codes(
    tokens: int, heads: int, size: int, bits: int | None, relative: bool, renormalize: bool, device: torch.device
) -> None:
    draw = Draw(tokens)
    count = 1 if bits is None else (1 << bits) - 1
    edges = (1 << draw.integers(0, 20, heads, count)) + draw.integers(0, 1 << 14, heads, count)
    levels = draw.integers(1, 127, heads, count + 1)
    levels[0, -1] = 16383  # one head of two digits
    levels[:, 0] = 0
    book = WholeCodebook(edges.sort(-1).values, None if bits is None else levels, relative, renormalize)
    seen = 0
    for grid, out in ((6, -22), (10, -9), (12, 2)):
        given = attention_operands(tokens, heads, size, (out, out))
        widths: dict[str, Any] = {"grid": grid, "bits": 14, "context_bits": 16}
        wanted = reference.integer_attention(*given, **widths, book=book)
        found = Triton.integer_attention(*moved(given, device), **widths, book=moved(book, device))
        assert same(found, wanted)
        seen += int(wanted.count_nonzero())
    assert seen > 0


def test_functions_of_single_numbers(device: torch.device) -> None:
    draw = Draw(0)
    for bits, size in ((8, 5), (12, 1025), (14, 40)):
        limit = (1 << (bits - 1)) - 1
        x = draw.integers(-limit, limit, size)
        x[:3] = torch.tensor([0, limit, -limit])
        for grid in (6, 10, 12):
            assert same(Triton.integer_tanh(x.to(device), grid), reference.integer_tanh(x, grid))
        for root, one, places in ((5 * limit // 7, 1 << 20, 3), (1, 1, 0), (limit, 1 << 25, 14)):
            constants = [torch.tensor(value) for value in (root, one)]
            wanted = reference.integer_gelu(x, *constants, places)
            assert same(Triton.integer_gelu(x.to(device), *moved(constants, device), places), wanted)
    assert not Triton.integer_tanh(x[:0].to(device), 10).numel()
