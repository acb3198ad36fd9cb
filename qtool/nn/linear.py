"""The linear layer on integer codes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.errors import InputError
from qtool.nn.module import CodesModule
from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.qtensor import QParams, stored_dtype, stored_shape


class QLinear(CodesModule):
    """`x @ W^T + b` as int8 activations × int8 weights → int32, scaled in float32.

    Buffers: `weight`, tiled codes of the logical `[out_features, in_features]` matrix; `weight_scale`, float32
    `[row blocks, column blocks]`; `bias`, `[out_features]`; `act_scale`, float32 `[1]`, for static activations only.
    Input `[..., in_features]`, output `[..., out_features]` in `output_dtype`. Source: ZeroQuant (Yao et al. 2022), 3.
    """

    _scales = ("weight_scale", "act_scale")
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    act_scale: torch.Tensor | None

    def __init__(
        self, shape: tuple[int, int], weights: QuantSpec, activations: QuantSpec, *, bias: bool, device: str = "cpu"
    ) -> None:
        """Raises InputError for specs that this product does not execute."""
        super().__init__()
        _refuse_unexecuted(weights, activations)
        self.out_features, self.in_features = shape
        self.weights, self.activations = weights, activations
        tiled = torch.empty(stored_shape(weights, shape, "tiled"), dtype=stored_dtype(weights), device=device)
        self.register_buffer("weight", tiled)
        # Said explicitly: while transformers loads a model in bfloat16, that is what torch makes by default.
        scale = torch.empty(weights.scale_shape(shape), dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", torch.empty(self.out_features, device=device) if bias else None)
        static = None if activations.dynamic else torch.empty(1, dtype=torch.float32, device=device)
        self.register_buffer("act_scale", static)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any leading shape, any float dtype."""
        rows = x.reshape(-1, self.in_features).float()
        bias = None if self.bias is None else self.bias.float()
        y = kernels.backend().int8_linear(rows, self._prepared(), self.weight_scale, bias, self.act_scale)
        return y.view(*x.shape[:-1], self.out_features).to(self.output_dtype)

    def matrix(self) -> QTensor:
        """The weight with its scales."""
        shape = (self.out_features, self.in_features)
        return QTensor(self.weight, QParams(self.weight_scale), self.weights, shape, "tiled")

    def _prepare(self, codes: torch.Tensor) -> Any:
        blocks = self.weights.scale_shape((self.out_features, self.in_features))[1]
        return kernels.backend().prepare(codes, (self.out_features, self.in_features), blocks)

    def description(self) -> dict[str, Any]:
        """Shape and specs."""
        return {
            "type": "linear",
            "shape": [self.out_features, self.in_features],
            "weights": str(self.weights),
            "activations": str(self.activations),
            "bias": self.bias is not None,
        }

    @classmethod
    def from_description(cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str) -> "QLinear":
        """See `QModule`."""
        rows, columns = description["shape"]
        try:
            specs = (QuantSpec.parse(description[key]) for key in ("weights", "activations"))
            return cls((rows, columns), *specs, bias=description["bias"], device=device)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.in_features}, {self.out_features}, weights={self.weights}, activations={self.activations}"


def _refuse_unexecuted(weights: QuantSpec, activations: QuantSpec) -> None:
    """A description may ask for other codes than the int8 product multiplies: it must not run as if it did."""
    if weights.dynamic or not weights.symmetric or weights.storage not in ("nibble", "int8"):
        raise InputError(f"weights {weights} cannot run; a linear takes static symmetric int2 to int8 weights")
    token_wise = activations.dynamic and activations.block == (1, None)
    tensor_wise = not activations.dynamic and activations.block == (None, None)
    if activations.num_bits != 8 or not activations.symmetric or not (token_wise or tensor_wise):
        raise InputError(f"activations {activations} cannot run; a linear takes int8:token:sym or int8:tensor:sym")
