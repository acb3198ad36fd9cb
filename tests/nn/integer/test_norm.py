"""IntNorm against LayerNorm in float64, within the bounds of docs/math.md, 7."""

import json
import math
from typing import Any

import pytest
import torch
from torch.nn.functional import layer_norm

from qtool.errors import InputError
from qtool.nn import MODULES
from qtool.nn.integer.norm import IntNorm
from qtool.numerics.grid import Grid

EPS = 1e-12


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(size: int, bits: int) -> torch.Tensor:
    """Rows of every magnitude, nearly alike, at both ends, and with one channel far away."""
    limit = 2 ** (bits - 1) - 1
    rows = [(draw(size, seed=places) * 2.0**places).clamp(-limit, limit) for places in range(bits - 2)]
    rows += [torch.full((size,), float(level)) for level in (0, 1, limit, -limit)]
    rows += [torch.full((size,), float(level)) for level in (7, limit - 1)]
    rows[-1][0], rows[-2][-1] = limit, 8
    rows += [torch.where(torch.arange(size) % 2 == 0, limit, -limit).double()]
    rows += [torch.where(torch.arange(size) == 0, -limit, limit).double(), rows[2].clone()]
    rows[-1][1 % size] = -limit
    return torch.stack([row.double() for row in rows]).round().int()


GAMMAS = {
    "random": lambda n: draw(n, seed=3),
    "negative": lambda n: -draw(n, seed=3).abs() - 0.1,
    "some zero": lambda n: draw(n, seed=3) * (torch.arange(n) % 2),
    "all zero": lambda n: torch.zeros(n, dtype=torch.float64),
    "tiny": lambda n: draw(n, seed=3) * 1e-12,
    "large": lambda n: draw(n, seed=3) * 30,
}


@pytest.mark.parametrize("gamma", list(GAMMAS))
@pytest.mark.parametrize(("size", "bits"), [(32, 23), (7, 24), (1, 17), (96, 10)])
def test_lowered_norm_is_layer_norm_within_the_derived_bound(size: int, bits: int, gamma: str) -> None:
    weight, beta = GAMMAS[gamma](size), draw(size, seed=4)
    unit, target = 2.0**-10, Grid(2.0**-14, 22)
    module = IntNorm(size, bits, 22, device="cpu")
    module.lower(weight.float(), beta.float(), EPS, Grid(unit, bits), target)
    weight, beta = weight.float().double(), beta.float().double()
    x = inputs(size, bits)
    found = module(x)
    assert found.dtype == torch.int32 and found.shape == x.shape
    wide = x.double() * unit
    normal = layer_norm(wide, (size,), eps=EPS)
    variance = ((x - x.double().mean(-1, keepdim=True)).square().sum(-1, keepdim=True)).clamp_min(0.25)
    root = variance.sqrt()
    bound = math.sqrt(size) * (0.5 / root + 2.0**-31)
    bound = bound + normal.abs() * (size / (8 * variance) + 2.0**-15 / root + 2.0**-29 + root * 2.0**-46)
    # The rescale's half and multiplier, and half a unit of beta.
    allowed = bound * weight.abs() + (1 + (normal * weight).abs() * 2.0**-30 / target.unit) * target.unit
    wanted = normal * weight + beta
    inside = wanted.abs() < target.unit * target.limit
    off = (target.real(found) - wanted).abs()
    # Where nothing varies but a part of the rounded mean, LayerNorm itself is all rounding.
    varies = ((x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) > 0).expand_as(inside)
    assert (off <= allowed)[inside & varies].all()
    assert (inside & varies).any() or size == 1
    same = ~varies
    assert torch.equal(found[same], module.bias.expand_as(found)[same]), "rows without variance give beta"
    assert (inside | (found.abs() == target.limit)).all(), "what is outside saturates"


