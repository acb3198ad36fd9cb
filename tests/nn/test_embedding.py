"""QEmbedding against the dequantized table."""

import copy
from typing import Any

import pytest
import torch

SPECS = ["int8:channel:sym", "int16:channel:sym", "int6:channel:sym", "int8:tensor:sym", "int16:rows:4:sym"]
IDS = [torch.arange(12), torch.tensor([[3, 0, 11], [11, 11, 5]]), torch.tensor(7), torch.empty(2, 0, dtype=torch.long)]


@pytest.mark.parametrize("weights", SPECS)
@pytest.mark.parametrize("ids", IDS)
def test_rows_are_those_of_the_table_rounded_once(make: Any, weights: str, ids: torch.Tensor) -> None:
    filled = make.embedding(weights=weights)
    found = filled.module(ids)
    assert found.shape == (*ids.shape, 10) and found.dtype == torch.float32
    assert torch.equal(found, filled.matrix.float()[ids])


def test_int32_ids(make: Any) -> None:
    module = make.embedding().module
    assert torch.equal(module(torch.arange(12, dtype=torch.int32)), module(torch.arange(12)))


@pytest.mark.parametrize("index", [12, -1, 10**6])
def test_ids_out_of_range(make: Any, index: int) -> None:
    with pytest.raises(IndexError):
        make.embedding().module(torch.tensor([0, index]))


@pytest.mark.parametrize(("weights", "dtype"), [("int8:channel:sym", torch.int8), ("int16:channel:sym", torch.int16)])
@pytest.mark.parametrize("shape", [(12, 10), (1, 1), (1, 8)])
def test_names_and_shapes_in_a_file(make: Any, weights: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    module = make.embedding(shape, weights).module
    found = {name: (tuple(value.shape), value.dtype) for name, value in module.state_dict().items()}
    assert found == {"weight": ((shape[0], 1, shape[1]), dtype), "weight_scale": ((shape[0], 1), torch.float32)}
    assert found["weight"][0] != shape, "a loader without qtool must stop at this tensor"
    assert list(module.parameters()) == []


def test_a_copy_is_independent(make: Any) -> None:
    module = make.embedding().module
    before, other = module(torch.arange(12)), copy.deepcopy(module)
    other.weight.neg_()
    assert torch.equal(other(torch.arange(12)), -before) and torch.equal(module(torch.arange(12)), before)


def test_it_says_what_it_is(make: Any) -> None:
    assert "12, 10, weights=int8:channel:sym" in str(make.embedding().module)
