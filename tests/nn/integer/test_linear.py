"""Integer linears against float64, within the bounds of docs/math.md, 2 and 3."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qtool.errors import InputError
from qtool.nn import MODULES, IntModule, describe, install
from qtool.nn.integer.chain import IntTiedLinear
from qtool.nn.integer.embedding import IntTableRows
from qtool.nn.integer.linear import IntLinear
from qtool.nn.integer.module import integer_outputs
from qtool.numerics import Dyadic, QTensor, QuantSpec
from qtool.numerics.grid import Grid
from qtool.numerics.qtensor import rows_of, tile

DYNAMIC, STATIC = "int8:token:sym", "int8:tensor:sym"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def words(shape: tuple[int, int], **changes: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "type": "int_linear", "shape": list(shape), "weights": "int8:channel:sym", "activations": DYNAMIC,
        "in_bits": 22, "out_bits": 22, "rescales": False, "unsigned": False, "output": False,
    }  # fmt: skip
    return {**defaults, **changes}


def empty(description: dict[str, Any], device: str = "cpu") -> Any:
    return MODULES[description["type"]].from_description(torch.nn.Module(), "x", description, device=device)


def rows(width: int, bits: int, unsigned: bool = False) -> torch.Tensor:
    """Zeros, both ends, one alone, ties, and random ones of every magnitude: int32 `[rows, width]`."""
    limit = 2 ** (bits - 1) - 1
    found = [torch.full((width,), float(level)) for level in (0, 1, -1, limit, -limit, limit // 2)]
    one = torch.zeros(width)
    one[width // 2] = limit
    found += [one, torch.where(torch.arange(width) % 2 == 0, limit, -limit).float()]
    found += [(draw(width, seed=places) * 2.0**places).clamp(-limit, limit) for places in range(bits - 1)]
    x = torch.stack([row.double().round() for row in found]).int()
    return x.abs() if unsigned else x


@dataclass
class Case:
    """A layer that was lowered, and all that went into it in float64."""

    module: Any
    matrix: torch.Tensor
    bias: torch.Tensor
    source: Grid
    target: Grid
    smooth: torch.Tensor
    missing: torch.Tensor | float

    def real_input(self, x: torch.Tensor) -> torch.Tensor:
        """What `x` stands for: a grid of its own where the module rescales, else already moved and divided."""
        if self.module.rescales:
            return self.source.real(x)
        return x.double() * self.source.unit * self.smooth + self.missing

    def off(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Distance to real arithmetic, what the derivation allows, and whether saturation stays out of it."""
        module = self.module
        codes = rows_of(module.weight, (module.out_features, module.in_features)).double()
        step, amax = self._step(x)
        ratio = Dyadic(module.multiplier, module.shift).to_float() * self.target.unit  # real, of the accumulator
        unit_in = step * 2.0 ** int(module.align)
        stored = codes * (ratio / unit_in)[:, None] / self.smooth  # as the module has it, dead rows on a wider grid
        wanted = self.real_input(x) @ self.matrix.T + self.bias
        found = self.target.real(module(x))
        # Of each input: half a step, half of the rescaled grid, the dyadic number.
        unit = step * (254 if module.unsigned else 127) if module.dynamic else 0.0
        each = self.smooth * (0.5 + 2.0**-22) * amax * step
        if module.rescales:
            each = each + self.smooth * (0.5 * unit + (x.abs() * self.source.unit / self.smooth) * 2.0**-30)
        inputs = each @ stored.abs().T
        weights = self.real_input(x).abs() @ (stored - self.matrix).abs().T
        size = (wanted - self.target.center).abs() + ratio + (self.bias + self._moved(stored)).abs() * 2.0**-24
        allowed = inputs + weights + torch.as_tensor(self.target.unit) / 2 + ratio + size * 2.0**-30
        allowed = allowed + self._moved(stored.abs()) * 2.0**-23  # dequantized weights are float32
        inside = (wanted - self.target.center).abs() + allowed < self.target.limit * torch.as_tensor(self.target.unit)
        return (found - wanted).abs(), allowed, inside & self._unclipped(x)

    def _step(self, x: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The real step of the accumulator's input, and how often a row's codes hold it."""
        module, unit = self.module, float(self.source.unit)
        if not module.dynamic:
            return self.act_scale, torch.ones(len(x), 1, dtype=torch.float64)
        inner = unit / (self.smooth.min().item() if module.rescales else 1.0)
        _, amax = module.quantize(x)
        return inner / (254 if module.unsigned else 127), amax.double()

    act_scale: float = 1.0

    def _moved(self, stored: torch.Tensor) -> torch.Tensor:
        return stored @ (torch.as_tensor(self.missing, dtype=torch.float64).abs().expand(self.module.in_features))

    def _unclipped(self, x: torch.Tensor) -> torch.Tensor:
        """Rows whose rescaled inputs all fit; the others saturate."""
        module = self.module
        if not module.rescales and module.dynamic:
            return torch.ones(len(x), 1, dtype=torch.bool)
        middle = self.missing - self.source.center if module.rescales else 0.0
        moved = (x.double() * self.source.unit - middle) / self.smooth
        inner = float(self.source.unit) / self.smooth.min().item() if module.dynamic else self.act_scale
        limit = 2 ** (module.in_bits - 1) - 1 if module.dynamic else 127
        return ((moved / inner).abs() <= limit - 1).all(-1, keepdim=True)


def lowered(
    shape: tuple[int, int] = (17, 22),
    *,
    matrix: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    source: Grid | None = None,
    target: Grid | None = None,
    smooth: torch.Tensor | None = None,
    middle: torch.Tensor | None = None,
    act_scale: float | None = None,
    **changes: Any,
) -> Case:
    outputs, inputs = shape
    matrix = draw(outputs, inputs, seed=7) if matrix is None else matrix
    bias = draw(outputs, seed=8) if bias is None else bias
    source = source or Grid(2.0**-16, 22)
    changes = {"in_bits": source.bits, "unsigned": source.unsigned, **changes}
    target = target or Grid(2.0**-12, changes.get("out_bits", 22))
    module = empty(words(shape, **changes, **({"activations": STATIC} if act_scale is not None else {})))
    division = torch.ones(inputs, dtype=torch.float64) if smooth is None else smooth
    weight = QTensor.quantize(matrix * division, QuantSpec.parse(module.words["weights"]), layout="tiled")
    module.lower(weight, bias, source, target, smooth=smooth, middle=middle, act_scale=act_scale)
    missing = torch.as_tensor(source.center if middle is None else middle, dtype=torch.float64)
    if module.rescales and middle is not None:
        missing = missing + source.center
    case = Case(module, matrix, bias, source, target, division, missing)
    case.act_scale = 1.0 if act_scale is None else act_scale
    return case


def holds(case: Case, x: torch.Tensor, *, share: float = 0.5) -> None:
    """Every output that nothing clips is within the bound, `share` of all are such, and the bound is not slack."""
    found = case.module(x)
    assert found.dtype == torch.int32 and found.shape == (len(x), case.module.out_features)
    off, allowed, inside = case.off(x)
    assert (off <= allowed)[inside].all(), (off / allowed)[inside].max()
    assert inside.double().mean() >= share
    assert (off / allowed)[inside].max() > 0.02


SMOOTH = draw(22, seed=5).exp()
MIDDLE = draw(22, seed=6) * 2
CHANNELS = Grid(2.0 ** torch.arange(-17, 0, dtype=torch.float64), 22, draw(17, seed=9))
CASES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no bias": {"bias": torch.zeros(17, dtype=torch.float64)},
    "a grid a channel": {"target": CHANNELS},
    "smoothing": {"smooth": SMOOTH, "rescales": True},
    "middles": {"middle": MIDDLE, "rescales": True},
    "both": {"smooth": SMOOTH, "middle": MIDDLE, "rescales": True, "target": CHANNELS},
    "both, done by another": {"smooth": SMOOTH, "middle": MIDDLE},
    "nothing to divide": {"rescales": True},
    "16 bits around something": {"source": Grid(2.0**-11, 16, 3.25)},
    "16 bits around something a channel": {"source": Grid(2.0**-11, 16, MIDDLE)},
    "unsigned": {"source": Grid(2.0**-11, 16, -0.17, unsigned=True)},
    "unsigned, smoothed": {"source": Grid(2.0**-11, 16, -0.17, unsigned=True), "smooth": SMOOTH, "rescales": True},
    "five bits": {"weights": "int5:channel:sym"},
    "one scale": {"weights": "int8:tensor:sym", "smooth": SMOOTH, "rescales": True},
    "few bits out": {"out_bits": 8, "target": Grid(2.0**2, 8, draw(17, seed=9))},
    "static": {"act_scale": 0.25, "rescales": True},
    "static, moved": {"act_scale": 0.25, "middle": MIDDLE, "rescales": True, "target": CHANNELS},
    "static, smoothed and moved": {"act_scale": 0.5, "smooth": SMOOTH, "middle": MIDDLE, "rescales": True},
    "static, 16 bits in": {"act_scale": 0.125, "source": Grid(2.0**-11, 16), "smooth": SMOOTH, "rescales": True},
}


@pytest.mark.parametrize("name", list(CASES))
def test_lowered_linear_is_the_real_one_within_the_derived_bound(name: str) -> None:
    case = lowered(**CASES[name])
    holds(case, rows(22, case.source.bits, case.source.unsigned), share=0.3)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 33), (16, 4), (33, 65)])
@pytest.mark.parametrize("static", [False, True])
def test_any_shape(shape: tuple[int, int], static: bool) -> None:
    case = lowered(shape, act_scale=0.25 if static else None, rescales=static)
    holds(case, rows(shape[1], 22), share=0.3)


@pytest.mark.parametrize("weights", ["int8:channel:sym", "int8:tensor:sym"])
@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-5])
def test_rows_that_are_dead_keep_a_large_bias(weights: str, size: float) -> None:
    """Their bias has no room on the grid of such small weights: that grid is made wider."""
    matrix, bias = draw(17, 22, seed=7), draw(17, seed=8)
    for row, value in ((0, 400.0), (5, -400.0), (16, 0.001)):
        matrix[row] *= size
        bias[row] = value
    case = lowered(matrix=matrix, bias=bias, weights=weights)
    assert case.module.bias.abs().max() <= 2**29
    x = rows(22, 22)
    holds(case, x)
    found = case.target.real(case.module(x))
    assert ((found - bias).abs()[:, [0, 5, 16]] <= 0.01).all()


def test_a_bias_that_no_grid_of_float32_holds_is_refused() -> None:
    bias = draw(17, seed=8)
    bias[3] = 1e60
    with pytest.raises(InputError):
        lowered(bias=bias, source=Grid(2.0**-60, 22))


@pytest.mark.parametrize("static", [False, True])
def test_what_is_outside_the_target_saturates(static: bool) -> None:
    target = Grid(2.0**-12, 12)
    case = lowered(act_scale=0.25 if static else None, rescales=static, target=target, out_bits=12)
    x = rows(22, 22)
    wanted, found = case.real_input(x) @ case.matrix.T + case.bias, case.module(x)
    far = wanted.abs() > 20
    assert far.any() and found.abs().max() == 2047
    if not static:
        assert torch.equal(found[far], (2047 * wanted[far].sign()).int())


def test_static_codes_saturate() -> None:
    case = lowered(act_scale=2.0**-8, rescales=True)
    codes, amax = case.module.quantize(rows(22, 22))
    assert amax is None and codes.dtype == torch.int8 and codes.min() == -127 and codes.max() == 127


@pytest.mark.parametrize("unsigned", [False, True])
def test_codes_and_row_are_what_they_stand_for(unsigned: bool) -> None:
    case = lowered(source=Grid(2.0**-11, 16, unsigned=unsigned))
    x = rows(22, 16, unsigned)
    codes, amax = case.module.quantize(x)
    assert torch.equal(amax[:, 0], x.long().abs().amax(1).clamp_min(1))
    levels, shift = (254, 127) if unsigned else (127, 0)
    off = ((codes.double() + shift) * amax / levels - x).abs()
    assert (off <= (0.5 + 2.0**-22) * amax / levels).all()
    assert torch.equal(case.module((codes, amax)), case.module(x)), "codes made before are taken as they are"


def test_leading_axes_and_an_empty_batch() -> None:
    module, x = lowered().module, rows(22, 22)[:24]
    assert torch.equal(module(x.view(2, 3, 4, 22)), module(x).view(2, 3, 4, 17))
    assert module(x[:0]).shape == (0, 17) and torch.equal(module(x[3]), module(x)[3])


# Bias correction


@pytest.mark.parametrize("rescales", [False, True])
def test_the_bias_takes_out_what_rounding_adds_to_the_mean(rescales: bool) -> None:
    matrix, mean = draw(17, 22, seed=7), draw(22, seed=3) + 4
    weight = QTensor.quantize(matrix, QuantSpec.parse("int5:channel:sym"), layout="tiled")
    middle = MIDDLE if rescales else None
    modules = []
    for options in ({}, {"exact": matrix.float(), "mean": mean}):
        module = empty(words((17, 22), weights="int5:channel:sym", rescales=rescales))
        module.lower(weight, draw(17, seed=8), Grid(2.0**-16, 22), Grid(2.0**-12, 22), middle=middle, **options)
        modules.append(module)
    unit = Dyadic(modules[0].multiplier, modules[0].shift).to_float() * 2.0**-12
    moved = (modules[1].bias - modules[0].bias) * unit
    wanted = (matrix.float().double() - weight.dequantize().double()) @ mean
    assert wanted.abs().max() > 100 * unit.max()
    assert ((moved - wanted).abs() <= 1.001 * unit).all()
    tensors = [module.state_dict() for module in modules]
    assert [name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])] == ["bias"]


def test_add_to_bias_moves_what_leaves_and_stops_at_29_bits() -> None:
    case, amount = lowered(target=CHANNELS), draw(17, seed=2) * 0.3
    x, before = rows(22, 22), case.module.bias.clone()
    outputs = case.target.real(case.module(x))
    case.module.add_to_bias(amount, case.target)
    unit = Dyadic(case.module.multiplier, case.module.shift).to_float() * case.target.unit
    moved = case.target.real(case.module(x)) - outputs
    clear = (outputs - CHANNELS.center).abs() + 1 < CHANNELS.limit * torch.as_tensor(CHANNELS.unit)
    assert ((moved - amount).abs() <= unit / 2 + 1.01 * torch.as_tensor(CHANNELS.unit))[clear].all()
    assert torch.equal(case.module.bias, (before + torch.floor(amount / unit + 0.5)).int())
    case.module.add_to_bias(torch.full((17,), 1e30, dtype=torch.float64), case.target)
    assert (case.module.bias == 2**29).all()
    case.module.add_to_bias(torch.full((17,), -1e30, dtype=torch.float64), case.target)
    assert (case.module.bias == -(2**29)).all()


# Outputs


@pytest.mark.parametrize("center", [0.0, 2.5])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e5])
def test_logits_lie_on_a_power_of_two_that_no_input_leaves(size: float, center: float) -> None:
    matrix, bias, source = draw(3, 22, seed=7) * size, draw(3, seed=8) * size, Grid(2.0**-11, 16, center)
    module = empty(words((3, 22), in_bits=16, out_bits=31, output=True))
    weight = QTensor.quantize(matrix, QuantSpec.parse("int8:channel:sym"), layout="tiled")
    target = module.lower_output(weight, bias, source)
    x = torch.cat([rows(22, 16), (torch.sign(matrix) * source.limit).int(), -(torch.sign(matrix) * source.limit).int()])
    with integer_outputs():
        integers = module(x)
    floats = module(x)
    assert integers.dtype == torch.int32 and floats.dtype == torch.float32
    assert integers.abs().max() < 2**30 - 1, "nothing saturates"
    assert integers.abs().max() > 2**26, "and few bits are wasted"
    assert target == Grid(2.0 ** -module.exponent.item(), 31)
    assert torch.equal(floats, (integers.double() * float(target.unit)).float())
    case = Case(module, matrix, bias, source, target, torch.ones(22, dtype=torch.float64), center)
    with integer_outputs():
        off, allowed, inside = case.off(x)
    assert inside.all() and (off <= allowed).all()


def test_hidden_numbers_stay_integers_on_such_a_grid() -> None:
    module = empty(words((5, 22), out_bits=24))
    weight = QTensor.quantize(draw(5, 22), QuantSpec.parse("int8:channel:sym"), layout="tiled")
    target = module.lower_output(weight, None, Grid(2.0**-16, 22))
    found = module(rows(22, 22))
    assert found.dtype == torch.int32 and target.bits == 24 and "exponent" not in module.state_dict()
    wanted = rows(22, 22).double() * 2.0**-16 @ weight.dequantize().double().T
    amax = rows(22, 22).double().abs().amax(1, keepdim=True) * 2.0**-16
    bound = amax / 254 * weight.dequantize().double().abs().sum(1) * 1.001 + 2 * float(target.unit) + 0.001
    assert ((target.real(found) - wanted).abs() <= bound).all() and found.abs().max() < 2**23 - 1


# The table that an output layer shares


def tied(bias: torch.Tensor | None = None) -> tuple[Any, Any, Any]:
    """A model of a table and an output layer on it, and a layer that has these codes for itself."""
    table = QTensor.quantize(draw(19, 22, seed=7), QuantSpec.parse("int8:channel:sym"))
    shape = words((19, 22), out_bits=31, output=True)
    model = torch.nn.Module()
    model.table, model.head = torch.nn.Module(), torch.nn.Module()
    rows_description = {"type": "int_rows", "shape": [19, 22], "weights": "int8:channel:sym"}
    head = {**shape, "type": "int_tied_linear", "table": "table"}
    install(model, {"head": head, "table": rows_description}, dtype=torch.float32, device="cpu")
    own = empty(shape)
    source = Grid(2.0**-16, 22)
    bias = draw(19, seed=8) if bias is None else bias
    model.table.lower(table, 2.0**-20)
    model.head.lower_output(table, bias, source)
    own.lower_output(QTensor(_tiled(table), table.params, table.spec, table.shape, "tiled"), bias, source)
    return model, own, rows(22, 22)


def _tiled(table: QTensor) -> torch.Tensor:
    return tile(table.integers())


def test_a_tied_layer_computes_with_the_codes_of_its_table() -> None:
    model, own, x = tied()
    assert isinstance(model.head, IntTiedLinear) and isinstance(model.table, IntTableRows)
    with integer_outputs():
        assert torch.equal(model.head(x), own(x))
    assert torch.equal(model.head(x), own(x))
    assert "head.weight" not in model.state_dict() and model.head.weight is model.table.weight
    assert [name for name, _ in model.named_modules()].count("table") == 1
    before = model.head(x)
    model.table.weight.neg_()
    assert not torch.equal(model.head(x), before), "codes that change are seen"


def test_a_tied_layer_comes_back_from_its_description() -> None:
    model, _, x = tied()
    described = json.loads(json.dumps(describe(model)))
    assert described["head"]["table"] == "table" and described["head"]["type"] == "int_tied_linear"
    again = torch.nn.Module()
    again.table, again.head = torch.nn.Module(), torch.nn.Module()
    install(again, described, dtype=torch.bfloat16)
    again.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(again.head(x), model.head(x).to(torch.bfloat16))
    again.table = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="head: its table table is not a table of integer rows"):
        install(again, {"head": described["head"]}, dtype=torch.float32)


def test_a_bias_too_large_for_a_shared_table_is_refused() -> None:
    bias = draw(19, seed=8)
    bias[4] = 1e9
    with pytest.raises(InputError, match="shares the word table is too large"):
        tied(bias)


# Descriptions


@pytest.mark.parametrize("name", list(CASES))
def test_a_description_rebuilds_the_module(name: str) -> None:
    case = lowered(**CASES[name])
    module, x = case.module, rows(22, case.source.bits, case.source.unsigned)
    description = json.loads(json.dumps(module.description()))
    again = empty(description, "meta")
    assert isinstance(again, IntLinear) and isinstance(again, IntModule)
    shapes = {key: (value.shape, value.dtype) for key, value in again.state_dict().items()}
    assert shapes == {key: (value.shape, value.dtype) for key, value in module.state_dict().items()}
    assert ("in_offset" in shapes) == case.module.rescales and shapes["weight"][0] == (2, 6, 16, 4)
    again.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(again(x), module(x)) and again.description() == module.description()
    assert not any(value.is_floating_point() for value in again.state_dict().values())