def test_the_bound_says_something() -> None:
    """Of 22-bit rows the error is a few units of the target, of 2^-14; the values are about 1."""
    module, target = IntNorm(64, 22, 22, device="cpu"), Grid(2.0**-14, 22)
    module.lower(torch.ones(64), torch.zeros(64), EPS, Grid(1.0, 22), target)
    x = (draw(50, 64) * 2.0**18).int()
    off = (target.real(module(x)) - layer_norm(x.double(), (64,), eps=EPS)).abs()
    assert 0.1 * target.unit < off.max() < 1.1 * target.unit


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-2])
def test_eps_matters_where_the_variance_is_small(eps: float) -> None:
    unit, target = 2.0**-12, Grid(2.0**-16, 24)
    module = IntNorm(48, 22, 24, device="cpu")
    module.lower(torch.ones(48), torch.zeros(48), eps, Grid(unit, 22), target)
    x = (draw(20, 48) * 40).int()
    wide = x.double() * unit
    off = (target.real(module(x)) - layer_norm(wide, (48,), eps=eps)).abs().max()
    assert off < 0.02
    assert (layer_norm(wide, (48,), eps=eps) - layer_norm(wide, (48,), eps=0)).abs().max() > off or eps < 1e-6
    assert module.eps.item() == round(48 * eps / unit**2)


def test_the_mean_and_with_it_the_center_of_the_source_does_not_matter() -> None:
    module = IntNorm(32, 23, 22, device="cpu")
    module.lower(draw(32), draw(32, seed=1), EPS, Grid(0.25, 23, center=5.0), Grid(2.0**-12, 22))
    x = (draw(10, 32) * 2.0**16).int()
    assert torch.equal(module(x), module(x + 12345))


def test_a_beta_beyond_the_target_saturates() -> None:
    module = IntNorm(4, 20, 12, device="cpu")
    module.lower(torch.ones(4), torch.tensor([1e9, -1e9, 0.0, 1.0]), EPS, Grid(1.0, 20), Grid(2.0**-6, 12))
    assert module.bias.tolist() == [2047, -2047, 0, 64]
    assert module(torch.tensor([[9, 9, 9, 9]], dtype=torch.int32)).tolist() == [[2047, -2047, 0, 64]]


def test_a_gamma_that_no_dyadic_number_reaches_is_refused() -> None:
    module = IntNorm(4, 20, 22, device="cpu")
    with pytest.raises(InputError, match="a scale is wrong"):
        module.lower(torch.full((4,), 1e30), torch.zeros(4), EPS, Grid(1.0, 20), Grid(2.0**-6, 22))


@pytest.mark.parametrize("shape", [(32,), (3, 32), (2, 3, 32), (0, 32)])
def test_leading_shapes(shape: tuple[int, ...]) -> None:
    module = IntNorm(32, 22, 22, device="cpu")
    module.lower(draw(32), draw(32, seed=1), EPS, Grid(0.25, 22), Grid(2.0**-12, 22))
    x = (draw(*shape) * 2.0**12).int()
    found = module(x)
    assert found.shape == shape and torch.equal(found.view(-1, 32), module(x.view(-1, 32)))


def test_a_description_rebuilds_the_module() -> None:
    module = IntNorm(32, 21, 22, device="cpu")
    module.lower(draw(32), draw(32, seed=1), 1e-5, Grid(2.0**-9, 21), Grid(2.0**-12, 22))
    description: dict[str, Any] = json.loads(json.dumps(module.description()))
    assert description == {"type": "int_norm", "size": 32, "in_bits": 21, "out_bits": 22}
    again: Any = MODULES["int_norm"].from_description(torch.nn.Module(), "norm", description, device="meta")
    types = {name: (value.shape, value.dtype) for name, value in again.state_dict().items()}
    assert types == {name: (value.shape, value.dtype) for name, value in module.state_dict().items()}
    again.load_state_dict(module.state_dict(), assign=True)
    x = (draw(9, 32) * 2.0**14).int()
    assert torch.equal(again(x), module(x)) and not any(value.is_floating_point() for value in again.buffers())
