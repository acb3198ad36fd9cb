"""Observers: what is kept of a stream of activations.

An observer sees `[tokens, features]` rows one batch at a time and keeps a state of fixed size, so memory does not grow
with the data. States are dictionaries of tensors: that is how they are written to a statistics file and read back.

Where ranks share the batches each has an observer of its own, and what they saw is put together: counts and extremes in
any order, sums of floats in the order of the batches (they grow with the data until then, by one term a batch). So one
rank and many give the same state, bit by bit.
"""

from abc import ABC, abstractmethod

import torch

from qtool.calibrate.probabilities import Distribution
from qtool.errors import InputError

State = dict[str, torch.Tensor]


class Observer(ABC):
    """Watches one activation tensor of the float model, on the device where it is computed."""

    def begin(self, batch: int, first: int) -> None:  # noqa: B027 (who adds nothing up need not know)
        """What comes next belongs to a batch of that number, and its first row is number `first` of all.

        Only where ranks share the batches; without it, batches come one after the other.
        """

    @abstractmethod
    def update(self, rows: torch.Tensor) -> None:
        """Take in `[tokens, features]` float rows of real (not padded) tokens; all batches come from one device."""

    @abstractmethod
    def parts(self) -> State:
        """What `absorb` of another observer takes; empty when nothing was seen."""

    @abstractmethod
    def absorb(self, parts: State) -> None:
        """Take in what an observer of other batches has seen; both were told which by `begin`."""

    @abstractmethod
    def state(self) -> State:
        """Everything learned so far, on that device."""


class OrderedSum:
    """A sum of float64 tensors of one shape, added in the order of their places, whoever has them."""

    def __init__(self) -> None:
        self._total: torch.Tensor | float = 0.0
        self._place: tuple[int, int] | None = None
        self._terms: dict[tuple[int, int], torch.Tensor] = {}

    def begin(self, batch: int) -> None:
        """Terms that come next are kept apart until all are there."""
        self._place = batch, 0

    def add(self, term: torch.Tensor) -> None:
        """The next term."""
        if self._place is None:
            self._total = self._total + term
        else:
            self._terms[self._place] = term
            self._place = self._place[0], self._place[1] + 1

    def parts(self) -> State:
        """All terms, with their places `[terms, 2]`."""
        places = torch.tensor(list(self._terms), dtype=torch.int64)
        return {"places": places, "terms": torch.stack(list(self._terms.values()))} if self._terms else {}

    def absorb(self, parts: State) -> None:
        """Take over the terms of another."""
        if parts:
            places = ((int(batch), int(number)) for batch, number in parts["places"])
            self._terms.update(zip(places, parts["terms"], strict=True))

    def total(self) -> torch.Tensor:
        """The sum so far."""
        total = self._total
        for _, term in sorted(self._terms.items(), key=lambda item: item[0]):
            total = total + term
        return torch.as_tensor(total)


def _inner(parts: State, name: str) -> State:
    """The parts of something inside, named `name.…`."""
    return {key.removeprefix(f"{name}."): value for key, value in parts.items() if key.startswith(f"{name}.")}


