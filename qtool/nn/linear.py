"""The linear layer on integer codes, with activations that are quantized too or stay in float."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from qtool import kernels
from qtool.errors import InputError
from qtool.nn.module import CodesModule
from qtool.numerics import QParams, QTensor, QuantSpec
from qtool.numerics.qtensor import column_width, stored_dtype, stored_shape


class QLinear(CodesModule):
    """`x @ W^T + b` as int8 activations × int8 weights → int32, scaled in float32.

    Buffers: `weight`, tiled codes of the logical `[out_features, in_features]` matrix; `weight_scale`, float32
    `[row blocks, column blocks]`; `bias`, `[out_features]`; `act_scale`, float32 `[1]`, for static activations only;
    for asymmetric weights `weight_zero_point`, int8, or `weight_offset`, float32 (what code 0 stands for, of specs with
    a float minimum), in the shape of the scales. With activations `float` the codes are widened while float32 inputs
    are multiplied by them. Input `[..., in_features]`, output `[..., out_features]` in `output_dtype`. Source:
    ZeroQuant (Yao et al. 2022), 3.
    """

    _scales = ("weight_scale", "act_scale", "weight_offset")
    _known_offset: tuple[Any, ...] | None = None
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor | None
    weight_offset: torch.Tensor | None
    bias: torch.Tensor | None
    act_scale: torch.Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        weights: QuantSpec,
        activations: QuantSpec | Literal["float"],
        *,
        bias: bool,
        device: str = "cpu",
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
        point = None if weights.symmetric or weights.minimum else torch.empty_like(scale, dtype=torch.int8)
        self.register_buffer("weight_zero_point", point)
        self.register_buffer("weight_offset", torch.empty_like(scale) if weights.minimum else None)
        self.register_buffer("bias", torch.empty(self.out_features, device=device) if bias else None)
        static = (
            None
            if activations == "float" or activations.dynamic
            else torch.empty(1, dtype=torch.float32, device=device)
        )
        self.register_buffer("act_scale", static)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any leading shape, any float dtype."""
        rows = x.reshape(-1, self.in_features).float()
        bias = None if self.bias is None else self.bias.float()
        scale, offset, ops = self.weight_scale, self._offset(), kernels.backend(x.device)
        if self.activations == "float":
            y = ops.code_linear(rows, self._prepared(), scale, bias, offset)
        else:
            y = ops.int8_linear(rows, self._prepared(), scale, bias, self.act_scale, offset)
        return y.view(*x.shape[:-1], self.out_features).to(self.output_dtype)

    def fill(self, tensor: QTensor) -> None:
        """Take the codes and the parameters of `tensor`, tiled, as they are."""
        self.weight, self.weight_scale = tensor.codes, tensor.params.scale
        self.weight_zero_point, self.weight_offset = tensor.params.zero_point, tensor.params.offset

    def matrix(self) -> QTensor:
        """The weight: its codes and parameters."""
        params = QParams(self.weight_scale, self.weight_zero_point, self.weight_offset)
        return QTensor(self.weight, params, self.weights, (self.out_features, self.in_features), "tiled")

    def _prepare(self, codes: torch.Tensor) -> Any:
        backend, width = kernels.backend(codes.device), column_width(self.weights, self.in_features)
        prepare = backend.prepare_codes if self.activations == "float" else backend.prepare
        return prepare(codes, (self.out_features, self.in_features), width)

    def _offset(self) -> torch.Tensor | None:
        """What code 0 stands for in each block; of integer zero points it is computed once."""
        point, scale = self.weight_zero_point, self.weight_scale
        if point is None:
            return self.weight_offset
        if point.is_inference() or scale.is_inference():  # such tensors do not count their changes
            return QParams(scale, point).offsets()
        known, versions = self._known_offset, (point._version, scale._version)
        if known is None or known[0] is not point or known[1] is not scale or known[2] != versions:
            known = self._known_offset = point, scale, versions, QParams(scale, point).offsets()
        offset: torch.Tensor = known[3]
        return offset

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
            weights, activations = (
                QuantSpec.parse(description["weights"]),
                parse_activations(description["activations"]),
            )
            return cls((rows, columns), weights, activations, bias=description["bias"], device=device)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.in_features}, {self.out_features}, weights={self.weights}, activations={self.activations}"


def parse_activations(spelling: str) -> QuantSpec | Literal["float"]:
    """The activations of a description. Raises InputError for what is no spec."""
    return "float" if spelling == "float" else QuantSpec.parse(spelling)


def _refuse_unexecuted(weights: QuantSpec, activations: QuantSpec | Literal["float"]) -> None:
    """A description may ask for other codes than the int8 product multiplies: it must not run as if it did."""
    if weights.dynamic or weights.storage not in ("nibble", "int8"):
        raise InputError(f"weights {weights} cannot run; a linear takes static int2 to int8 weights")
    if activations == "float":
        return
    token_wise = activations.dynamic and activations.block == (1, None)
    tensor_wise = not activations.dynamic and activations.block == (None, None)
    if activations.num_bits != 8 or not activations.symmetric or not (token_wise or tensor_wise):
        raise InputError(f"activations {activations} cannot run; a linear takes int8:token:sym or int8:tensor:sym")
