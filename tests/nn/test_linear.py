"""QLinear against the dequantized matrix in float64."""

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch

from qtool.errors import InputError
from qtool.nn import QLinear
from qtool.numerics import QTensor, QuantSpec

ULP = 2.0**-24
SPECS = ["int8:channel:sym", "int8:tensor:sym", "int6:channel:sym", "int8:rows:3:sym", "int8:group:4:sym"]
SPECS += ["int8:block:5x8:sym", "int8:block:*x12:sym", "int5:group:24:sym", "int4:channel:sym", "int4:group:8:sym"]
SPECS += ["int8:channel:asym", "int4:group:8:asym", "int8:rows:5:min", "int4:group:8:min", "int3:block:5x12:asym"]
SPECS += ["int4:group:20:sym", "int8:group:7:sym", "int4:group:16:min", "int8:group:10:asym", "int4:group:999:sym"]


def bound(x: torch.Tensor, matrix: torch.Tensor, bias: Any, scale: torch.Tensor) -> Any:
    """How far `x @ matrix^T + bias` may be off: half an activation step an input, and the roundings of the epilogue."""
    rounding = (scale / 2 * (1 + 2.0**-15)) * matrix.abs().sum(1)
    size = (x.abs() + scale) @ matrix.abs().T + abs(bias)
    size = size + 2 * (x.abs() + scale).sum(-1, keepdim=True) * matrix.abs().amax()  # of offsets that cancel
    return rounding + size * 30 * ULP


@pytest.mark.parametrize("weights", SPECS)
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_that_of_the_matrix_within_half_a_step(make: Any, weights: str, bias: bool) -> None:
    filled = make.linear((15, 24), weights, bias=bias)
    x = make.rows(3, 4, 24, seed=9) * 3
    found = filled.module(x)
    assert found.shape == (3, 4, 15) and found.dtype == torch.float32
    exact = x.double() @ filled.matrix.T + filled.bias
    scale = x.double().abs().amax(-1, keepdim=True) / 127
    error = (found.double() - exact).abs()
    assert (error <= bound(x.double(), filled.matrix, filled.bias, scale)).all()
    assert error.max() > 0


def test_half_a_step_is_reached(make: Any) -> None:
    """The bound is no wider than it must be: an input that lies between two codes is off by half a step."""
    module = make.linear((1, 2), bias=False).module
    module.load_state_dict({**module.state_dict(), "weight_scale": torch.full((1, 1), 1 / 127)})
    module.weight.zero_()
    module.weight[0, 0, 0, 0] = 127
    assert module(torch.tensor([[0.5, 127.0]])).item() == pytest.approx(1.0, rel=1e-6)
    assert module(torch.tensor([[0.499, 127.0]])).item() == 0.0


@pytest.mark.parametrize("weights", SPECS[:5])
def test_static_activations(make: Any, weights: str) -> None:
    x = make.rows(6, 24, seed=9)
    scale = x.abs().max().item() / 127
    filled = make.linear((15, 24), weights, act_scale=scale)
    exact = x.double() @ filled.matrix.T + filled.bias
    limit = bound(x.double(), filled.matrix, filled.bias, torch.full((6, 1), scale, dtype=torch.float64))
    assert ((filled.module(x).double() - exact).abs() <= limit).all()
    assert torch.equal(filled.module(4 * x.sign() * x.abs().max()), filled.module(x.sign() * x.abs().max()))


def test_a_token_does_not_depend_on_the_others(make: Any) -> None:
    module = make.linear((33, 66)).module
    x = make.rows(40, 66, seed=3) * torch.logspace(-3, 3, 40)[:, None]
    whole = module(x)
    assert torch.equal(torch.cat([module(row[None]) for row in x]), whole)
    assert torch.equal(module(x.view(2, 20, 66)), whole.view(2, 20, 33))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(module(x[order]), whole[order])
    assert torch.equal(module(torch.cat([x, 1e6 * torch.ones(5, 66)]))[:40], whole)


@pytest.mark.parametrize("shape", [(0, 22), (2, 0, 22), (22,), (1, 1, 1, 22)])
def test_leading_shapes(make: Any, shape: tuple[int, ...]) -> None:
    assert make.linear().module(torch.ones(shape)).shape == (*shape[:-1], 17)


def test_inputs_that_are_not_contiguous(make: Any) -> None:
    module, x = make.linear((17, 22)).module, make.rows(22, 5)
    assert torch.equal(module(x.t()), module(x.t().contiguous()))


