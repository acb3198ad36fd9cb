"""Clip the largest weights so that all others are rounded on a finer grid."""

from collections.abc import Iterator
from typing import Literal

import torch

from qtool.numerics import QTensor, QuantSpec
from qtool.numerics.qtensor import QParams, blocks_of

_CANDIDATES = 80  # scales that are tried, from max|block| / qmax down to a fifth of it
_SHARES, _LEAST = 32, 0.2  # of asymmetric ranges: both ends are moved together, down to a fifth of the range
_STEPS, _REACH = 12, 0.15  # then one end after the other, by up to this part of the range to either side
_CHUNK = 1 << 20  # weights at a time


def mse(weight: torch.Tensor, spec: QuantSpec, *, layout: Literal["rows", "tiled"] = "tiled") -> QTensor:
    """Nearest codes of a float `[rows, columns]` matrix on the scales that leave each block the least squared error.

    The grid search is that of OMSE (Choukroun et al. 2019), whose first candidate is the scale of `nearest`: no block
    is worse than there. Of an asymmetric range both ends are searched. Raises InputError as `nearest` does.
    """
    widest = QParams.absmax(weight, spec)
    first, found = 0, []
    for blocks in blocks_of(weight.detach(), spec):
        own = slice(first, first + blocks.shape[2])
        at_once = max(1, _CHUNK // (blocks.shape[1] * blocks.shape[2] * blocks.shape[3]))
        starts = _split(widest, own, at_once)
        pieces = zip(blocks.split(at_once), starts, strict=True)
        found.append([_least_squares(part.double(), start, spec) for part, start in pieces])
        first = own.stop
    return QTensor.quantize(weight, spec, layout=layout, params=_joined(found))


def _split(params: QParams, columns: slice, at_once: int) -> Iterator[QParams]:
    """Parameters of some column blocks, so many row blocks at a time."""
    for first in range(0, len(params.scale), at_once):
        rows = slice(first, first + at_once)
        values = (params.scale, params.zero_point, params.offset)
        yield QParams(*(None if value is None else value[rows, columns] for value in values))  # type: ignore[arg-type]


def _joined(parts: list[list[QParams]]) -> QParams:
    """One of several; the outer list goes along the columns."""

    def join(name: str) -> torch.Tensor | None:
        if getattr(parts[0][0], name) is None:
            return None
        return torch.cat([torch.cat([getattr(piece, name) for piece in column]) for column in parts], 1)

    scale = join("scale")
    assert scale is not None
    return QParams(scale, join("zero_point"), join("offset"))


def _least_squares(blocks: torch.Tensor, start: QParams, spec: QuantSpec) -> QParams:
    """The best parameters of each block of float64 `[row blocks, rows, column blocks, columns]`, from `start` on."""
    search = _Search(blocks, start, spec)
    if spec.symmetric:
        for share in torch.linspace(1.0, 0.2, _CANDIDATES, dtype=torch.float64):
            scale = (start.scale.double() * share).float()
            search.offer(QParams(scale.clamp_min(torch.finfo(torch.float32).tiny)))
        return search.best
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    if not spec.minimum:
        low, high = low.clamp_max(0), high.clamp_min(0)
    span = high - low
    shares = torch.linspace(1.0, _LEAST, _SHARES, dtype=torch.float64)
    offers = [(share * low, share * high) if not spec.minimum else _shrunk(low, high, share) for share in shares]
    low, high = search.range_of(offers, low, high)
    steps = torch.linspace(-_REACH, _REACH, _STEPS, dtype=torch.float64)
    low, high = search.range_of([((low + step * span).minimum(high), high) for step in steps], low, high)
    search.range_of([(low, (high + step * span).maximum(low)) for step in steps], low, high)
    return search.best


def _shrunk(low: torch.Tensor, high: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A range around the same middle."""
    off = (high - low) * (1 - share) / 2
    return low + off, high - off


class _Search:
    """The parameters of least squared error, block by block, among those that were offered."""

    def __init__(self, blocks: torch.Tensor, start: QParams, spec: QuantSpec) -> None:
        self.blocks, self.spec, self.best = blocks, spec, start
        self.least = torch.full_like(start.scale, torch.inf, dtype=torch.float64)
        self.offer(start)

    def offer(self, params: QParams) -> torch.Tensor:
        """Where `params` are better than all before, boolean `[row blocks, column blocks]`."""
        step = params.scale.double()[:, None, :, None]
        zero = _zero(params)
        at = 0 if zero is None else zero[:, None, :, None]
        codes = ((self.blocks - at) / step).add_(0.5).floor_().clamp_(self.spec.qmin, self.spec.qmax)
        error = codes.mul_(step).add_(at).sub_(self.blocks).square_().sum((1, 3))
        better = error < self.least
        self.least = torch.minimum(error, self.least)

        def pick(new: torch.Tensor | None, old: torch.Tensor | None) -> torch.Tensor | None:
            return None if new is None or old is None else torch.where(better, new, old)

        scale = torch.where(better, params.scale, self.best.scale)
        point, offset = (pick(getattr(params, name), getattr(self.best, name)) for name in ("zero_point", "offset"))
        self.best = QParams(scale, point, offset)
        return better

    def range_of(
        self, offers: list[tuple[torch.Tensor, torch.Tensor]], low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The ends of the best range now, those before where none of `offers` is better."""
        for lower, upper in offers:
            better = self.offer(QParams.of_range(lower, upper, self.spec))
            low, high = torch.where(better, lower, low), torch.where(better, upper, high)
        return low, high


def _zero(params: QParams) -> torch.Tensor | None:
    """What code 0 stands for, float64 and exact."""
    if params.zero_point is not None:
        return -params.zero_point.double() * params.scale.double()
    return None if params.offset is None else params.offset.double()
