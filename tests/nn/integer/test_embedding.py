"""Integer tables and embeddings against float64: rows, their sum, positions, and LayerNorm behind it."""

import json
from typing import Any

import pytest
import torch
from torch.nn.functional import layer_norm

from qtool.nn import MODULES
from qtool.nn.integer.embedding import IntEmbeddings, IntTableRows
from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.grid import Grid

SPECS = ["int8:channel:sym", "int16:channel:sym", "int5:channel:sym", "int8:tensor:sym", "int16:tensor:sym"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(table: QTensor) -> torch.Tensor:
    """What codes and scales stand for, float64."""
    scale = table.params.scale.double()
    return table.integers().double() * scale.repeat_interleave(table.shape[0] // scale.shape[0], 0)


def filled(matrix: torch.Tensor, spec: str, unit: float) -> tuple[IntTableRows, torch.Tensor]:
    rows, columns = matrix.shape
    table = QTensor.quantize(matrix, QuantSpec.parse(spec))
    module = IntTableRows((rows, columns), table.spec, device="cpu")
    module.lower(table, unit)
    return module, values(table)


@pytest.mark.parametrize("unit", [2.0**-20, 1e-4, 3.7])
@pytest.mark.parametrize("spec", SPECS)
def test_a_row_is_that_of_the_table_within_half_a_unit(spec: str, unit: float) -> None:
    matrix = draw(12, 10) * torch.logspace(-3, 2, 12)[:, None]
    matrix[4] = 0
    module, wanted = filled(matrix, spec, unit)
    ids = torch.tensor([[0, 11, 4], [5, 5, 7]])
    found = module(ids)
    assert found.shape == (2, 3, 10) and not found.is_floating_point()
    off = (found.double() * unit - wanted[ids]).abs()
    assert (off <= unit / 2 + wanted[ids].abs() * 2.0**-31).all()
    assert (found[0, 2] == 0).all() and off.max() > unit / 10


@pytest.mark.parametrize("index", [12, -1])
def test_ids_out_of_range_are_an_error(index: int) -> None:
    module, _ = filled(draw(12, 10), "int8:channel:sym", 1e-3)
    with pytest.raises(IndexError):
        module(torch.tensor([0, index]))


def test_a_table_comes_back_from_its_description() -> None:
    module, _ = filled(draw(12, 10), "int16:channel:sym", 1e-3)
    description = json.loads(json.dumps(module.description()))
    assert description == {"type": "int_rows", "shape": [12, 10], "weights": "int16:channel:sym"}
    again: Any = MODULES["int_rows"].from_description(torch.nn.Module(), "x", description, device="meta")
    assert again.weight.shape == (12, 1, 10) and again.weight.dtype == torch.int16
    again.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(again(torch.arange(12)), module(torch.arange(12)))


UNIT, TARGET = 2.0**-18, Grid(2.0**-15, 22)
TABLES = {"word": (20, 1), "position": (9, 2), "token_type": (2, 3)}


def embeddings(padding_idx: int | None = None, without: tuple[str, ...] = ()) -> tuple[Any, dict[str, torch.Tensor]]:
    """Filled embeddings of 8 columns, and their tables in float64."""
    kept = {name: entry for name, entry in TABLES.items() if name not in without}
    parts: dict[str, Any] = {
        name: {"path": f"tables.{name}", "type": "int_rows", "shape": [rows, 8], "weights": "int16:channel:sym"}
        for name, (rows, _) in kept.items()
    }
    parts["norm"] = {"path": "LayerNorm", "type": "int_norm", "size": 8, "in_bits": 24, "out_bits": 22}
    description = {"type": "int_embeddings", "parts": parts, "padding_idx": padding_idx}
    module: Any = IntEmbeddings.from_description(torch.nn.Module(), "embeddings", description, device="cpu")
    found = {}
    for name, (rows, seed) in kept.items():
        table = QTensor.quantize(draw(rows, 8, seed=seed), QuantSpec.parse("int16:channel:sym"))
        module.part(name).lower(table, UNIT)
        found[name] = values(table)
    module.part("norm").lower(draw(8, seed=4), draw(8, seed=5), 1e-12, Grid(UNIT, 24), TARGET)
    module.exponents.fill_(15)
    return module, found


def expected(tables: dict[str, torch.Tensor], **ids: torch.Tensor) -> torch.Tensor:
    total = sum(tables[name][index] for name, index in ids.items())
    assert isinstance(total, torch.Tensor)
    return layer_norm(total, (8,), draw(8, seed=4).double(), draw(8, seed=5).double(), 1e-12)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Half a unit a table on sums of about 1, half one of beta and of what leaves, and the norm's own error."""
    return bool(((found.double() * TARGET.unit - wanted).abs() <= 1.5 * TARGET.unit + 12 * UNIT).all())


IDS = torch.tensor([[3, 19, 0, 7], [1, 1, 2, 0]])


def test_the_sum_of_three_tables_and_layer_norm() -> None:
    module, tables = embeddings()
    types = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]])
    positions = torch.tensor([[8, 0, 3, 3], [1, 2, 3, 4]])
    found = module(IDS, types, positions)
    assert found.dtype == torch.int32 and found.shape == (2, 4, 8)
    assert close(found, expected(tables, word=IDS, token_type=types, position=positions))
    for other in (module(IDS, types), module(IDS, None, positions), module(IDS.flip(0), types, positions)):
        assert not torch.equal(other, found)


