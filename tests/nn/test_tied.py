"""QTiedLinear: the output layer on the codes of an embedding."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

ULP = 2.0**-24


@pytest.mark.parametrize("weights", ["int8:channel:sym", "int16:channel:sym", "int8:tensor:sym", "int8:rows:4:sym"])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_those_of_the_table(make: Any, weights: str, bias: bool) -> None:
    filled = make.embedding(weights=weights)
    module = make.tied(filled.module, bias)
    x = make.rows(2, 3, 10, seed=3)
    found = module(x)
    offset = module.bias.double() if module.bias is not None else torch.zeros(12, dtype=torch.float64)
    exact = x.double() @ filled.matrix.T + offset
    size = x.double().abs() @ filled.matrix.abs().T + offset.abs()
    assert found.shape == (2, 3, 12) and found.dtype == torch.float32
    assert ((found.double() - exact).abs() <= size * (10 + 3) * ULP).all()


def test_the_table_is_stored_once(make: Any) -> None:
    table = make.embedding().module
    both = nn.ModuleDict({"table": table, "head": make.tied(table)})
    assert sorted(both.state_dict()) == ["head.bias", "table.weight", "table.weight_scale"]
    assert list(make.tied(table, bias=False).state_dict()) == []
    assert list(both.parameters()) == []


def test_new_codes_of_the_table_are_used(make: Any) -> None:
    table, x = make.embedding().module, make.rows(2, 10)
    head = make.tied(table, bias=False)
    before = head(x)
    table.weight.neg_()
    assert torch.equal(head(x), -before)
    table.load_state_dict(make.embedding(seed=8).module.state_dict(), assign=True)
    assert torch.equal(head(x), make.tied(make.embedding(seed=8).module, bias=False)(x))


def test_a_copied_model_shares_within_the_copy(make: Any) -> None:
    table = make.embedding().module
    both: Any = nn.ModuleDict({"head": make.tied(table), "table": table})
    x = make.rows(2, 10)
    before = both["head"](x)
    for other in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert torch.equal(other["head"](x), before)
        other["table"].weight.zero_()
        assert torch.equal(other["head"](x), other["head"].bias.expand(2, -1))
        assert torch.equal(both["head"](x), before)


def test_its_weight_is_the_tables(make: Any) -> None:
    """Some classes of transformers look at the weight of an output layer while they load."""
    table = make.embedding().module
    assert make.tied(table).weight is table.weight and "weight" not in make.tied(table).state_dict()


def test_it_says_what_it_is(make: Any) -> None:
    assert "table=table" in str(make.tied(make.embedding().module))
