"""Observers: what is kept of a stream of activations.

An observer sees `[tokens, features]` rows one batch at a time and keeps a state of fixed size, so memory does not grow
with the data. States are dictionaries of tensors: that is how they are written to a statistics file and read back.
"""

from abc import ABC, abstractmethod

import torch

from qtool.calibrate.probabilities import Distribution
from qtool.errors import InputError

State = dict[str, torch.Tensor]


class Observer(ABC):
    """Watches one activation tensor of the float model, on the device where it is computed."""

    @abstractmethod
    def update(self, rows: torch.Tensor) -> None:
        """Take in `[tokens, features]` float rows of real (not padded) tokens; all batches come from one device."""

    @abstractmethod
    def state(self) -> State:
        """Everything learned so far, on that device."""


class MinMax(Observer):
    """The smallest and the largest value, and the tokens seen. State: `min`, `max` float32, `tokens` int64."""

    def __init__(self) -> None:
        self._range: tuple[torch.Tensor, torch.Tensor] | None = None
        self._tokens = 0

    def update(self, rows: torch.Tensor) -> None:
        """Raises InputError when an activation is NaN or infinite: a range would be meaningless."""
        if rows.numel() == 0:
            return
        low, high = _finite(torch.aminmax(rows.float()))
        if self._range is not None:
            low, high = torch.minimum(self._range[0], low), torch.maximum(self._range[1], high)
        self._range, self._tokens = (low, high), self._tokens + len(rows)

    def state(self) -> State:
        """Raises InputError when nothing was seen."""
        if self._range is None:
            raise InputError(_NOTHING)
        return {"min": self._range[0], "max": self._range[1], "tokens": torch.tensor(self._tokens)}


class Channels(Observer):
    """The range and the mean of every channel, and the tokens seen.

    State: `min`, `max` float32 `[features]`, `mean` float64 `[features]`, `tokens` int64.
    """

    def __init__(self) -> None:
        self._range: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sum: torch.Tensor | float = 0.0
        self._tokens = 0

    def update(self, rows: torch.Tensor) -> None:
        """Raises InputError when an activation is NaN or infinite."""
        if rows.numel() == 0:
            return
        low, high = _finite(rows.float().aminmax(dim=0))
        if self._range is not None:
            low, high = torch.minimum(self._range[0], low), torch.maximum(self._range[1], high)
        self._range, self._tokens = (low, high), self._tokens + len(rows)
        self._sum = self._sum + rows.sum(0, dtype=torch.float64)

    def state(self) -> State:
        """Raises InputError when nothing was seen."""
        if self._range is None:
            raise InputError(_NOTHING)
        mean = torch.as_tensor(self._sum) / self._tokens
        return {"min": self._range[0], "max": self._range[1], "mean": mean, "tokens": torch.tensor(self._tokens)}