def _outer(parts: State, name: str) -> State:
    return {f"{name}.{key}": value for key, value in parts.items()}


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

    def parts(self) -> State:
        """The state."""
        return {} if self._range is None else self.state()

    def absorb(self, parts: State) -> None:
        """The wider range of both."""
        if not parts:
            return
        low, high = self._range or (parts["min"], parts["max"])
        self._range = torch.minimum(low, parts["min"]), torch.maximum(high, parts["max"])
        self._tokens += int(parts["tokens"])

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
        self._sum = OrderedSum()
        self._tokens = 0

    def begin(self, batch: int, first: int) -> None:
        """See `Observer`."""
        self._sum.begin(batch)

    def update(self, rows: torch.Tensor) -> None:
        """Raises InputError when an activation is NaN or infinite."""
        if rows.numel() == 0:
            return
        low, high = _finite(rows.float().aminmax(dim=0))
        if self._range is not None:
            low, high = torch.minimum(self._range[0], low), torch.maximum(self._range[1], high)
        self._range, self._tokens = (low, high), self._tokens + len(rows)
        self._sum.add(rows.sum(0, dtype=torch.float64))

    def parts(self) -> State:
        """The range, and the terms of the mean."""
        if self._range is None:
            return {}
        low, high = self._range
        return {"min": low, "max": high, "tokens": torch.tensor(self._tokens), **_outer(self._sum.parts(), "sum")}

    def absorb(self, parts: State) -> None:
        """The wider ranges of both, and all terms."""
        if not parts:
            return
        low, high = self._range or (parts["min"], parts["max"])
        self._range = torch.minimum(low, parts["min"]), torch.maximum(high, parts["max"])
        self._tokens += int(parts["tokens"])
        self._sum.absorb(_inner(parts, "sum"))

    def state(self) -> State:
        """Raises InputError when nothing was seen."""
        if self._range is None:
            raise InputError(_NOTHING)
        mean = self._sum.total() / self._tokens
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
        self._sum = OrderedSum()
        self._exponent = torch.empty(0, dtype=torch.int32)
        self._tokens = 0

    def begin(self, batch: int, first: int) -> None:
        """See `Observer`."""
        self._sum.begin(batch)

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
        self._sum.add(rows.sum(0, dtype=torch.float64))
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

    def parts(self) -> State:
        """Counts and the ends of their ranges, and the terms of the mean."""
        if self._counts is None:
            return {}
        own = {"counts": self._counts, "exponent": self._exponent, "tokens": torch.tensor(self._tokens)}
        return {**own, **_outer(self._sum.parts(), "sum")}

    def absorb(self, parts: State) -> None:
        """Counts on the wider bins of both: bins are halves of each other, so that counts stay exact."""
        if not parts:
            return
        if self._counts is None:
            self._counts, self._exponent = torch.zeros_like(parts["counts"]), parts["exponent"].clone()
        other = Histogram()
        other._counts, other._exponent = parts["counts"].clone(), parts["exponent"]
        self._widen(other._exponent - self._exponent)
        other._widen(self._exponent - other._exponent)
        self._counts += other._counts
        self._tokens += int(parts["tokens"])
        self._sum.absorb(_inner(parts, "sum"))

    def state(self) -> State:
        """Raises InputError when nothing was seen."""
        if self._counts is None:
            raise InputError(_NOTHING)
        width = torch.ldexp(torch.ones_like(self._exponent, dtype=torch.float32), self._exponent - 9)
        mean = self._sum.total() / self._tokens
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
        self._first: int | None = None
        self._numbers: list[torch.Tensor] = []

    def begin(self, batch: int, first: int) -> None:
        """See `Observer`."""
        self._first = first

    def update(self, rows: torch.Tensor) -> None:
        """Raises InputError when an activation is NaN or infinite."""
        (rows,) = _finite((rows.float(),))
        first = self._tokens if self._first is None else self._first
        offset = -first % self._stride
        self._rows.append(rows[offset :: self._stride].clone())
        self._numbers.append(torch.arange(first, first + len(rows))[offset :: self._stride])
        self._tokens += len(rows)
        if self._first is not None:
            self._first += len(rows)
        self._thin()

    def _thin(self) -> None:
        """Keep every other one until at most `SIZE` stay."""
        while sum(len(part) for part in self._rows) > self.SIZE:
            self._stride *= 2
            numbers = torch.cat(self._numbers)
            kept = numbers % self._stride == 0
            self._rows, self._numbers = [torch.cat(self._rows)[kept.to(self._rows[0].device)]], [numbers[kept]]

    def parts(self) -> State:
        """Rows with their numbers among all."""
        if not self._tokens:
            return {}
        sizes = torch.tensor([self._stride, self._tokens])
        return {"rows": torch.cat(self._rows), "numbers": torch.cat(self._numbers), "sizes": sizes}

    def absorb(self, parts: State) -> None:
        """Rows of both in the order of their numbers, as many as fit."""
        if not parts:
            return
        stride, tokens = parts["sizes"].tolist()
        self._stride, self._tokens = max(self._stride, stride), self._tokens + tokens
        rows, numbers = torch.cat([*self._rows, parts["rows"]]), torch.cat([*self._numbers, parts["numbers"]])
        order = numbers.argsort()
        order = order[numbers[order] % self._stride == 0]
        self._rows, self._numbers = [rows[order]], [numbers[order]]
        self._thin()

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
        self._counts: torch.Tensor | None = None
        self._tokens = 0
        self._sums = {name: OrderedSum() for name in ("mass", "weights", "sums")}

    def begin(self, batch: int, first: int) -> None:
        """See `Observer`."""
        for total in self._sums.values():
            total.begin(batch)

    def update(self, rows: torch.Tensor) -> None:
        """Take in float `[tokens, heads, keys]`, the rows of real tokens, negative where a query may not look.

        Raises InputError when one is NaN or infinite.
        """
        if rows.numel() == 0:
            return
        found = Distribution.of(*_finite((rows,)), relative=self.relative)
        self._counts = found.counts if self._counts is None else self._counts + found.counts
        self._tokens += found.rows
        for name, total in self._sums.items():
            total.add(getattr(found, name))

    def parts(self) -> State:
        """Counts, and the terms of the other tables."""
        if self._counts is None:
            return {}
        own = {"counts": self._counts, "tokens": torch.tensor(self._tokens)}
        for name, total in self._sums.items():
            own |= _outer(total.parts(), name)
        return own

    def absorb(self, parts: State) -> None:
        """What both have seen."""
        if not parts:
            return
        self._counts = parts["counts"] if self._counts is None else self._counts + parts["counts"]
        self._tokens += int(parts["tokens"])
        for name, total in self._sums.items():
            total.absorb(_inner(parts, name))

    def state(self) -> State:
        """Raises InputError when nothing was seen."""
        if self._counts is None:
            raise InputError(_NOTHING)
        tables = {name: total.total() for name, total in self._sums.items()}
        return {"counts": self._counts, **tables, "tokens": torch.tensor(self._tokens)}


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