@pytest.mark.parametrize("shape", [(16, 4), (17, 7), (1, 1), (32, 64)])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_names_and_shapes_in_a_file(make: Any, shape: tuple[int, int], static: bool, bias: bool) -> None:
    module = make.linear(shape, bias=bias, act_scale=0.1 if static else None).module
    rows, columns = shape
    wanted = {
        "weight": ((-(-rows // 16), -(-columns // 4), 16, 4), torch.int8),
        "weight_scale": ((rows, 1), torch.float32),
        **({"bias": ((rows,), torch.float32)} if bias else {}),
        **({"act_scale": ((1,), torch.float32)} if static else {}),
    }
    found = {name: (tuple(value.shape), value.dtype) for name, value in module.state_dict().items()}
    assert found == wanted
    assert found["weight"][0] != shape, "a loader without qtool must stop at this tensor"
    assert list(module.parameters()) == []


def test_one_column(make: Any) -> None:
    filled, x = make.linear((5, 1)), make.rows(4, 1, seed=2)
    exact = x.double() @ filled.matrix.T + filled.bias
    assert torch.allclose(filled.module(x).double(), exact, rtol=1e-6, atol=1e-6)


def fresh(module: QLinear, x: torch.Tensor) -> torch.Tensor:
    """The output of a new module with the same tensors: nothing of an earlier call is left in it."""
    other = QLinear(
        (module.out_features, module.in_features), module.weights, module.activations, bias=module.bias is not None
    )
    other.load_state_dict({name: value.clone() for name, value in module.state_dict().items()})
    found: torch.Tensor = other(x)
    return found


def test_codes_replaced_in_place_are_used(make: Any) -> None:
    module, x = make.linear().module, make.rows(3, 22, seed=4)
    old = module(x)
    module.weight.neg_()
    assert torch.equal(module(x), fresh(module, x)) and not torch.equal(module(x), old)
    with torch.inference_mode():
        module.weight.zero_()
        assert torch.equal(module(x), module.bias.expand(3, -1))


def test_codes_replaced_by_another_tensor_are_used(make: Any) -> None:
    module, other, x = make.linear().module, make.linear(seed=7).module, make.rows(3, 22, seed=4)
    for assign in (False, True):
        module(x)
        module.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(module(x), other(x))
    module.weight = -module.weight
    assert torch.equal(module(x), fresh(module, x))


def test_codes_at_the_address_of_earlier_ones_are_used(make: Any) -> None:
    module, x = make.linear((64, 64)).module, make.rows(3, 64, seed=4)
    for _ in range(20):
        module(x)
        address = module.weight.data_ptr()
        module.weight = module.weight[:0]  # frees the codes, so that the next ones may lie where they lay
        module.weight = torch.randint(-127, 128, (4, 16, 16, 4), dtype=torch.int8)
        assert torch.equal(module(x), fresh(module, x)), f"reused {module.weight.data_ptr() == address}"


def test_nothing_is_kept_of_codes_that_left_memory(make: Any) -> None:
    others = codes_in_memory()  # what other tests keep; held here, so that nothing else gets their identities
    module = make.linear().module
    module(make.rows(3, 22))
    own = {id(tensor) for tensor in codes_in_memory()} - {id(tensor) for tensor in others}
    held = [weakref.ref(tensor) for tensor in codes_in_memory() if id(tensor) in own]
    assert any(ref() is module.weight for ref in held)
    module.to("meta")
    gc.collect()
    assert [ref().shape for ref in held if ref() is not None] == []


def codes_in_memory() -> list[torch.Tensor]:
    return [value for value in gc.get_objects() if type(value) is torch.Tensor and value.dtype == torch.int8]


def test_copies_are_independent(make: Any) -> None:
    module, x = make.linear().module, make.rows(3, 22, seed=4)
    before = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), before)
        other.weight.neg_()
        other.weight_scale.mul_(2)
        assert torch.equal(other(x), fresh(other, x)) and not torch.equal(other(x), before)
        assert torch.equal(module(x), before)


def test_a_module_made_in_inference_mode_runs(make: Any) -> None:
    x = make.rows(3, 22, seed=4)
    with torch.inference_mode():
        module = make.linear().module
        inside = module(x)
        assert torch.equal(module(x), inside)
        module.weight.neg_()
        assert torch.equal(module(x), fresh(module, x)) and not torch.equal(module(x), inside)
    with torch.no_grad():
        assert torch.equal(module(x), fresh(module, x))


def test_gradients_are_not_asked_for(make: Any) -> None:
    module = make.linear().module
    assert not any(value.requires_grad for value in module.state_dict().values())
    assert not module(make.rows(2, 22)).requires_grad


def test_two_threads_and_one_give_the_same(make: Any) -> None:
    module, x = make.linear((130, 260)).module, make.rows(70, 260, seed=4)
    both = module(x)
    torch.set_num_threads(1)
    assert torch.equal(module(x), both)


def test_it_says_what_it_is(make: Any) -> None:
    assert "22, 17, weights=int8:channel:sym, activations=int8:token:sym" in str(make.linear().module)


def test_the_layout_is_that_of_qtensor(make: Any) -> None:
    spec = QuantSpec.parse("int8:channel:sym")
    tensor = QTensor.quantize(make.rows(17, 22), spec, layout="tiled")
    assert torch.equal(make.linear((17, 22)).module.weight, tensor.codes)


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ("int8:channel:sym", "int4:token:sym"),
        ("int8:channel:sym", "int7:tensor:sym"),
        ("int8:channel:sym", "int8:token:asym"),
        ("int8:channel:sym", "int8:tensor:asym"),
        ("int8:channel:sym", "int8:tensor:sym:dynamic"),
        ("int8:channel:sym", "int8:token:sym:static"),
        ("int8:channel:sym", "int8:group:4:sym:dynamic"),
        ("int16:channel:sym", "int8:token:sym"),
        ("int9:channel:asym", "int8:token:sym"),
        ("int8:channel:sym:dynamic", "int8:token:sym"),
    ],
)
def test_what_cannot_run_is_refused(weights: str, activations: str) -> None:
    off = activations if weights == "int8:channel:sym" else str(QuantSpec.parse(weights))
    words = str(QuantSpec.parse(off))
    with pytest.raises(InputError, match=f"{words} cannot run"):
        QLinear((16, 8), QuantSpec.parse(weights), QuantSpec.parse(activations), bias=False)
    told = {"type": "linear", "shape": [16, 8], "weights": weights, "activations": activations, "bias": False}
    with pytest.raises(InputError, match=rf"^a\.b: .*{words} cannot run"):
        QLinear.from_description(torch.nn.Module(), "a.b", told, device="meta")
