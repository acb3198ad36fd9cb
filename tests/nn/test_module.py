"""What all quantized modules share: scales that keep their type, descriptions, installation."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qtool.errors import InputError
from qtool.nn import MODULES, QEmbedding, QLinear, QModule, QTiedLinear, describe, install
from qtool.nn.module import fleeting_operands

DTYPES = [torch.float16, torch.bfloat16, torch.float64]
CASTS: list[tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = [
    (lambda module: module.half(), torch.float16),
    (lambda module: module.bfloat16(), torch.bfloat16),
    (lambda module: module.double(), torch.float64),
    (lambda module: module.to(torch.float16), torch.float16),
    (lambda module: module.to(torch.bfloat16), torch.bfloat16),
    (lambda module: module.to("cpu", torch.float64), torch.float64),
    (lambda module: module.to(torch.empty(0, dtype=torch.bfloat16)), torch.bfloat16),
]


def kinds(make: Any) -> dict[str, tuple[Any, torch.Tensor]]:
    """A filled module of each kind, with and without what is optional, and an input for it."""
    table, x, ids = make.embedding().module, make.rows(2, 3, 22), torch.tensor([[1, 2], [3, 0]])
    hidden = make.rows(2, 10)
    return {
        "linear": (make.linear().module, x),
        "linear without bias": (make.linear(bias=False).module, x),
        "static linear": (make.linear(act_scale=0.03).module, x),
        "embedding": (table, ids),
        "wide embedding": (make.embedding(weights="int16:channel:sym").module, ids),
        "tied": (make.tied(table), hidden),
        "tied without bias": (make.tied(table, bias=False), hidden),
    }


KINDS = ("linear", "linear without bias", "static linear", "embedding", "wide embedding", "tied", "tied without bias")


def scales(module: QModule) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if name.endswith("_scale")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("cast", "dtype"), CASTS, ids=("half", "bfloat16", "double", "to", "to bf16", "to cpu", "like")
)
def test_casts_change_the_output_and_leave_codes_and_scales(
    make: Any, kind: str, cast: Callable[[nn.Module], nn.Module], dtype: torch.dtype
) -> None:
    module, x = kinds(make)[kind]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    full = module(x)
    assert cast(module) is module
    found = module(x)
    assert found.dtype == dtype
    for name, value in module.state_dict().items():
        if name == "bias":
            assert value.dtype == dtype
        else:
            assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    tolerance = 0 if dtype == torch.float64 else 0.02
    assert torch.allclose(found.double(), full.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bit_exact_but_for_the_bias(make: Any, kind: str) -> None:
    module, x = kinds(make)[kind]
    full, kept = module(x), scales(module)
    module.half().float()
    assert module(x).dtype == torch.float32
    assert all(torch.equal(value, kept[name]) for name, value in scales(module).items())
    if getattr(module, "bias", None) is None:
        assert torch.equal(module(x), full)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_of_the_model_reaches_its_modules(make: Any, kind: str) -> None:
    module, x = kinds(make)[kind]
    model = nn.Sequential(module, nn.Linear(module(x).shape[-1], 2)).to(torch.bfloat16)
    assert model(x).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_other_moves_leave_the_output_type(make: Any, kind: str) -> None:
    module, x = kinds(make)[kind]
    module.half().cpu().to("cpu").share_memory().requires_grad_(False)
    assert module(x).dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_meta_and_back_to_empty(make: Any, kind: str) -> None:
    module, _ = kinds(make)[kind]
    shapes = {name: (value.shape, value.dtype) for name, value in module.state_dict().items()}
    module.half().to("meta")
    assert all(value.device.type == "meta" for value in module.state_dict().values())
    assert module.output_dtype == torch.float16
    module.float().to_empty(device="cpu")
    assert {name: (value.shape, value.dtype) for name, value in module.state_dict().items()} == shapes


@pytest.mark.parametrize("kind", ["linear", "linear without bias", "static linear", "embedding", "wide embedding"])
@pytest.mark.parametrize("default", DTYPES)
def test_descriptions_rebuild_the_module(make: Any, kind: str, default: torch.dtype) -> None:
    module, x = kinds(make)[kind]
    description = json.loads(json.dumps(module.description()))
    torch.set_default_dtype(default)  # as transformers does while it loads a model of another type
    try:
        other = MODULES[description["type"]].from_description(nn.Module(), "a.b", description, device="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert type(other) is type(module) and other.description() == module.description()
    for name, value in scales(other).items():
        assert value.dtype == torch.float32, name
    assert list(other.state_dict()) == list(module.state_dict())
    other.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(other(x), module(x))


class Model(nn.Module):
    """A table, a layer in a block, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(10, 12)
        self.table = nn.Embedding(12, 10)
        self.block = nn.ModuleList([nn.Linear(10, 22), nn.Linear(22, 17)])


def described(make: Any) -> dict[str, dict[str, Any]]:
    """In the order of the alphabet, as they are read from a config.json: the head comes before its table."""
    return {
        "block.1": make.linear().module.description(),
        "head": {"type": "tied_linear", "table": "table", "bias": True},
        "table": make.embedding().module.description(),
    }


def test_install_replaces_in_place_on_meta(make: Any) -> None:
    with torch.device("meta"):
        model = Model()
    install(model, described(make), dtype=torch.bfloat16)
    assert [type(model.get_submodule(path)) for path in described(make)] == [QLinear, QTiedLinear, QEmbedding]
    assert type(model.block[0]) is nn.Linear
    assert all(value.device.type == "meta" for value in model.state_dict().values())
    assert describe(model) == described(make)
    assert sorted(model.state_dict()) == [
        *("block.0.bias", "block.0.weight", "block.1.bias", "block.1.weight", "block.1.weight_scale"),
        *("head.bias", "table.weight", "table.weight_scale"),
    ]
    quantized = [module for module in model.modules() if isinstance(module, QModule)]
    assert [module.output_dtype for module in quantized] == [torch.bfloat16] * 3


def test_an_installed_model_is_filled_by_name(make: Any) -> None:
    with torch.device("meta"):
        model = Model()
    install(model, described(make), dtype=torch.float32)
    linear, table = make.linear().module, make.embedding().module
    head = make.tied(table)
    tensors = {"head.bias": head.bias, "block.0.weight": torch.ones(22, 10), "block.0.bias": torch.ones(22)}
    tensors |= {f"block.1.{name}": value for name, value in linear.state_dict().items()}
    tensors |= {f"table.{name}": value for name, value in table.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    x = make.rows(3, 10)
    assert torch.equal(model.head(x), head(x))
    assert torch.equal(model.block[1](make.rows(3, 22)), linear(make.rows(3, 22)))


def test_an_unknown_type_names_the_module() -> None:
    with pytest.raises(InputError, match=r"table: unknown module type 'embeding'; did you mean embedding.*newer qtool"):
        install(Model(), {"table": {"type": "embeding"}}, dtype=torch.float32)


def test_a_tied_layer_needs_a_quantized_table() -> None:
    with pytest.raises(InputError, match="head: its table table is not a quantized embedding"):
        install(Model(), {"head": {"type": "tied_linear", "table": "table", "bias": True}}, dtype=torch.float32)


def test_fleeting_operands_are_not_kept_and_change_nothing(make: Any) -> None:
    module, x = kinds(make)["linear"]
    assert isinstance(module, QLinear)
    with fleeting_operands():
        found = module(x)
        assert module._operand is None
    assert torch.equal(module(x), found) and module._operand is not None
