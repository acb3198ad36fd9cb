"""Linear layers with float scales: INT8 products with the reference's bits, float rows by codes within rounding."""

from pathlib import Path

import pytest
import torch
from small_models import Artifacts, batch, load, outputs

from qtool import kernels
from qtool.kernels.reference import Reference
from qtool.kernels.triton.backend import Triton
from qtool.nn.plan import one_by_one
from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.qtensor import column_width, tile

WEIGHTS = ["int8:channel:sym", "int8:tensor:sym", "int8:group:8:sym", "int8:block:4x12:sym", "int8:group:7:sym"]
WEIGHTS += ["int4:channel:sym", "int4:group:40:sym", "int2:rows:4:asym", "int4:group:20:asym", "int8:channel:min"]
WEIGHTS += ["int4:group:8:min", "int8:block:4x20:min"]
ULP = 2.0**-23


def operands(weights: str, outputs_: int, inputs: int, seed: int = 0) -> tuple[QTensor, torch.Generator]:
    draw = torch.Generator().manual_seed(seed)
    spec = QuantSpec.parse(weights)
    return QTensor.quantize(torch.randn(outputs_, inputs, generator=draw), spec, layout="tiled"), draw


def rows_of(rows: int, inputs: int, draw: torch.Generator) -> torch.Tensor:
    x = torch.randn(rows, inputs, generator=draw) * torch.logspace(-4, 4, max(rows, 1))[:rows, None]
    x[1:2] = 0
    return x


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("static", [False, True])
def test_int8_linear_has_the_bits_of_the_reference(weights: str, static: bool, device: torch.device) -> None:
    act = torch.tensor([0.02]) if static else None
    for outputs_, rows in ((20, 1), (36, 17), (4, 0)):
        stored, draw = operands(weights, outputs_, 80 if "40" in weights else 24)
        x, bias = rows_of(rows, stored.shape[1], draw), torch.randn(outputs_, generator=draw)
        width, offsets = column_width(stored.spec, stored.shape[1]), stored.params.offsets()
        exact = Reference().prepare(stored.codes, stored.shape, width)
        mine = Triton().prepare(stored.codes.to(device), stored.shape, width)
        for given in (bias, None):
            rest = stored.params.scale, given, act, offsets
            found = Triton().int8_linear(x.to(device), mine, *(None if t is None else t.to(device) for t in rest))
            wanted = Reference().int8_linear(x, exact, *rest)
            assert torch.equal(found.cpu(), wanted)


def test_the_smallest_code_of_asymmetric_weights(device: torch.device) -> None:
    codes = torch.full((33, 40), -128, dtype=torch.int8)
    codes[1::3] = 127
    x = torch.stack([torch.full((40,), value) for value in (-1.0, 1.0, 0.5, 0.0)])
    scale, offset = torch.full((33, 1), 0.01), torch.full((33, 1), 0.3)
    exact, mine = (ops.prepare(tile(codes).to(at), (33, 40)) for ops, at in ((Reference(), "cpu"), (Triton(), device)))
    found = Triton().int8_linear(x.to(device), mine, scale.to(device), None, None, offset.to(device))
    assert torch.equal(found.cpu(), Reference().int8_linear(x, exact, scale, None, None, offset))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, which interprets
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("static", [False, True])
def test_damage_stays_visible(value: float, static: bool, device: torch.device) -> None:
    stored, draw = operands("int8:channel:sym", 20, 40)
    x = torch.randn(3, 40, generator=draw)
    x[1, 39] = value
    operand = Triton().prepare(stored.codes.to(device), (20, 40))
    act = torch.tensor([0.02], device=device) if static else None
    y = Triton().int8_linear(x.to(device), operand, stored.params.scale.to(device), None, act)
    assert not y[1].isfinite().any()
    assert y[0].isfinite().all() and y[2].isfinite().all()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5, 18])
def test_code_linear_is_within_the_rounding_of_float32(weights: str, rows: int, device: torch.device) -> None:
    inputs = 300 if weights in ("int4:channel:sym", "int8:group:8:sym", "int4:group:20:asym") else 80
    if "12" in weights or "8:" in weights.partition(":")[2]:
        inputs = 312 if inputs == 300 else 80
    stored, draw = operands(weights, 36, inputs)
    x, bias = rows_of(rows, inputs, draw), torch.randn(36, generator=draw)
    width, offsets = column_width(stored.spec, inputs), stored.params.offsets()
    operand = Triton().prepare_codes(stored.codes.to(device), stored.shape, width)
    given = (stored.params.scale, bias, offsets)
    found = Triton().code_linear(x.to(device), operand, *(None if t is None else t.to(device) for t in given))
    exact = stored.dequantize().double()
    wanted = x.double() @ exact.T + bias.double()
    # Codes and offsets apart, because they may cancel.
    size = x.abs().double() @ (exact.abs() + (0 if offsets is None else 2 * exact.abs().amax(1, keepdim=True))).T
    assert found.dtype == torch.float32 and found.shape == (rows, 36)
    assert ((found.cpu().double() - wanted).abs() <= (size + bias.abs()) * (inputs + 8) * ULP).all()


def test_a_split_of_many_tiles_adds_up(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of one row in several stretches, of which the last is shorter."""
    from qtool.kernels.triton import tuning

    stored, draw = operands("int4:group:32:sym", 32, 328)
    x = torch.randn(1, 328, generator=draw).to(device)
    operand = Triton().prepare_codes(stored.codes.to(device), stored.shape, 32)
    scale = stored.params.scale.to(device)
    results = []
    for pieces in (1, 2, 5):
        monkeypatch.setattr(tuning, "pieces", lambda *given, count=pieces: count)
        results.append(Triton().code_linear(x, operand, scale, None))
        assert torch.equal(Triton().code_linear(x, operand, scale, None), results[-1])
    assert all(torch.allclose(found, results[0], rtol=1e-5, atol=1e-5) for found in results)


@pytest.mark.parametrize(
    ("architecture", "recipe", "exact"),
    [
        ("BertForSequenceClassification", (), True),
        ("LlamaForCausalLM", ("weights=int4:group:16:min", "activations=float"), False),
    ],
)
def test_models(tmp_path: Path, architecture: str, recipe: tuple[str, ...], exact: bool, device: torch.device) -> None:
    folder = Artifacts(tmp_path, "float").make(architecture, ("zeroquant",), *recipe)
    inputs = batch()
    with kernels.using("reference"):
        wanted = outputs(load(folder), inputs)
    model = load(folder).to(device)
    with one_by_one(), kernels.using("triton"):
        found = outputs(model, {name: value.to(device) for name, value in inputs.items()}).cpu()
    if exact and device.type == "cpu":  # on a GPU what stays float is rounded in another order
        assert torch.equal(found, wanted)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)
