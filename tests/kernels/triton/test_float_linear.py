"""Linear layers between float rows: of int8 activations the reference's bits; of float ones its numbers, bounded."""

import struct
from typing import Any

import pytest
import torch
from draws import Draw
from small_models import Artifacts, batch, load, outputs

from qtool import kernels
from qtool.kernels.reference import Reference
from qtool.kernels.triton import tuning
from qtool.kernels.triton.backend import Triton
from qtool.nn.linear import QLinear
from qtool.nn.plan import one_by_one
from qtool.numerics import QParams, QTensor, QuantSpec
from qtool.numerics.qtensor import tile

WEIGHTS = ["int8:channel:sym", "int8:tensor:sym", "int6:rows:4:sym", "int8:group:8:sym", "int8:block:4x12:sym"]
WEIGHTS += ["int4:channel:sym", "int4:group:264:sym", "int8:group:20:sym", "int8:group:7:sym", "int2:rows:4:asym"]
WEIGHTS += ["int8:channel:asym", "int4:group:20:asym", "int8:channel:min", "int8:block:4x20:min", "int4:group:7:min"]
CODES = ["int8:channel:sym", "int4:channel:min", "int8:tensor:asym", "int4:rows:3:min", "int4:group:20:min"]
CODES += ["int2:group:32:asym", "int8:block:3x12:min", "int4:group:7:min", "int8:group:100:sym"]
UNIT = 2.0**-24
NANS = (0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0xFFFFFFFF)
"""NaN as CPUs make it, as GPUs do, and others."""


NUMPY = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
"""What interprets kernels says of NaN."""


def number(bits: int) -> torch.Tensor:
    """The float32 of these binary digits."""
    return torch.tensor([struct.unpack("<i", struct.pack("<I", bits))[0]], dtype=torch.int32).view(torch.float32)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(count: int, inputs: int) -> torch.Tensor:
    """Rows of many sizes; the second, where there is one, is zero."""
    x = drawn(count, inputs, seed=count) * torch.logspace(-4, 4, count)[:, None]
    x[1:2] = 0
    return x


def moved(device: torch.device, *values: torch.Tensor | None) -> list[Any]:
    return [None if value is None else value.to(device) for value in values]


def bits(x: torch.Tensor) -> torch.Tensor:
    """To compare zeros with their signs."""
    return x.cpu().view(torch.int32)


def int8_linear(ops: Any, device: torch.device, codes: torch.Tensor, shape: tuple[int, int], width: int | None,
                *given: torch.Tensor | None) -> torch.Tensor:  # fmt: skip
    x, *rest = moved(device, *given)
    found: torch.Tensor = ops.int8_linear(x, ops.prepare(codes.to(device), shape, width), *rest)
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("static", [False, True])
def test_int8_has_the_bits_of_the_reference(weights: str, static: bool, device: torch.device) -> None:
    """Sizes are around those of programs, 16 × 32; zeros keep their signs."""
    inputs, spec = 528 if "264" in weights else 40, QuantSpec.parse(weights)
    if "12" in weights or "20" in weights:
        inputs = 44
    for outputs_, count in ((36, 17), (4, 1), (4, 0)):
        shape = outputs_, inputs
        stored = QTensor.quantize(drawn(*shape) + 0.1, spec, layout="tiled")
        act, offset = torch.tensor([0.02]) if static else None, stored.params.offsets()
        for bias in (drawn(outputs_, seed=2), None):
            given = stored.codes, shape, spec.block[1], rows_of(count, inputs), stored.params.scale, bias, act, offset
            found = int8_linear(Triton(), device, *given)
            wanted = int8_linear(Reference(), torch.device("cpu"), *given)
            assert found.shape == (count, outputs_) and torch.equal(bits(found), bits(wanted))


