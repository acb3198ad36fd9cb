"""Linear layers on integers: INT8 codes of a row, INT8 weights, int32 out on a fixed grid."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.errors import InputError
from qtool.nn.integer.module import Bound, IntModule, leave
from qtool.nn.module import CodesModule
from qtool.numerics import Dyadic, QParams, QTensor, QuantSpec
from qtool.numerics.grid import Grid
from qtool.numerics.qtensor import rows_of, stored_dtype, stored_shape

_ACCUMULATOR = (1 << 31) - 1
_ALIGNED_BITS = 30
_BIAS_LIMIT = 1 << 29

Codes = tuple[torch.Tensor, torch.Tensor | None]


class IntLinear(CodesModule, IntModule):
    """`W·x + b` from one grid to another (math.md, 2 and 3). int32 `[..., in]` → int32 `[..., out]` of `out_bits`.

    Buffers: `weight`, tiled int8; `bias`, int32 on the accumulator's grid; `multiplier` and `shift`, int32 `[out]`,
    from there to the target; `align`, int32 `[1]`. With `rescales`, `in_multiplier`, `in_shift` and `in_offset` `[in]`
    rescale the input and move it first: smoothing and centering, or static activations. With `output` the module
    returns floats: its integers are in units of 2^-`exponent`, int32 `[1]`.
    """

    bias: torch.Tensor
    align: torch.Tensor
    exponent: torch.Tensor
    multiplier: torch.Tensor
    shift: torch.Tensor
    in_multiplier: torch.Tensor
    in_shift: torch.Tensor

    def __init__(self, description: Mapping[str, Any], *, device: str) -> None:
        super().__init__()
        self.words = {key: value for key, value in description.items() if key not in ("path", "type")}
        self.out_features, self.in_features = self.words["shape"]
        self.weights = QuantSpec.parse(self.words["weights"])
        self.in_bits, self.out_bits = self.words["in_bits"], self.words["out_bits"]
        self.unsigned, self.output = self.words["unsigned"], self.words["output"]
        self.rescales: bool = self.words["rescales"]
        self.dynamic = QuantSpec.parse(self.words["activations"]).dynamic
        codes = torch.empty(
            stored_shape(self.weights, (self.out_features, self.in_features), "tiled"),
            dtype=stored_dtype(self.weights),
            device=device,
        )
        self.register_buffer("weight", codes)
        self.register_buffer("bias", torch.empty(self.out_features, dtype=torch.int32, device=device))
        self.rescale_buffers("", (self.out_features,), device)
        if self.rescales:
            self.rescale_buffers("in_", (self.in_features,), device)
            self.register_buffer("in_offset", torch.empty(self.in_features, dtype=torch.int32, device=device))
        for name in ("align", *["exponent"] * self.output):
            self.register_buffer(name, torch.empty(1, dtype=torch.int32, device=device))

    def lower(
        self,
        weight: QTensor,
        bias: torch.Tensor | None,
        source: Grid,
        target: Grid,
        *,
        smooth: torch.Tensor | None = None,
        middle: torch.Tensor | None = None,
        act_scale: float | None = None,
        exact: torch.Tensor | None = None,
        mean: torch.Tensor | None = None,
    ) -> None:
        """Fill the buffers. `weight` holds the codes of `W · smooth`, `bias` is float `[out]`.

        The product reads `(x - middle) / smooth`: this module moves and divides where it `rescales`, else whoever made
        `x` did already.
        `act_scale` is the step of static activations, after smoothing. With the `exact` float weights and the `mean` of
        every input, `[in]`, the bias takes out what rounding the weights adds to the mean of every output. Raises
        InputError for ranges that do not fit.
        """
        division = torch.ones(self.in_features, dtype=torch.float64) if smooth is None else smooth.double()
        inner = float(source.unit) / (division.min().item() if self.rescales else 1.0)
        if act_scale is not None:
            step = inner = act_scale
        else:
            step = inner / (254 if self.unsigned else 127)
        if self.rescales:
            self.fill_rescale("in_", float(source.unit) / (division * inner))
            moved = torch.zeros_like(division) if middle is None else middle / (division * inner)
            self.in_offset = torch.floor(moved + 0.5).int()
            missing = self.in_offset * (division * inner) + source.center
        else:
            missing = torch.as_tensor(source.center if middle is None else middle, dtype=torch.float64)
        align = self._alignment(weight)
        unit = step * 2.0**align
        wanted = torch.zeros(self.out_features, dtype=torch.float64) if bias is None else bias.double()
        wanted = wanted - target.center

        def offset(stored: QTensor) -> torch.Tensor:
            """What the codes do not say of the input, in real units of the output."""
            rounded = stored.dequantize().double() / division
            if exact is None or mean is None:
                return (rounded * missing).sum(1)
            return ((exact.double() - rounded) * mean + rounded * missing).sum(1)

        weight = self._stored(weight, (wanted + offset(weight)).abs() / (unit * _BIAS_LIMIT))
        scale = _row_scale(weight)
        self.bias = torch.floor((wanted + offset(weight)) / (unit * scale) + 0.5).int()
        self.align = torch.tensor([align], dtype=torch.int32)
        self.fill_rescale("", unit * scale / target.unit)

    def lower_output(self, weight: QTensor, bias: torch.Tensor | None, source: Grid, **options: Any) -> Grid:
        """As `lower`, onto a grid of a power of two that no input can leave; returns that grid."""
        division = options.get("smooth")
        matrix = weight.dequantize().double() / (1 if division is None else division.double())
        reach = matrix.abs().sum(1) * (source.limit * float(source.unit))
        reach += ((matrix * source.center).sum(1) + (0 if bias is None else bias.double())).abs()
        exponent = int(self.out_bits - 2 - torch.frexp(reach.max()).exponent)
        target = Grid(2.0**-exponent, self.out_bits)
        self.lower(weight, bias, source, target, **options)
        if self.output:
            self.exponent = torch.tensor([exponent], dtype=torch.int32)
        return target

    def _stored(self, weight: QTensor, floor: torch.Tensor) -> QTensor:
        """Take the codes over; a scale below `floor`, where the bias would not fit 29 bits, is raised to it."""
        weight = _with_room(weight, floor)
        self.weight = weight.codes
        return weight

    def _alignment(self, weight: QTensor) -> int:
        """By how many places a row's product is shifted, so that it fits the multiplier that follows."""
        if not self.dynamic:
            return 0
        reach = _reach(weight.integers(), self.unsigned) * ((1 << (self.in_bits - 1)) - 1)
        return int(max(0, reach.bit_length() - _ALIGNED_BITS))

    def quantize(self, x: torch.Tensor) -> Codes:
        """INT8 codes of the rows, and what the largest of each was (None with static activations)."""
        ops = kernels.backend(x.device)
        if self.rescales:
            x = ops.rescale(x, self.in_multiplier, self.in_shift).sub_(self.in_offset)
            x = ops.saturate(x, self.in_bits if self.dynamic else 8)
        return ops.quantize_rows(x, unsigned=self.unsigned) if self.dynamic else (x.to(torch.int8), None)

    def add_to_bias(self, amount: torch.Tensor, target: Grid) -> None:
        """Add real numbers `[out]` to what leaves, as far as 29 bits hold them."""
        unit = Dyadic(self.multiplier, self.shift).to_float() * target.unit
        added = self.bias + torch.floor(amount / unit + 0.5).nan_to_num(0.0, 0.0, 0.0)
        self.bias = added.clamp(-_BIAS_LIMIT, _BIAS_LIMIT).int()

    def forward(self, x: torch.Tensor | Codes) -> torch.Tensor:
        """int32 `[..., in]` on the source grid, or what `quantize` made of it."""
        codes, amax = x if isinstance(x, tuple) else self.quantize(x)
        operand, row_sums = self._prepared()
        y = kernels.backend(codes.device).integer_linear(
            codes, amax, operand, row_sums, self.align, self.bias, (self.multiplier, self.shift), self.out_bits
        )
        return leave(y, self.exponent, self.output_dtype) if self.output else y

    def _prepare(self, codes: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
        shape = (self.out_features, self.in_features)
        ops = kernels.backend(codes.device)
        operand = ops.prepare(codes, shape)
        return operand, ops.row_sums(operand) if self.unsigned else None

    def bounds(self) -> list[Bound]:
        """The int32 accumulator; the aligned row product with the bias; what the final multiplier is given."""
        reach = _reach(rows_of(self.weight, (self.out_features, self.in_features)), self.unsigned)
        widest = reach * ((1 << (self.in_bits - 1)) - 1) if self.dynamic else reach
        aligned = (widest >> int(self.align)) + 1 + int(self.bias.long().abs().max())
        return [
            Bound("accumulator", reach, _ACCUMULATOR),
            Bound("row product", widest, (1 << 62) - 1),
            Bound("aligned sum", aligned, _ACCUMULATOR),
        ]

    def description(self) -> dict[str, Any]:
        """Shape, specs and widths."""
        return {"type": "int_linear", **self.words}

    @classmethod
    def from_description(
        cls, model: nn.Module, path: str, description: Mapping[str, Any], *, device: str
    ) -> "IntLinear":
        """See `QModule`."""
        return cls(description, device=device)


def _reach(codes: torch.Tensor, unsigned: bool) -> int:
    """The largest `Σ |code · weight|` of a row of weights, `[rows, columns]`."""
    return (254 if unsigned else 127) * int(codes.long().abs().sum(1).max())


def _row_scale(weight: QTensor) -> torch.Tensor:
    """The scale of each row, float64 `[rows]`."""
    scale = weight.params.scale.double().flatten()
    return scale.repeat_interleave(weight.shape[0] // len(scale))


def _with_room(weight: QTensor, floor: torch.Tensor) -> QTensor:
    """Codes again, with a scale of at least `floor` a row: a dead row's bias must fit 29 bits of its grid."""
    if bool((_row_scale(weight) >= floor).all()):
        return weight
    if weight.params.scale.shape[0] != weight.shape[0]:
        floor = floor.max().expand(weight.params.scale.shape[0])
    scale = torch.maximum(weight.params.scale.double(), floor[:, None]).float() * 1.0001
    if not bool(scale.isfinite().all()):
        raise InputError("a bias is too large for integers of 29 bits on any grid of its row")
    return QTensor.quantize(weight.dequantize(), weight.spec, layout=weight.layout, params=QParams(scale))