class Histogram(Observer):
    """How often each magnitude occurs in every channel, on bins that widen as larger values come.

    State: `counts` int64 `[features, BINS]`, `width` float32 `[features]` (of a bin; a power of two), `mean` float64
    `[features]`, `tokens` int64.
    Bin i holds `i·width ≤ |x| < (i+1)·width`. A range that grows adds neighbouring bins, so counts stay exact.
    """

    BINS = 512

    def __init__(self) -> None:
        self._counts: torch.Tensor | None = None
        self._sum: torch.Tensor | float = 0.0
        self._exponent = torch.empty(0, dtype=torch.int32)
        self._tokens = 0

    def update(self, rows: torch.Tensor) -> None:
        """Raises InputError when an activation is NaN or infinite."""
        if rows.numel() == 0:
            return
        size = rows.float().abs()
        (peak,) = _finite((size.amax(0),))
        needed = torch.frexp(peak).exponent.where(peak > 0, -126)  # peak < 2^needed
        if self._counts is None:
            self._counts = torch.zeros((rows.shape[1], self.BINS), dtype=torch.int64, device=rows.device)
            self._exponent = needed
        self._widen(needed - self._exponent)
        bins = torch.ldexp(size, 9 - self._exponent).long().clamp_(max=self.BINS - 1)
        flat = bins + self.BINS * torch.arange(rows.shape[1], device=rows.device)
        self._sum = self._sum + rows.sum(0, dtype=torch.float64)
        self._counts += torch.bincount(flat.flatten(), minlength=self._counts.numel()).view_as(self._counts)
        self._tokens += len(rows)

    def _widen(self, places: torch.Tensor) -> None:
        """Double the range of channels `places` times, where positive."""
        assert self._counts is not None
        for step in range(int(places.max().clamp_min(0))):
            grows = (places > step).nonzero().flatten()
            pairs = self._counts[grows].view(len(grows), -1, 2).sum(-1)
            self._counts[grows] = torch.nn.functional.pad(pairs, (0, self.BINS // 2))
        self._exponent = self._exponent + places.clamp_min(0)

    def state(self) -> State:
        """Raises InputError when nothing was seen."""
        if self._counts is None:
            raise InputError(_NOTHING)
        width = torch.ldexp(torch.ones_like(self._exponent, dtype=torch.float32), self._exponent - 9)
        mean = torch.as_tensor(self._sum) / self._tokens
        return {"counts": self._counts, "width": width, "mean": mean, "tokens": torch.tensor(self._tokens)}


class TokenPeaks(Histogram):
    """A histogram of the largest magnitude of each token: one channel. For clipping token by token."""

    def update(self, rows: torch.Tensor) -> None:
        """Raises InputError when an activation is NaN or infinite."""
        super().update(rows.abs().amax(-1, keepdim=True) if rows.numel() else rows)


class Sample(Observer):
    """Every n-th token, n doubling so that at most `SIZE` stay: an even sample whatever the length of the data.

    State: `rows` float32 `[≤ SIZE, features]`, `tokens` int64.
    """

    SIZE = 512

    def __init__(self) -> None:
        self._rows: list[torch.Tensor] = []
        self._stride, self._tokens = 1, 0

    def update(self, rows: torch.Tensor) -> None:
        """Raises InputError when an activation is NaN or infinite."""
        (rows,) = _finite((rows.float(),))
        kept = rows[-self._tokens % self._stride :: self._stride]
        self._rows.append(kept.clone())
        self._tokens += len(rows)
        while sum(len(part) for part in self._rows) > self.SIZE:
            self._rows = [torch.cat(self._rows)[::2].clone()]
            self._stride *= 2

    def state(self) -> State:
        """Raises InputError when nothing was seen."""
        if self._tokens == 0:
            raise InputError(_NOTHING)
        return {"rows": torch.cat(self._rows), "tokens": torch.tensor(self._tokens)}


class AttentionHistogram(Observer):
    """How the attention probabilities of each head are distributed; see `probabilities.Distribution`.

    State: `counts` int64, `mass`, `weights` and `sums` float64 `[heads, BINS]`, `tokens` int64.
    """

    relative = False

    def __init__(self) -> None:
        self._seen: Distribution | None = None

    def update(self, rows: torch.Tensor) -> None:
        """Take in float `[tokens, heads, keys]`, the rows of real tokens, negative where a query may not look.

        Raises InputError when one is NaN or infinite.
        """
        if rows.numel() == 0:
            return
        found = Distribution.of(*_finite((rows,)), relative=self.relative)
        self._seen = found if self._seen is None else self._seen + found

    def state(self) -> State:
        """Raises InputError when nothing was seen."""
        if self._seen is None:
            raise InputError(_NOTHING)
        tables = {name: getattr(self._seen, name) for name in ("counts", "mass", "weights", "sums")}
        return {**tables, "tokens": torch.tensor(self._seen.rows)}


class AttentionShares(AttentionHistogram):
    """The same of probabilities divided by the largest of their row."""

    relative = True


def _finite(values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    if not all(bool(value.isfinite().all()) for value in values):
        raise InputError("the float model computes NaN or infinity on the calibration data")
    return values


_NOTHING = "calibration saw no token; every row of the data is empty"

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMax,
    "channels": Channels,
    "histogram": Histogram,
    "token-peaks": TokenPeaks,
    "sample": Sample,
    "attention-histogram": AttentionHistogram,
    "attention-shares": AttentionShares,
}
"""Observers by the name that recipes and methods use."""