def test_int8_blocks_of_many_steps(device: torch.device) -> None:
    """Longer than a program takes at a time, and not a multiple of it; terms of -0, which a sum of them keeps."""
    for width in (100, 260, None):
        shape = 33, 260
        codes = Draw(3).codes(*shape)
        blocks = 1 if width is None else -(-260 // width)
        scale = drawn(33, blocks).abs()
        scale[:9] = 0
        for offset in (None, drawn(33, blocks, seed=1)):
            given = tile(codes), shape, width, rows_of(5, 260), scale, None, None, offset
            wanted = int8_linear(Reference(), torch.device("cpu"), *given)
            assert torch.equal(bits(int8_linear(Triton(), device, *given)), bits(wanted))
            assert offset is not None or (bits(wanted[:, :9]) == -(1 << 31)).any()


@pytest.mark.parametrize("inputs", [4, 17, 100])
def test_the_smallest_code_of_asymmetric_weights(inputs: int, device: torch.device) -> None:
    codes = torch.full((33, inputs), -128, dtype=torch.int8)
    codes[1::3] = torch.tensor([-128, 127], dtype=torch.int8).repeat(inputs)[:inputs]
    x = torch.stack([torch.full((inputs,), value) for value in (-1.0, 1.0, 0.5, 0.0)])
    scale, offset = torch.full((33, 1), 0.01), torch.full((33, 1), 0.3)
    found = int8_linear(Triton(), device, tile(codes), (33, inputs), None, x, scale, None, None, offset).cpu()
    wanted = x.double() @ (codes.double() * scale.double() + offset.double()).T
    assert (found.double() - wanted).abs().max() < 0.01 * inputs
    x = drawn(5, inputs)
    operand = Triton().prepare_codes(tile(codes).to(device), (33, inputs), inputs)
    found = Triton().code_linear(*moved(device, x), operand, *moved(device, torch.ones(33, 1), None, None)).cpu()
    wanted = x.double() @ codes.double().T
    assert (found.double() - wanted).abs().max() <= (inputs + 4) * UNIT * float(x.abs().sum(1).max()) * 128


def test_tiny_rows(device: torch.device) -> None:
    """The largest value over 127 may be no normal number: the scale is the smallest of these."""
    x = torch.tensor([[2.0**-149] * 4, [2.0**-126, 0, -(2.0**-127), 2.0**-133], [127 * 2.0**-126, 1e-38, 0, 0]])
    given = tile(Draw(0).codes(5, 4)), (5, 4), None, x, torch.full((5, 1), 2.0**100), None, None
    wanted = int8_linear(Reference(), torch.device("cpu"), *given)
    assert wanted[1:].abs().min() > 0
    assert torch.equal(bits(int8_linear(Triton(), device, *given)), bits(wanted))


@NUMPY
@pytest.mark.parametrize("value", [*NANS, 0x7F800000, 0xFF800000])
@pytest.mark.parametrize("static", [False, True])
def test_damage_of_int8_rows_stays_visible(value: int, static: bool, device: torch.device) -> None:
    stored = QTensor.quantize(drawn(20, 40), QuantSpec.parse("int8:group:20:min"), layout="tiled")
    x = drawn(3, 40)
    x[1, 39:] = number(value)
    params, act = stored.params, torch.tensor([0.02]) if static else None
    y = int8_linear(Triton(), device, stored.codes, (20, 40), 20, x, params.scale, None, act, params.offsets())
    assert not y[1].isfinite().any()
    assert y[0].isfinite().all() and y[2].isfinite().all()


@NUMPY
@pytest.mark.parametrize("value", [*NANS, 0x7F800000, 0xFF800000])
def test_damage_of_float_rows_stays_visible(value: int, device: torch.device) -> None:
    """Also where one number of TF32 does not hold it."""
    for spelling in ("int8:channel:sym", "int4:group:16:min"):
        stored = QTensor.quantize(drawn(20, 40), QuantSpec.parse(spelling), layout="tiled")
        for count in (2, 5):
            x = drawn(count, 40)
            x[1, 39:] = number(value)
            y = code_linear(device, stored, x, None)
            assert not y[1].isfinite().any() and y[0].isfinite().all() and y[2:].isfinite().all()


def code_linear(device: torch.device, stored: QTensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    width = min(stored.spec.block[1] or stored.shape[1], stored.shape[1])
    operand = Triton().prepare_codes(stored.codes.to(device), stored.shape, width)
    given = moved(device, stored.params.scale, bias, stored.params.offsets())
    return Triton().code_linear(x.to(device), operand, *given).cpu()


def spread(values: torch.Tensor, shape: tuple[int, int], width: int) -> torch.Tensor:
    wide = values.double().repeat_interleave(shape[0] // values.shape[0], 0).repeat_interleave(width, 1)
    return wide[:, : shape[1]]


@pytest.mark.parametrize("spelling", CODES)
def test_codes_within_the_rounding_of_float32_sums(spelling: str, device: torch.device) -> None:
    """As `test_code_linear` has it for other backends: n products, n + 4 units of the sizes of their terms.

    Eight on a GPU, whose tensor cores cut off digits of sums that others round.
    """
    spec = QuantSpec.parse(spelling)
    slack = 4 if device.type == "cpu" else 8
    for inputs in (1, 5, 130):
        shape = (33 if spec.block[0] == 3 else 35, inputs)
        width = min(spec.block[1] or inputs, inputs)
        stored = QTensor.quantize(drawn(*shape, seed=inputs) + 0.3, spec, layout="tiled")
        codes = stored.integers().double() * spread(stored.params.scale, shape, width)
        offset = stored.params.offsets()
        zeros = torch.zeros(shape, dtype=torch.float64) if offset is None else spread(offset, shape, width)
        for count in (0, 1, 3, 17):
            x, bias = rows_of(count, inputs), drawn(shape[0], seed=1) if count != 3 else None
            found = code_linear(device, stored, x, bias)
            assert found.shape == (count, shape[0]) and found.dtype == torch.float32
            addend = torch.zeros(shape[0]) if bias is None else bias
            exact = x.double() @ (codes + zeros).T + addend.double()
            size = x.double().abs() @ (codes.abs() + zeros.abs()).T + addend.double().abs()
            assert ((found.double() - exact).abs() <= (inputs + slack) * UNIT * 1.01 * size).all(), (inputs, count)


@pytest.mark.parametrize("width", [18, 31])
def test_sums_are_exact_where_float32_holds_them(width: int, device: torch.device) -> None:
    """Small whole numbers leave nothing to round: a code that is lost or doubled would show.

    Blocks of 31 columns reach into one tile more than 31 columns fill.
    """
    draw = torch.Generator().manual_seed(0)
    for size, low, high in ((8, -128, 127), (4, -8, 7)):
        spec = QuantSpec(size, symmetric=False, block=(1, width), minimum=True)
        for inputs in (1, 18, 19, 77):
            shape = 37, inputs
            blocks = spec.scale_shape(shape)
            codes = torch.randint(low, high + 1, shape, generator=draw)
            offset = torch.randint(-3, 4, blocks, generator=draw).float()
            stored = QTensor.store(codes, QParams(torch.ones(blocks), offset=offset), spec, "tiled")
            for count in (1, 2, 5):
                x = torch.randint(-9, 10, (count, inputs), generator=draw).float()
                wanted = x.double() @ (codes + spread(offset, shape, width)).T
                assert torch.equal(code_linear(device, stored, x, None).double(), wanted)


def test_codes_are_read_where_they_are_stored(device: torch.device) -> None:
    for spelling in ("int8:channel:sym", "int4:channel:sym"):
        stored = QTensor.quantize(drawn(20, 40), QuantSpec.parse(spelling), layout="tiled").codes.to(device)
        assert Triton().prepare_codes(stored, (20, 40), 40).words.data_ptr() == stored.data_ptr()


def test_a_changed_scale_is_noticed(device: torch.device) -> None:
    stored = QTensor.quantize(drawn(20, 40), QuantSpec.parse("int8:channel:sym"), layout="tiled")
    codes, scale, x = moved(device, stored.codes, stored.params.scale, drawn(3, 40))
    ops = Triton()
    whole, tiles = ops.prepare(codes, (20, 40)), ops.prepare_codes(codes, (20, 40), 40)
    before = ops.int8_linear(x, whole, scale, None, None), ops.code_linear(x, tiles, scale, None)
    scale *= 2
    assert torch.equal(ops.int8_linear(x, whole, scale, None, None), 2 * before[0])
    assert torch.equal(ops.code_linear(x, tiles, scale, None), 2 * before[1])


@pytest.mark.parametrize("processors", [1, 132])
def test_every_step_belongs_to_one_split(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shape: the splits, none of them empty, take all steps."""
    monkeypatch.setattr(tuning, "machine", lambda: (9, processors))
    for rows in (1, 2, 3, 4, 5, 64, 4096):
        for outputs_ in (1, 65, 768, 32000):
            for words, blocks in ((1, 1), (1024, 1), (32, 32), (2, 64), (250, 3)):
                cut = tuning.codes_of(rows, outputs_, words, blocks)
                assert (cut.splits - 1) * cut.per < blocks * cut.chunks <= cut.splits * cut.per
                assert (cut.chunks - 1) * cut.words < words <= cut.chunks * cut.words
                assert cut.m == rows or rows > tuning.FEW_ROWS


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.mktemp("models"), "gpu-float")


def seen(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, ...]]]:
    """What a model says on the kernels, module by module, and what goes in and out of each linear layer."""
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    layers = {path: module for path, module in model.named_modules() if isinstance(module, QLinear)}
    for path, module in layers.items():
        module.register_forward_hook(lambda _, given, result, path=path: found.update({path: (given[0], result)}))
    with kernels.using("triton"), one_by_one():
        said = outputs(model, inputs)
    assert found.keys() == layers.keys() and len(found) > 6
    return said, found


@torch.no_grad()
def test_int8_layers_of_a_model(artifacts: Artifacts, device: torch.device) -> None:
    """Each layer gives the bits of the reference on the CPU, and so does the model where no other float differs."""
    folder = artifacts.make("BertForSequenceClassification", ("zeroquant",))
    exact, inputs = load(folder), batch()
    said, found = seen(load(folder).to(device), {name: value.to(device) for name, value in inputs.items()})
    with kernels.using("reference"), one_by_one():
        for path, (given, result) in found.items():
            assert torch.equal(bits(exact.get_submodule(path)(given.cpu())), bits(result)), path
        if device.type == "cpu":
            assert torch.equal(said, outputs(exact, inputs))
    assert said.std() > 0


@torch.no_grad()
def test_float_layers_of_a_model(artifacts: Artifacts, device: torch.device) -> None:
    """Each layer, and the model, is close to the reference."""
    folder = artifacts.make("LlamaForCausalLM", ("zeroquant",), "weights=int4:group:16:min", "activations=float")
    exact, inputs = load(folder), batch()
    said, found = seen(load(folder).to(device), {name: value.to(device) for name, value in inputs.items()})
    with kernels.using("reference"), one_by_one():
        for path, (given, result) in found.items():
            wanted = exact.get_submodule(path)(given.cpu())
            assert (result.cpu() - wanted).norm() <= 1e-6 * wanted.norm(), path
        wanted = outputs(exact, inputs)
    assert wanted.norm() > 0 and (said.cpu() - wanted).norm() <= 1e-5 * wanted.norm()
