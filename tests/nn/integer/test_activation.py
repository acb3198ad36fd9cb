"""Element-wise integer functions against float64, over every input that they can be given."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu, relu, silu

from qtool.nn import MODULES
from qtool.nn.integer.activation import IntGelu, IntRelu, IntTable, IntTanh
from qtool.numerics.grid import Grid

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": gelu,
    "silu": silu,
    "sine": torch.sin,
    "square": torch.square,
    "minus exp": lambda x: -torch.exp(x / 4),
    "seven": lambda x: torch.full_like(x, 7.0),
    "zero": torch.zeros_like,
}
GRIDS = {"around zero": Grid.covering(-4, 4, 10), "centered": Grid.covering(-3, 9, 12, centered=True)}
GRIDS |= {"eight bits": Grid.covering(0.0, 0.5, 8), "fourteen bits": Grid.covering(-30, 2, 14, centered=True)}


def every(grid: Grid) -> torch.Tensor:
    return torch.arange(-grid.limit, grid.limit + 1, dtype=torch.int32)


def rebuilt(module: Any) -> Any:
    description = json.loads(json.dumps(module.description()))
    again: Any = MODULES[description["type"]].from_description(torch.nn.Module(), "act", description, device="meta")
    assert type(again) is type(module)
    shapes = {name: (value.shape, value.dtype) for name, value in module.state_dict().items()}
    assert {name: (value.shape, value.dtype) for name, value in again.state_dict().items()} == shapes
    again.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)
    assert again.description() == module.description()
    return again


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", list(GRIDS))
@pytest.mark.parametrize("function", list(FUNCTIONS))
def test_a_table_is_off_by_half_a_unit_of_its_output(function: str, grid: str, shifted: bool) -> None:
    source = GRIDS[grid]
    module = IntTable(source.bits, device="cpu")
    target = module.lower(FUNCTIONS[function], source, shifted=shifted)
    x = every(source)
    found, wanted = module(x), FUNCTIONS[function](source.real(x))
    assert found.dtype == torch.int32 and module.table.dtype == torch.int16
    off = (target.real(found) - wanted).abs()
    assert (off <= float(target.unit) * (0.5 + 1e-9)).all()
    assert target.bits == 16 and target.unsigned == shifted
    assert found.abs().max() <= 32767 and (not shifted or found.min() >= 0)
    if function not in ("seven", "zero"):
        # All levels are used; the lowest entry of the table is for an input that saturation never leaves.
        assert module.table.max() == 32767 if shifted else module.table.abs().max() == 32767


def test_a_shifted_table_has_twice_the_levels() -> None:
    source = GRIDS["centered"]
    units = [float(IntTable(12, device="cpu").lower(torch.sin, source, shifted=x).unit) for x in (False, True)]
    assert units[1] == pytest.approx(2 / 32767, rel=1e-4) and units[0] == pytest.approx(1 / 32767, rel=1e-4)
    units = [float(IntTable(12, device="cpu").lower(gelu, source, shifted=x).unit) for x in (False, True)]
    assert units[1] < 1.02 * units[0], "what GELU has below zero costs next to nothing"


def test_tables_take_any_shape_and_come_back_from_their_description() -> None:
    module = IntTable(10, device="cpu")
    module.lower(gelu, GRIDS["around zero"], shifted=True)
    x = every(GRIDS["around zero"])[:1020].view(2, 5, 102)
    assert torch.equal(rebuilt(module)(x), module(x)) and module(x).shape == x.shape


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("bits", "reach", "bound"),
    [(8, 4, 0.0189), (8, 16, 0.0255), (10, 8, 0.0189), (12, 4, 0.0183), (12, 16, 0.0186), (14, 8, 0.0183)],
)
def test_the_polynomial_is_gelu_within_the_measured_table(bits: int, reach: float, bound: float, shifted: bool) -> None:
    source = Grid.covering(-reach, reach, bits)
    module = IntGelu(bits, shifted=shifted, device="cpu")
    target = module.lower(source)
    x = every(source)
    found = module(x)
    off = (target.real(found) - gelu(source.real(x))).abs()
    # Shifted, the offset is rounded once more: half a unit of the output.
    assert 0.01 < off.max() <= bound + 0.00005 + float(target.unit)
    assert found.dtype == torch.int32 and found.abs().max() <= 32767
    assert target.unsigned == shifted and (not shifted or found.min() >= 0)
    assert target.real(found)[0].abs() < 2 * float(target.unit), "GELU of the lowest input is zero"
    assert not any(value.is_floating_point() for value in module.buffers())


@pytest.mark.parametrize("shifted", [False, True])
def test_a_polynomial_comes_back_from_its_description(shifted: bool) -> None:
    module = IntGelu(11, shifted=shifted, device="cpu")
    source = Grid.covering(-6, 6, 11)
    module.lower(source)
    assert torch.equal(rebuilt(module)(every(source)), module(every(source)))


def test_relu_is_exact() -> None:
    module, x = IntRelu(), torch.tensor([[-(2**31) + 1, -1, 0], [1, 77, 2**31 - 1]], dtype=torch.int32)
    assert torch.equal(module(x).double(), relu(x.double())) and module(x).dtype == torch.int32
    assert torch.equal(rebuilt(module)(x), module(x)) and not module.state_dict()


@pytest.mark.parametrize("grid", [6, 8, 10, 12])
def test_tanh_is_within_the_measured_bound_odd_and_never_falls(grid: int) -> None:
    module, unit = IntTanh(grid), math.log(2) / 2**grid
    limit = (1 << 19) - 1
    x = torch.cat([torch.arange(-20000, 20001), torch.tensor([limit, -limit, 2**31 - 1, 1 - 2**31])]).int()
    found = module(x)
    off = (found.double() * 2.0**-15 - torch.tanh(x.double() * unit)).abs()
    assert 1e-4 < off.max() <= 1.56e-3
    assert torch.equal(module(-x), -found) and (found[:40001].diff() >= 0).all() and found.abs().max() <= 32767
    assert torch.equal(rebuilt(module)(x), found)
