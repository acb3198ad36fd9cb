"""The reference operations against numpy's int64 products, exact fractions and float64."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils._python_dispatch import TorchDispatchMode

from qtool import kernels
from qtool.errors import UnavailableError
from qtool.kernels import native, reference
from qtool.kernels.reference import (
    Product,
    Reference,
    exact_product,
    int8_gemm,
    operand,
    quantize_static,
    quantize_tokens,
)
from qtool.numerics import QTensor, QuantSpec

ULP = 2.0**-24
"""Relative error of one float32 operation, at most."""
TINY = torch.finfo(torch.float32).tiny
CODES = st.one_of(st.integers(-127, 127), st.sampled_from([-127, 127]))
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SHAPES = [(1, 1, 1), (0, 5, 3), (3, 1, 2), (2, 3, 1), (1, 7, 17), (5, 66, 9), (17, 768, 24), (1, 3072, 1)]
"""Tokens, inputs, outputs: nothing that a tile of 16 by 4 divides, and no tokens at all."""
BLOCKS = [(None, None), (1, None), (3, None), (1, 4), (2, 6), (None, 12), (6, 24)]


def usable() -> list[Product]:
    """The products that this machine computes exactly."""
    direct: list[Product] = ["direct", "split", "integer"]
    return direct[direct.index(exact_product()) :]


def exact(a: Any, weights: Any) -> Any:
    """numpy's int64 product `[tokens, in] x [out, in]`."""
    return np.asarray(a).astype(np.int64) @ np.asarray(weights).astype(np.int64).T


def random_codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def random_rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("product", usable())
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
def test_products_are_exact_at_the_extremes(product: Product, tokens: int, inputs: int, outputs: int) -> None:
    for left in (127, -127):
        for right in (127, -127, -1, 1):
            a = torch.full((tokens, inputs), left, dtype=torch.int8)
            weights = torch.full((outputs, inputs), right, dtype=torch.int8)
            found = int8_gemm(a, operand(weights, product))
            assert found.dtype == torch.int32
            assert torch.equal(found, torch.full((tokens, outputs), left * right * inputs, dtype=torch.int32))


@pytest.mark.parametrize("product", usable())
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), SHAPES)
def test_products_of_mixed_signs(product: Product, tokens: int, inputs: int, outputs: int) -> None:
    a, weights = random_codes(tokens, inputs, seed=1), random_codes(outputs, inputs, seed=2)
    assert int8_gemm(a, operand(weights, product)).tolist() == exact(a, weights).tolist()


@pytest.mark.parametrize("product", usable())
def test_the_longest_row_fills_the_accumulator(product: Product) -> None:
    inputs = (2**31 - 1) // 127**2
    assert inputs == 133144
    codes = torch.full((1, inputs), 127, dtype=torch.int8)
    assert int8_gemm(codes, operand(codes, product)).item() == 127**2 * inputs
    assert int8_gemm(codes, operand(-codes, product)).item() == -(127**2) * inputs


@given(st.data())
def test_products_agree_with_numpy(data: st.DataObject) -> None:
    tokens, outputs, inputs = (data.draw(st.integers(low, high)) for low, high in ((0, 6), (1, 6), (1, 21)))
    a = data.draw(arrays(np.int8, (tokens, inputs), elements=CODES))
    weights = data.draw(arrays(np.int8, (outputs, inputs), elements=CODES))
    first = data.draw(st.integers(0, inputs - 1))
    columns = slice(first, data.draw(st.integers(first + 1, inputs)))
    for product in usable():
        ready = operand(torch.from_numpy(weights), product)
        assert int8_gemm(torch.from_numpy(a), ready).tolist() == exact(a, weights).tolist()
        part = int8_gemm(torch.from_numpy(a)[:, columns], ready, columns)
        assert part.tolist() == exact(a[:, columns], weights[:, columns]).tolist()


def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What AVX2's vpmaddubsw does: pairs of unsigned x signed products are added in 16 bits and saturate there."""
    left, right = a.long() + 128, b.long()
    pairs = left[:, :, None] * right[None]
    pairs = torch.nn.functional.pad(pairs, (0, 0, 0, pairs.shape[1] % 2))
    sums = (pairs[:, 0::2] + pairs[:, 1::2]).clamp(-(2**15), 2**15 - 1).sum(1)
    return (sums - 128 * right.sum(0)).int()


def off_by_one(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.long() @ b.long() + 1).int()


def narrow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.long() @ b.long()).clamp(-(2**15), 2**15 - 1).int()


def missing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel")


