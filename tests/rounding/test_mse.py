"""Clipping by least squares against a search over every scale, block by block."""

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtool.errors import InputError
from qtool.numerics import QuantSpec
from qtool.rounding import mse, nearest

SPECS = ["int2:channel:sym", "int3:tensor:sym", "int4:group:8:sym", "int4:rows:4:sym", "int5:block:2x4:sym"]
SPECS += ["int8:channel:sym"]
UNEVEN = ["int4:group:7:sym", "int4:channel:asym", "int3:group:7:asym", "int4:group:8:min", "int2:block:4x10:min"]


def matrix(seed: int, rows: int = 8, columns: int = 24) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=draw) * torch.rand(rows, 1, generator=draw).exp()


def error(weight: Any, tensor: Any) -> float:
    return float((weight.double() - tensor.dequantize().double()).square().sum())


def searched(block: Any, qmax: int) -> np.float32:
    """The scale of 80 between max / qmax and a fifth of it with the least error, the largest of equal ones."""
    start = np.float32(np.abs(block).max() / qmax) if block.any() else np.float32(1)
    found, least = start, np.inf
    for share in torch.linspace(1.0, 0.2, 80, dtype=torch.float64).tolist():
        scale = np.float32(np.float64(start) * share)
        codes = np.clip(np.floor(block / np.float64(scale) + 0.5), -qmax, qmax)
        loss = ((codes * np.float64(scale) - block) ** 2).sum()
        if loss < least * (1 - 1e-12):
            found, least = scale, loss
    return found


@pytest.mark.parametrize("spelling", SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_every_block_has_the_best_scale(spelling: str, seed: int) -> None:
    spec, weight = QuantSpec.parse(spelling), matrix(seed)
    weight[2] *= 0
    weight[5, 3] *= 20
    found = mse(weight, spec, layout="rows")
    values = weight.double().numpy()
    row_blocks, column_blocks = spec.scale_shape((8, 24))
    rows, columns = 8 // row_blocks, 24 // column_blocks
    for i, j in np.ndindex(row_blocks, column_blocks):
        block = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scale = searched(values[block], spec.qmax)
        assert found.params.scale[i, j].item() == scale
        wanted = np.clip(np.floor(values[block] / np.float64(scale) + 0.5), -spec.qmax, spec.qmax)
        np.testing.assert_array_equal(found.integers().numpy()[block], wanted)


@given(st.integers(0, 2**31), st.sampled_from(SPECS + UNEVEN), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_no_block_is_worse_than_rounded_to_nearest(seed: int, spelling: str, size: float) -> None:
    spec, weight = QuantSpec.parse(spelling), matrix(seed) * size
    assert error(weight, mse(weight, spec)) <= error(weight, nearest(weight, spec)) * (1 + 1e-12)


@pytest.mark.parametrize("spelling", ["int3:channel:asym", "int4:group:10:min", "int3:rows:4:min", "int4:group:7:sym"])
def test_blocks_are_searched_one_by_one(spelling: str) -> None:
    """A block's parameters are those of the block alone, wherever it lies in the matrix."""
    spec, weight = QuantSpec.parse(spelling), matrix(3)
    high, wide = spec.block[0] or 8, spec.block[1] or 24
    whole = mse(weight, spec).dequantize()
    alone = QuantSpec(spec.num_bits, spec.symmetric, minimum=spec.minimum)
    for top in range(0, 8, high):
        for left in range(0, 24, wide):
            block = np.s_[top : top + high, left : left + wide]
            assert torch.equal(whole[block], mse(weight[block].contiguous(), alone).dequantize())


@pytest.mark.parametrize("spelling", ["int3:tensor:asym", "int3:tensor:min"])
def test_ranges_come_close_to_the_best_of_a_fine_search(spelling: str) -> None:
    """Against all pairs of ends on a grid four times as fine as what is tried, in plain loops."""
    spec = QuantSpec.parse(spelling)
    weight = matrix(1, 1, 32).exp()
    values, low, high = weight.double().numpy()[0], weight.min().item(), weight.max().item()
    low = low if spec.minimum else 0.0
    least = np.inf
    for lower in np.linspace(low, (low + high) / 2, 60) if spec.minimum else [0.0]:
        for upper in np.linspace((low + high) / 2 + 0.01, high * 1.1, 200):
            scale = (upper - lower) / 7
            codes = np.clip(np.floor((values - lower) / scale + 0.5), 0, 7)
            least = min(least, ((codes * scale + lower - values) ** 2).sum())
    assert error(weight, mse(weight, spec)) <= 1.1 * least
    assert error(weight, mse(weight, spec)) < error(weight, nearest(weight, spec))


def test_narrow_grids_gain_most() -> None:
    weight = matrix(0, 64, 256)
    gains = []
    for bits in (3, 4, 8):
        spec = QuantSpec.parse(f"int{bits}:channel:sym")
        gains.append(error(weight, nearest(weight, spec)) / error(weight, mse(weight, spec)))
    assert gains[0] > gains[1] > 1.3 > gains[2] >= 1


@pytest.mark.parametrize("spelling", SPECS)
def test_stretches_of_a_large_matrix_change_nothing(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weight = QuantSpec.parse(spelling), matrix(7)
    whole = mse(weight, spec)
    monkeypatch.setattr(import_module("qtool.rounding.mse"), "_CHUNK", 1)  # the package has a function of that name
    parts = mse(weight, spec)
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.params.scale, parts.params.scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_cannot_be_rounded(bad: float) -> None:
    weight = matrix(0)
    weight[1, 1] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        mse(weight, QuantSpec.parse("int4:channel:sym"))
    with pytest.raises(InputError, match="do not divide"):
        mse(matrix(0), QuantSpec.parse("int4:rows:7:sym"))


def test_weights_that_require_a_gradient() -> None:
    weight = torch.nn.Parameter(matrix(0))
    found = mse(weight, QuantSpec.parse("int4:channel:sym"))
    assert not found.params.scale.requires_grad
