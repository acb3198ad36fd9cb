"""Quantized modules filled from random matrices, and what is needed to say what they must compute."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qtool.nn import QEmbedding, QLinear, QTiedLinear
from qtool.numerics import QTensor, QuantSpec


@dataclass(frozen=True)
class Filled:
    """A module with the matrix that it stands for, in float64, as its codes and scales say."""

    module: Any
    matrix: Any
    bias: Any


class Maker:
    """Makes filled modules; every tensor is drawn from `seed`."""

    @staticmethod
    def rows(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def linear(
        self,
        shape: tuple[int, int] = (17, 22),
        weights: str = "int8:channel:sym",
        *,
        bias: bool = True,
        act_scale: float | None = None,
        seed: int = 0,
    ) -> Filled:
        spec = QuantSpec.parse(weights)
        activations = QuantSpec.parse("int8:token:sym" if act_scale is None else "int8:tensor:sym")
        tensor = QTensor.quantize(self.rows(*shape, seed=seed), spec, layout="tiled")
        module = QLinear(shape, spec, activations, bias=bias)
        state = {"weight": tensor.codes, "weight_scale": tensor.params.scale}
        extra = {"weight_zero_point": tensor.params.zero_point, "weight_offset": tensor.params.offset}
        state |= {name: value for name, value in extra.items() if value is not None}
        offset = self.rows(shape[0], seed=seed + 1) if bias else None
        if offset is not None:
            state["bias"] = offset
        if act_scale is not None:
            state["act_scale"] = torch.tensor([act_scale])
        module.load_state_dict(state)
        return Filled(module, _matrix(tensor), 0 if offset is None else offset.double())

    def embedding(self, shape: tuple[int, int] = (12, 10), weights: str = "int8:channel:sym", seed: int = 0) -> Filled:
        spec = QuantSpec.parse(weights)
        tensor = QTensor.quantize(self.rows(*shape, seed=seed), spec, layout="rows")
        module = QEmbedding(shape, spec, padding_idx=0)
        module.load_state_dict({"weight": tensor.codes, "weight_scale": tensor.params.scale})
        return Filled(module, _matrix(tensor), 0)

    def tied(self, table: QEmbedding, bias: bool = True, seed: int = 5) -> QTiedLinear:
        module = QTiedLinear(table, "table", bias=bias)
        if bias:
            module.load_state_dict({"bias": self.rows(table.num_embeddings, seed=seed)})
        return module


def _matrix(tensor: QTensor) -> torch.Tensor:
    """What codes, scales and offsets stand for in float64, block by block."""
    (rows, columns), params = tensor.shape, tensor.params

    def spread(values: torch.Tensor) -> torch.Tensor:
        width = tensor.spec.block[1] or columns
        wide = values.double().repeat_interleave(rows // values.shape[0], 0).repeat_interleave(width, 1)
        return wide[:, :columns]

    codes = tensor.integers().double()
    if params.zero_point is not None:
        codes -= spread(params.zero_point)
    return codes * spread(params.scale) + (0 if params.offset is None else spread(params.offset))


@pytest.fixture
def make() -> Maker:
    return Maker()