def correct(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.long() @ b.long()).int()


@pytest.mark.parametrize(
    ("kernel", "chosen"),
    [(correct, "direct"), (saturating, "split"), (off_by_one, "integer"), (narrow, "integer"), (missing, "integer")],
)
def test_the_self_test_rejects_a_product_that_is_not_exact(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., torch.Tensor], chosen: Product
) -> None:
    monkeypatch.setattr(torch, "_int_mm", kernel)
    assert exact_product.__wrapped__() == chosen
    a, weights = random_codes(5, 96), random_codes(7, 96, seed=1)
    a[0], weights[0] = 127, 127
    assert int8_gemm(a, operand(weights, chosen)).tolist() == exact(a, weights).tolist()


def test_the_choice_is_made_once() -> None:
    assert exact_product() is exact_product()
    assert operand(random_codes(2, 3)).product == exact_product()


OTHER_INSTRUCTIONS = """
import torch
from qtool.kernels.reference import exact_product, int8_gemm, operand

direct = True
for tokens, inputs, outputs in ((1, 1, 5), (1, 768, 384), (2, 3, 1), (3, 64, 5), (17, 96, 24), (32, 768, 64)):
    for left, right in ((127, 127), (127, -127), (-127, 127), (-127, -127)):
        a = torch.full((tokens, inputs), left, dtype=torch.int8)
        weights = torch.full((outputs, inputs), right, dtype=torch.int8)
        true = torch.full((tokens, outputs), left * right * inputs, dtype=torch.int32)
        assert torch.equal(int8_gemm(a, operand(weights)), true), (tokens, inputs, outputs, left, right)
        direct = direct and (inputs == 1 or torch.equal(torch._int_mm(a, weights.t()), true))
assert direct or exact_product() != "direct"
print(exact_product())
"""


@pytest.mark.parametrize("isa", ["AVX2", "SSE41"])
def test_other_instruction_sets_are_exact_too(isa: str) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", OTHER_INSTRUCTIONS],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in ("direct", "split", "integer")


@given(st.lists(st.lists(FINITE, min_size=3, max_size=3), max_size=4))
def test_token_codes_are_the_nearest_in_exact_fractions(rows: list[list[float]]) -> None:
    codes, scale = quantize_tokens(torch.tensor(rows, dtype=torch.float32).view(-1, 3))
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (len(rows), 1)
    slack = Fraction(1, 2**16)  # the division and the sum with 1/2 are rounded to 24 bits, at values up to 127.5
    for row, found, step in zip(rows, codes.tolist(), scale[:, 0].tolist(), strict=True):
        peak = np.float32(max(map(abs, row)))
        assert step == max(float(peak / np.float32(127)), TINY)
        for value, code in zip(row, found, strict=True):
            ratio = Fraction(value) / Fraction(step)
            assert abs(code) <= 127 and abs(code - ratio) <= Fraction(1, 2) + slack
            if abs(ratio + Fraction(1, 2) - round(ratio + Fraction(1, 2))) > slack:
                assert code == math.floor(ratio + Fraction(1, 2))


def test_token_codes_in_the_order_of_float32_operations() -> None:
    x = random_rows(40, 33) * torch.logspace(-30, 30, 40)[:, None]
    codes, scale = quantize_tokens(x)
    step = np.abs(x.numpy()).max(1, keepdims=True) / np.float32(127)
    assert np.array_equal(scale.numpy(), step)
    assert np.array_equal(codes.numpy(), np.floor(x.numpy() / step + np.float32(0.5)).astype(np.int8))
    assert (codes.abs().amax(1) == 127).all()


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_a_row_of_zeros_gives_zeros(value: float) -> None:
    codes, scale = quantize_tokens(torch.full((1, 4), value))
    assert codes.tolist() == [[0, 0, 0, 0]] and scale.item() == TINY


def test_subnormal_rows_do_not_divide_by_zero() -> None:
    codes, scale = quantize_tokens(torch.tensor([[1e-45, -1e-40, 100 * TINY]]))
    assert codes.tolist() == [[0, 0, 100]] and scale.item() == TINY


