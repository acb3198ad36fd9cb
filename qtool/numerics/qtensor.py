"""`QTensor`: a matrix of integer codes with its scales; the one place where packing and tiling are known.

Rounding is half up, `floor(v + 0.5)`, everywhere in qtool, so that float simulations and integer requantization agree
on ties. Scales are float32 because that is what files and float epilogues hold; codes are computed in float64 from the
scale as stored, so that a code is the best one for the scale that will multiply it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.errors import InputError, one_of
from qtool.numerics.spec import QuantSpec

Layout = Literal["rows", "tiled"]
Operation = Literal["add", "sub", "mul", "div"]

TILE_ROWS, TILE_COLUMNS = 16, 4
"""One tile holds 16 outputs x 4 inputs: the order that VNNI, AVX2 and AMX dot products can all consume."""

_DTYPES = {"nibble": torch.int8, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32}
_CHUNK = 1 << 20  # values in float64 at a time: bounds the memory that quantizing a large table takes


@dataclass(frozen=True, eq=False)
class QParams:
    """Positive float32 scales `[row blocks, column blocks]`, and what asymmetric specs need of the same shape.

    value = (code - zero_point) * scale, with an integer zero point inside the range of codes; or for a spec with a
    float minimum, value = code * scale + offset: the value of code 0, 2^(b-1) scales above that of the smallest code.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    offset: Tensor | None = None

    def offsets(self) -> Tensor | None:
        """What code 0 stands for, float32 `[row blocks, column blocks]`; None for symmetric codes, where it is 0."""
        return self.offset if self.zero_point is None else -(self.zero_point.float() * self.scale)

    @classmethod
    def absmax(cls, x: Tensor, spec: QuantSpec) -> "QParams":
        """Scales that map the largest magnitude of each block of `x [rows, columns]` to `qmax`.

        Asymmetric ones map the block's range to all codes; with an integer zero point the range is first widened to
        hold 0, which then has a code of its own. A block of zeros gets scale 1, a block of tiny values the smallest
        normal float32: never 0, NaN or subnormal. Raises InputError when a value is not finite, blocks do not fit, or
        `x` is empty.
        """
        low, high = _extremes(x, spec)
        if spec.symmetric:
            return cls(_positive(torch.maximum(high, -low) / spec.qmax))
        return cls.of_range(low, high, spec)

    def cpu(self) -> "QParams":
        """On the host."""
        return QParams(*(None if value is None else value.cpu() for value in _fields(self)))  # type: ignore[arg-type]

    @classmethod
    def of_range(cls, low: Tensor, high: Tensor, spec: QuantSpec) -> "QParams":
        """Asymmetric parameters whose smallest and largest code stand for float64 `low` and `high`, as `absmax` says.

        Both are `[row blocks, column blocks]`, finite, low <= high.
        """
        if not spec.minimum:
            low, high = low.clamp_max(0), high.clamp_min(0)
        return cls._from(low, (high - low) / (spec.qmax - spec.qmin), spec)

    @classmethod
    def zeroquant(cls, x: Tensor, spec: QuantSpec) -> "QParams":
        """The scales of ZeroQuant's published code: 2^bits steps where there are 2^bits - 1, so that one end clips.

        Symmetric scales are 2 max|x| / 2^bits. Its codes are -2^(b-1)..2^(b-1)-1; ours never use the first, so both
        ends clip by a step. Asymmetric ones are (max - min) / 2^bits with a smallest value of whole steps. With an
        integer zero point the range is first widened to hold 0 and the point kept among the codes, which that code
        does not do. Blocks of zeros, there 0/0, get scale 1. Raises InputError as `absmax`.
        """
        low, high = _extremes(x, spec)
        steps = 1 << spec.num_bits
        if spec.symmetric:
            return cls(_positive(2 * torch.maximum(high, -low) / steps))
        if not spec.minimum:
            low, high = low.clamp_max(0), high.clamp_min(0)
        step = (high - low) / steps
        scale = _positive(step).double()
        return cls._from(torch.where(step > 0, (low / scale + 0.5).floor() * scale, low), step, spec)

    @classmethod
    def _from(cls, low: Tensor, step: Tensor, spec: QuantSpec) -> "QParams":
        """From the value of the smallest code and the step, float64."""
        if spec.minimum:  # a block of one value needs no step: a small one keeps the offset exact
            scale = _positive(step, empty=torch.finfo(torch.float32).tiny)
            return cls(scale, offset=(low - spec.qmin * scale.double()).float())
        scale = _positive(step)
        point = (spec.qmin - low / scale.double() + 0.5).floor().clamp(spec.qmin, spec.qmax)
        return cls(scale, zero_point=point.to(torch.int8 if spec.num_bits <= 8 else torch.int32))