def test_types_are_0_and_positions_are_counted_unless_they_are_given() -> None:
    module, tables = embeddings()
    zeros, counted = torch.zeros_like(IDS), torch.arange(4).expand(2, 4)
    assert close(module(IDS), expected(tables, word=IDS, token_type=zeros, position=counted))
    assert torch.equal(module(IDS), module(IDS, zeros, counted))


@pytest.mark.parametrize("without", [("token_type",), ("position",), ("position", "token_type")])
def test_tables_that_a_model_has_not_are_left_out(without: tuple[str, ...]) -> None:
    module, tables = embeddings(without=without)
    ids = {"word": IDS, "position": torch.arange(4).expand(2, 4), "token_type": torch.zeros_like(IDS)}
    found = module(IDS, torch.ones_like(IDS), None)
    ids["token_type"] = torch.ones_like(IDS)
    assert close(found, expected(tables, **{name: value for name, value in ids.items() if name not in without}))


@pytest.mark.parametrize("padding", [0, 1])
def test_positions_behind_the_padding_are_counted_over_real_tokens(padding: int) -> None:
    module, tables = embeddings(padding_idx=padding)
    ids = torch.tensor([[5, padding, 6, 7], [padding, padding, 9, padding]])
    positions = torch.tensor([[1, 0, 2, 3], [0, 0, 1, 0]]) + padding
    found = module(ids)
    assert close(found, expected(tables, word=ids, token_type=torch.zeros_like(ids), position=positions))
    assert torch.equal(found, module(ids, None, positions))


def test_a_position_that_the_table_has_not_is_an_error() -> None:
    module, _ = embeddings()
    assert module(torch.ones(1, 9, dtype=torch.long)).shape == (1, 9, 8)
    with pytest.raises(IndexError):
        module(torch.ones(1, 10, dtype=torch.long))


@pytest.mark.parametrize("padding", [None, 1])
def test_embeddings_come_back_from_their_description(padding: int | None) -> None:
    module, _ = embeddings(padding, without=("token_type",))
    description = json.loads(json.dumps(module.description()))
    assert description["padding_idx"] == padding and set(description["parts"]) == {"word", "position", "norm"}
    again: Any = MODULES["int_embeddings"].from_description(torch.nn.Module(), "x", description, device="meta")
    assert set(again.state_dict()) == set(module.state_dict()) >= {"tables.word.weight", "LayerNorm.eps", "exponents"}
    again.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(again(IDS), module(IDS)) and again.description() == module.description()


def test_the_anchor_follows_types_and_nothing_reads_it() -> None:
    module, _ = embeddings()
    wanted = module(IDS)
    assert [name for name, _ in module.named_parameters()] == ["anchor"] and not module.anchor.requires_grad
    module.half()
    assert module.anchor.dtype == torch.float16 and module.exponents.dtype == torch.int32
    with torch.no_grad():
        module.anchor.fill_(float("nan"))
    assert torch.equal(module(IDS), wanted)