class DividingAsCuda(TorchDispatchMode):
    """What CUDA's kernels do: divide by a number by multiplying by its reciprocal, and by a tensor as IEEE says."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor) and not isinstance(args[1], torch.Tensor):
            multiply = torch.ops.aten.mul_ if func is torch.ops.aten.div_.Tensor else torch.ops.aten.mul
            return multiply.Tensor(args[0], (1 / torch.tensor(args[1], dtype=args[0].dtype)).item())
        return func(*args, **(kwargs or {}))


def test_scales_of_rows_are_quotients_on_a_gpu_too() -> None:
    x = random_rows(300, 8)
    codes, scale = quantize_tokens(x)
    with DividingAsCuda():
        assert not torch.equal(x / 127, x.div(torch.tensor(127.0)))  # which shows in a row of twenty
        found = quantize_tokens(x)
    assert torch.equal(found[0], codes) and torch.equal(found[1], scale)


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
def test_damage_in_a_row_stays_visible_and_in_its_row(damage: float) -> None:
    x, ready = random_rows(3, 8), operand(random_codes(5, 8))
    scale = torch.full((5, 1), 0.01)
    clean = Reference().int8_linear(x.clone(), ready, scale, None, None)
    x[1, 3] = damage
    found = Reference().int8_linear(x, ready, scale, None, None)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@given(arrays(np.float32, (6,), elements=FINITE), st.floats(2.0**-30, 2.0**30, width=32))
def test_static_codes_saturate(values: Any, step: float) -> None:
    codes, _ = quantize_static(torch.from_numpy(values), torch.tensor([step]))
    with np.errstate(over="ignore"):
        wanted = np.clip(np.floor(values / np.float32(step) + np.float32(0.5)), -127, 127)
    assert codes.dtype == torch.int8 and codes.tolist() == wanted.tolist()


def test_static_extremes() -> None:
    x = torch.tensor([math.inf, -math.inf, 1e38, -1e38, 127.4, -127.5, 0.5, -0.5, 0.4999])
    assert quantize_static(x, torch.ones(1))[0].tolist() == [127, -127, 127, -127, 127, -127, 1, 0, 0]


def linear_in_float64(x: Any, weights: QTensor, bias: Any, act_scale: float | None) -> tuple[Any, Any]:
    """The result in float64 from float32 codes and scales, and a bound on the rounding of a float32 epilogue."""
    values = x.numpy()
    step = np.float32(act_scale) if act_scale else np.abs(values).max(1, keepdims=True) / np.float32(127)
    codes = np.clip(np.floor(values / step + np.float32(0.5)), -127, 127).astype(np.float64)
    rows, columns = weights.shape
    row_blocks, column_blocks = weights.params.scale.shape
    scale = np.repeat(weights.params.scale.double().numpy(), rows // row_blocks, 0)
    total, size = np.zeros((len(values), rows)), np.zeros((len(values), rows))
    for block, part in enumerate(np.split(np.arange(columns), column_blocks)):
        term = codes[:, part] @ weights.integers().double().numpy()[:, part].T * step * scale[:, block]
        total, size = total + term, size + np.abs(term)
    offset = 0 if bias is None else bias.double().numpy()
    return total + offset, (size + np.abs(offset)) * (column_blocks + 4) * ULP


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act_scale", [None, 0.01])
@pytest.mark.parametrize("product", usable())
def test_linear_for_every_block_shape(
    block: tuple[int | None, int | None], bias: bool, act_scale: float | None, product: Product
) -> None:
    x = random_rows(7, 24)
    weights = QTensor.quantize(random_rows(6, 24, seed=1), QuantSpec(8, block=block))
    offset = random_rows(6, seed=2) if bias else None
    static = None if act_scale is None else torch.tensor([act_scale])
    ready = operand(weights.integers(), product, block[1])
    before = x.clone()
    found = Reference().int8_linear(x, ready, weights.params.scale, offset, static)
    assert found.dtype == torch.float32 and torch.equal(x, before)
    wanted, bound = linear_in_float64(x, weights, offset, act_scale)
    assert (np.abs(found.double().numpy() - wanted) <= bound).all()


@pytest.mark.parametrize("shape", [(1, 1), (17, 7), (33, 66)])
def test_tiled_codes_are_prepared(shape: tuple[int, int]) -> None:
    weights = QTensor.quantize(random_rows(*shape), QuantSpec(8, block=(1, None)), layout="tiled")
    ready = Reference().prepare(weights.codes, shape)
    assert ready.in_features == shape[1]
    a = random_codes(3, shape[1], seed=3)
    assert int8_gemm(a, ready).tolist() == exact(a, weights.integers()).tolist()


@pytest.mark.parametrize("product", usable())
@pytest.mark.parametrize("block", [(1, None), (1, 4)])
def test_no_tokens(product: Product, block: tuple[int, int | None]) -> None:
    weights = QTensor.quantize(random_rows(6, 24), QuantSpec(8, block=block))
    ready = operand(weights.integers(), product, block[1])
    for static in (None, torch.ones(1)):
        found = Reference().int8_linear(torch.empty(0, 24), ready, weights.params.scale, torch.ones(6), static)
        assert found.shape == (0, 6) and found.dtype == torch.float32


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows_at_a_time", [4096, 11, 4, 1])
def test_row_table_linear(monkeypatch: pytest.MonkeyPatch, bits: int, bias: bool, rows_at_a_time: int) -> None:
    monkeypatch.setattr(reference, "_TABLE_ROWS", rows_at_a_time)
    table = QTensor.quantize(random_rows(11, 16), QuantSpec(bits, block=(1, None)))
    x, codes, scale = random_rows(5, 16, seed=1), table.integers(), table.params.scale
    offset = random_rows(11, seed=2) if bias else None
    found = Reference().row_table_linear(x, codes, scale, offset)
    exact_rows = (codes.double() * scale.double()).numpy()
    wanted = x.double().numpy() @ exact_rows.T + (0 if offset is None else offset.double().numpy())
    size = np.abs(x.double().numpy()) @ np.abs(exact_rows).T + (0 if offset is None else offset.abs().numpy())
    assert found.dtype == torch.float32
    assert (np.abs(found.double().numpy() - wanted) <= size * (16 + 3) * ULP).all()


def test_the_backend_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = kernels._default.__wrapped__
    here = ["native", "reference"] if native.available() else ["reference"]
    for name in here:
        monkeypatch.setenv("QTOOL_BACKEND", name)
        assert choose("cpu").name == name
        with kernels.using(name):
            assert kernels.backend().name == name
    monkeypatch.delenv("QTOOL_BACKEND")
    assert choose("cpu").name == here[0]
    monkeypatch.setenv("QTOOL_BACKEND", "")  # as good as unset
    assert choose("cpu").name == here[0]
    assert choose("meta").name == here[0]
    monkeypatch.setenv("QTOOL_BACKEND", "referense")
    with pytest.raises(UnavailableError, match="unknown backend"):
        choose("cpu")


def test_a_backend_that_does_not_compute_on_a_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = kernels._default.__wrapped__
    monkeypatch.setenv("QTOOL_BACKEND", "native")
    with pytest.raises(UnavailableError, match="native computes on the CPU"):
        choose("cuda")
    monkeypatch.setenv("QTOOL_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnavailableError, match="triton computes on a GPU"):
        choose("cpu")
    monkeypatch.setenv("QTOOL_BACKEND", "reference")
    assert choose("cuda").name == "reference"


def test_without_the_library_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "no compiler")
    monkeypatch.delenv("QTOOL_BACKEND", raising=False)
    assert kernels._default.__wrapped__("cpu").name == "reference"
    with pytest.raises(UnavailableError, match="native backend is not available: no compiler"):
        kernels._make.__wrapped__("native")


def test_the_instruction_set_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "isas", lambda: ("portable", "avx2"))
    for wanted, chosen in (("", "avx2"), ("portable", "portable")):
        monkeypatch.setenv("QTOOL_CPU_ISA", wanted)
        assert native.isa.__wrapped__() == chosen
    monkeypatch.setenv("QTOOL_CPU_ISA", "avx3")
    with pytest.raises(UnavailableError, match="unknown instruction set 'avx3'"):
        native.isa.__wrapped__()
    monkeypatch.setenv("QTOOL_CPU_ISA", "avx512vnni")
    with pytest.raises(UnavailableError, match="this CPU or build has portable, avx2"):
        native.isa.__wrapped__()


def test_an_unknown_backend_stops_the_process() -> None:
    code = "import qtool.errors, sys\nfrom qtool import kernels\n"
    code += "try:\n    kernels.backend()\nexcept qtool.errors.UnavailableError as error:\n    sys.exit(str(error))"
    environment = {**os.environ, "QTOOL_BACKEND": "referense"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "QTOOL_BACKEND=referense: unknown backend 'referense'; did you mean reference?\n"


def test_static_damage_stays_visible() -> None:
    x = torch.zeros(4, 8)
    x[1, 3], x[2, 0], x[3, :2] = float("nan"), float("inf"), torch.tensor([float("inf"), float("-inf")])
    weight, scale = operand(torch.ones(3, 8, dtype=torch.int8)), torch.ones(3, 1)
    y = Reference().int8_linear(x, weight, scale, None, torch.tensor([0.5]))
    assert y[0].tolist() == [0, 0, 0]
    assert y[1:].isnan().all()