SCALE_RULES: dict[str, Callable[[Tensor, QuantSpec], QParams]] = {
    "absmax": QParams.absmax,
    "zeroquant": QParams.zeroquant,
}
"""How scales follow from the values of a block, by the word of `weights.scale_rule`."""


@dataclass(frozen=True, eq=False)
class QTensor:
    """Integer codes of a matrix of logical `shape` (rows, columns), whose values are as `QParams` says.

    `codes` are stored as `stored_shape` and `stored_dtype` say. Layout `rows` is `[rows, 1, columns]`: of rank 3 so
    that a loader that does not know qtool stops with a shape error instead of taking codes for weights. Layout `tiled`
    is `[rows/16, columns/4, 16, 4]`, padded with zeros. Up to 4 bits, two codes share a byte. Raises InputError when
    codes or scales have another shape or type.
    """

    codes: Tensor
    params: QParams
    spec: QuantSpec
    shape: tuple[int, int]
    layout: Layout = "rows"

    def __post_init__(self) -> None:
        _check_scales(self.params, self.spec, self.shape)
        found = (tuple(self.codes.shape), self.codes.dtype)
        expected = (stored_shape(self.spec, self.shape, self.layout), stored_dtype(self.spec))
        if found != expected:
            raise InputError(f"codes of {self.spec} for {self.shape} should be {expected}, found {found}")

    @classmethod
    def quantize(
        cls, x: Tensor, spec: QuantSpec, *, layout: Layout = "rows", params: QParams | None = None
    ) -> "QTensor":
        """Nearest codes `clip(floor(x/scale + 0.5), qmin, qmax)` of float `x [rows, columns]`, in float64.

        Asymmetric ones are those of `(x - offset) / scale`, or of `x / scale + zero_point`. Without `params` these are
        those of `QParams.absmax`, and then every value is kept within scale/2 (up to 24 bits, the precision of a
        float32 scale). Raises InputError for values or scales that are not finite, and for blocks or `params` that do
        not fit.
        """
        shape = (x.shape[0], x.shape[1])
        params = QParams.absmax(x, spec) if params is None else params
        _check_scales(params, spec, shape)
        codes = torch.empty(shape, dtype=_DTYPES[spec.storage], device=x.device)
        step = max(1, _CHUNK // max(1, shape[1]))
        fields = [None if t is None else _by_row(t.double(), shape) for t in _fields(params)]
        for first in range(0, shape[0], step):
            rows = slice(first, first + step)
            codes[rows] = _nearest(x.detach()[rows], [None if t is None else t[rows] for t in fields], spec)
        return cls.store(codes, params, spec, layout)

    @classmethod
    def store(cls, codes: Tensor, params: QParams, spec: QuantSpec, layout: Layout = "rows") -> "QTensor":
        """Pack integer codes `[rows, columns]` that were chosen elsewhere, within `spec.qmin..spec.qmax`.

        Raises InputError for `params` or a layout that do not fit.
        """
        shape = (codes.shape[0], codes.shape[1])
        return cls(_store(codes.to(_DTYPES[spec.storage]), spec, layout), params, spec, shape, layout)

    def integers(self) -> Tensor:
        """The codes as int8, int16 or int32 `[rows, columns]` in row-major order; a view where nothing is packed."""
        codes, columns = self.codes, self.shape[1]
        if self.spec.storage == "nibble":
            codes = unpack_nibbles(codes, TILE_COLUMNS if self.layout == "tiled" else columns)
        return rows_of(codes, self.shape)

    def dequantize(self) -> Tensor:
        """The values that the codes stand for, float32 `[rows, columns]`, rounded once."""
        scale, point, offset = (None if t is None else _by_row(t, self.shape) for t in _fields(self.params))
        wide = torch.float64 if self.spec.storage == "int32" or offset is not None else torch.float32
        width = column_width(self.spec, self.shape[1])
        values = on_blocks(self.integers().to(wide), "sub", point, width)
        return on_blocks(on_blocks(values, "mul", scale, width), "add", offset, width).float()

    def stretches(self, rows: int) -> Iterator["QTensor"]:
        """This matrix cut into about so many rows at a time, from the top; codes and scales stay where they are.

        A cut never goes through a tile or a block of scales.
        """
        tile_rows = TILE_ROWS if self.layout == "tiled" else 1
        whole = self.spec.block[0] is None  # one block of rows, which every stretch shares
        share = 1 if whole else self.shape[0] // self.params.scale.shape[0]
        grain = math.lcm(share, tile_rows)
        step = grain * max(1, rows // grain)
        for start in range(0, self.shape[0], step):
            end = min(start + step, self.shape[0])
            own = slice(None) if whole else slice(start // share, end // share)
            cut = {name: value[own] for name, value in vars(self.params).items() if value is not None}
            codes = self.codes[start // tile_rows : -(-end // tile_rows)]
            shape = (end - start, self.shape[1])
            yield QTensor(codes, replace(self.params, **cut), self.spec, shape, self.layout)


def stored_shape(spec: QuantSpec, shape: tuple[int, int], layout: Layout) -> tuple[int, ...]:
    """The shape in which codes of a matrix `shape` lie in memory and on disk.

    Raises InputError for an unknown layout, and for codes of more than 8 bits in tiles.
    """
    rows, columns = shape
    nibbles = spec.storage == "nibble"
    if layout == "rows":
        return rows, 1, -(-columns // 2) if nibbles else columns
    if layout not in get_args(Layout):
        raise InputError(one_of(layout, get_args(Layout), "layout"))
    if spec.num_bits > 8:
        raise InputError(f"layout 'tiled' holds codes of at most 8 bits, {spec} has {spec.num_bits}; use layout 'rows'")
    return -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS), TILE_ROWS, TILE_COLUMNS // 2 if nibbles else TILE_COLUMNS


def stored_dtype(spec: QuantSpec) -> torch.dtype:
    """The type of stored codes: uint8 for packed nibbles, else the signed type of `spec.storage`."""
    return torch.uint8 if spec.storage == "nibble" else _DTYPES[spec.storage]


def tile(codes: Tensor) -> Tensor:
    """Codes `[rows, columns]` as tiles `[ceil(rows/16), ceil(columns/4), 16, 4]`, padded with zeros."""
    rows, columns = codes.shape
    padded = pad(codes, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    tiles = -(-rows // TILE_ROWS), TILE_ROWS, -(-columns // TILE_COLUMNS), TILE_COLUMNS
    return padded.view(tiles).transpose(1, 2).contiguous()


def untile(stored: Tensor, shape: tuple[int, int]) -> Tensor:
    """The codes `[rows, columns]` that `tile` laid out; `shape` says how much of it is padding."""
    return stored.transpose(1, 2).flatten(2).flatten(0, 1)[: shape[0], : shape[1]].contiguous()


def rows_of(stored: Tensor, shape: tuple[int, int]) -> Tensor:
    """Codes of 5 to 16 bits `[rows, columns]` of logical `shape` in row-major order, from either layout."""
    return untile(stored, shape) if stored.dim() == 4 else stored.reshape(shape)


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 codes in -8..7 `[..., n]` as uint8 `[..., ceil(n/2)]`: low nibble first, two's complement, padded with 0."""
    nibbles = pad(codes, (0, codes.shape[-1] % 2)).view(torch.uint8)
    return (nibbles[..., 0::2] & 15) | (nibbles[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, size: int) -> Tensor:
    """The int8 codes `[..., size]` that `pack_nibbles` packed."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :size]
    return (nibbles ^ 8).view(torch.int8) - 8


def _store(codes: Tensor, spec: QuantSpec, layout: Layout) -> Tensor:
    stored = tile(codes) if layout == "tiled" else codes[:, None, :]
    return pack_nibbles(stored) if spec.storage == "nibble" else stored


def column_width(spec: QuantSpec, columns: int) -> int:
    """Columns of a block; the last may be shorter."""
    return min(spec.block[1] or columns, columns)


def on_blocks(x: Tensor, operation: Operation, values: Tensor | None, width: int) -> Tensor:
    """`x [rows, columns]` with an operation done in place by numbers of its blocks `[rows, column blocks]`, if any."""
    whole = x.shape[1] - x.shape[1] % width
    for part, first in ((x[:, :whole], 0), (x[:, whole:], whole // width)):
        if values is not None and part.shape[1]:
            blocks = part.unflatten(1, (-1, min(width, part.shape[1])))
            getattr(blocks, f"{operation}_")(values[:, first : first + blocks.shape[1], None])
    return x


def blocks_of(x: Tensor, spec: QuantSpec) -> list[Tensor]:
    """`x [rows, columns]` as `[row blocks, rows, column blocks, columns]`; a shorter last column block stands apart."""
    rows, columns = x.shape
    row_blocks = spec.scale_shape((rows, columns))[0]
    width = column_width(spec, columns)
    whole = columns - columns % width
    parts = [x[:, :whole], x[:, whole:]] if whole < columns else [x]
    return [part.reshape(row_blocks, rows // row_blocks, -1, min(width, part.shape[1])) for part in parts]


def _extremes(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The smallest and largest value of each block, float64 `[row blocks, column blocks]`."""
    shape = f"{x.shape[0]}x{x.shape[1]} matrix"
    if x.numel() == 0:
        raise InputError(f"cannot choose scales for an empty {shape}")
    blocks = blocks_of(x.detach(), spec)
    low, high = (torch.cat([getattr(part, end)((1, 3)) for part in blocks], 1).double() for end in ("amin", "amax"))
    if not (low.float().isfinite() & high.float().isfinite()).all():
        raise InputError(f"cannot quantize a {shape}: it holds NaN or infinite values")
    return low, high


def _positive(step: Tensor, empty: float = 1.0) -> Tensor:
    """Float64 steps between codes as float32 scales, `empty` where they are 0."""
    return step.float().clamp_min(torch.finfo(torch.float32).tiny).masked_fill(step == 0, empty)


def _fields(params: QParams) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return params.scale, params.zero_point, params.offset


def _by_row(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Numbers of blocks `[row blocks, column blocks]` repeated to `[rows, column blocks]`."""
    return values.repeat_interleave(shape[0] // values.shape[0], 0)


def _nearest(x: Tensor, fields: Sequence[Tensor | None], spec: QuantSpec) -> Tensor:
    """Codes in float64 `[rows, columns]` of some rows of a matrix; its `_fields` are `[rows, column blocks]`."""
    scale, point, offset = fields
    width = column_width(spec, x.shape[1])
    ratio = on_blocks(x.to(torch.float64, copy=True), "sub", offset, width)
    if not on_blocks(ratio, "div", scale, width).isfinite().all():
        raise InputError(f"cannot quantize to {spec}: the matrix or its scales hold NaN, infinite or zero-scale values")
    return on_blocks(ratio, "add", point, width).add_(0.5).floor_().clamp_(spec.qmin, spec.qmax)


def _check_scales(params: QParams, spec: QuantSpec, shape: tuple[int, int]) -> None:
    expected, found = spec.scale_shape(shape), tuple(params.scale.shape)
    if found != expected:
        raise InputError(f"{spec} has scales of shape {expected} on a {shape[0]}x{shape[1]} matrix, found {found}")
    wanted = (not spec.symmetric and not spec.minimum, spec.minimum)
    for name, values, needed in zip(("zero points", "offsets"), _fields(params)[1:], wanted, strict=True):
        if (values is not None) != needed or (values is not None and tuple(values.shape) != expected):
            given = "none" if values is None else tuple(values.shape)
            raise InputError(f"{spec} has {f'{name} of shape {expected}' if needed else f'no {name}'}, found {given}")
