"""`QTensor`: a matrix of integer codes with its scales; the one place where packing and tiling are known.

Rounding is half up, `floor(v + 0.5)`, everywhere in qtool, so that float simulations and integer requantization agree
on ties. Scales are float32 because that is what files and float epilogues hold; codes are computed in float64 from the
scale as stored, so that a code is the best one for the scale that will multiply it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from qtool.errors import InputError, one_of
from qtool.numerics.spec import QuantSpec

Layout = Literal["rows", "tiled"]

TILE_ROWS, TILE_COLUMNS = 16, 4
"""One tile holds 16 outputs x 4 inputs: the order that VNNI, AVX2 and AMX dot products can all consume."""

_DTYPES = {"nibble": torch.int8, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32}
_CHUNK = 1 << 20  # values in float64 at a time: bounds the memory that quantizing a large table takes


@dataclass(frozen=True, eq=False)
class QParams:
    """Positive float32 scales `[row blocks, column blocks]`; asymmetric specs add a zero point or a float minimum."""

    scale: Tensor
    zero_point: Tensor | None = None
    minimum: Tensor | None = None

    @classmethod
    def absmax(cls, x: Tensor, spec: QuantSpec) -> "QParams":
        """Symmetric scales that map the largest magnitude of each block of `x [rows, columns]` to `qmax`.

        A block of zeros gets scale 1, a block of tiny values the smallest normal float32: never 0, NaN or subnormal.
        Raises InputError when a value is not finite, blocks do not fit, `x` is empty, or the spec is asymmetric.
        """
        _refuse_asymmetric(spec)
        shape = (x.shape[0], x.shape[1])
        if x.numel() == 0:
            raise InputError(f"cannot choose scales for an empty {shape[0]}x{shape[1]} matrix")
        row_blocks, column_blocks = spec.scale_shape(shape)
        blocks = x.detach().view(row_blocks, shape[0] // row_blocks, column_blocks, shape[1] // column_blocks)
        peak = torch.maximum(blocks.amax((1, 3)), -blocks.amin((1, 3))).double()
        scale = (peak / spec.qmax).float().clamp_min(torch.finfo(torch.float32).tiny)
        if not scale.isfinite().all():
            raise InputError(f"cannot quantize a {shape[0]}x{shape[1]} matrix: it holds NaN or infinite values")
        return cls(scale.masked_fill(peak == 0, 1.0))


@dataclass(frozen=True, eq=False)
class QTensor:
    """Integer codes of a matrix of logical `shape` (rows, columns): value = code * scale of its block.

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

        Without `params` the scales are those of `QParams.absmax`, and then every value is kept within scale/2 (up to
        24 bits, the precision of a float32 scale). Raises InputError for values or scales that are not finite, blocks
        or `params` that do not fit, and asymmetric specs.
        """
        _refuse_asymmetric(spec)
        shape = (x.shape[0], x.shape[1])
        params = QParams.absmax(x, spec) if params is None else params
        _check_scales(params, spec, shape)
        codes = torch.empty(shape, dtype=_DTYPES[spec.storage], device=x.device)
        step = max(1, _CHUNK // max(1, shape[1]))
        scales = _row_scales(params.scale.double(), shape)
        for part, values, scale in zip(*(torch.split(t, step) for t in (codes, x.detach(), scales)), strict=True):
            part.copy_(_nearest(values, scale, spec))
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
        """The values `code * scale`, float32 `[rows, columns]`, rounded once."""
        _refuse_asymmetric(self.spec)
        wide = torch.float64 if self.spec.storage == "int32" else torch.float32
        scales = _row_scales(self.params.scale, self.shape)
        return (_column_blocks(self.integers().to(wide), scales) * scales[:, :, None]).flatten(1).float()

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


def _row_scales(scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """Scales `[row blocks, column blocks]` repeated to `[rows, column blocks]`."""
    return scale.repeat_interleave(shape[0] // scale.shape[0], 0)


def _column_blocks(x: Tensor, scales: Tensor) -> Tensor:
    """`x [rows, columns]` as `[rows, column blocks, columns of a block]`."""
    return x.view(x.shape[0], scales.shape[1], x.shape[1] // scales.shape[1])


def _nearest(x: Tensor, scales: Tensor, spec: QuantSpec) -> Tensor:
    """Codes in float64 `[rows, columns]` of some rows of a matrix and their scales `[rows, column blocks]`."""
    ratio = _column_blocks(x.double(), scales) / scales[:, :, None]
    if not ratio.isfinite().all():
        raise InputError(f"cannot quantize to {spec}: the matrix or its scales hold NaN, infinite or zero-scale values")
    return ratio.add_(0.5).floor_().clamp_(spec.qmin, spec.qmax).flatten(1)


def _check_scales(params: QParams, spec: QuantSpec, shape: tuple[int, int]) -> None:
    expected, found = spec.scale_shape(shape), tuple(params.scale.shape)
    if found != expected:
        raise InputError(f"{spec} has scales of shape {expected} on a {shape[0]}x{shape[1]} matrix, found {found}")


def _refuse_asymmetric(spec: QuantSpec) -> None:
    if not spec.symmetric:
        raise InputError(f"asymmetric weights ({spec}) are not supported yet by this version; use a symmetric spec")
