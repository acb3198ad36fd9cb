"""SmoothQuant (Xiao et al. 2023) for float models: ranges move from activations into weights, and nothing is left to do
at run time.

What feeds a matrix (a norm's weight, the rows of the matrix before it) is divided channel by channel, and the columns
of all that reads it are multiplied: the float model stays the same up to rounding, and its activations become easier.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qtool.anatomy import Feed, Part, Unit
from qtool.calibrate.statistics import Statistics
from qtool.numerics import QuantSpec
from qtool.rounding.smooth import smoothing, tuned_smoothing
from qtool.stream import Reader

PEAKS, SAMPLE = "channels", "sample"
"""The observers that it needs, at `path:peaks` and `path:sample` of one reader of each feed."""


def observers(feeds: Sequence[Feed], *, tuned: bool) -> dict[str, str]:
    """What is watched of a unit whose `feeds` take part."""
    sites: dict[str, str] = {}
    for feed in feeds:
        sites[f"{feed.readers[0].path}:peaks"] = PEAKS
        if tuned:
            sites[f"{feed.readers[0].path}:sample"] = SAMPLE
    return sites


class Migration:
    """The float model's tensors after migration, computed when a unit's first one is read."""

    def __init__(
        self,
        feeds: Sequence[tuple[Unit, Sequence[Feed]]],
        modules: Mapping[str, Mapping[str, Any]],
        statistics: Statistics,
        weights: Reader,
        *,
        alpha: float,
        tuning: int,
    ) -> None:
        self._feeds, self._modules, self._statistics, self._weights = feeds, modules, statistics, weights
        self._alpha, self._tuning = alpha, tuning
        self._factors: dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = {}
        self._largest: dict[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """A tensor of the model by name."""
        tensor = self._weights(name)
        known = next(((unit, feeds) for unit, feeds in self._feeds if unit.owns(name)), None)
        if known is None:
            return tensor
        rows, columns = self._unit(*known)
        if name not in rows and name not in columns:
            return tensor
        scaled = tensor.double()
        if name in rows:
            scaled = scaled * rows[name]
        if name in columns:
            scaled = scaled * columns[name]
        return scaled.to(tensor.dtype)

    def largest(self, path: str) -> torch.Tensor | None:
        """The largest magnitude that enters a module that was read, float64 scalar; None where nothing moved."""
        return self._largest.get(path)

    def _unit(self, unit: Unit, feeds: Sequence[Feed]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Factors of a unit's tensors, shaped to be multiplied: those of channels that leave and that enter."""
        if unit.name not in self._factors:
            rows: dict[str, torch.Tensor] = {}
            columns: dict[str, torch.Tensor] = {}
            for feed in feeds:
                self._move(feed, rows, columns)
            self._factors[unit.name] = rows, columns
        return self._factors[unit.name]

    def _move(self, feed: Feed, rows: dict[str, torch.Tensor], columns: dict[str, torch.Tensor]) -> None:
        """One feed. What moved before is part of the matrices that it sees."""
        matrices = {part.path: self._matrix(part, rows) for part in feed.readers}
        inputs = next(iter(matrices.values())).shape[1]
        channels = self._channels(feed)
        owner = _owners(inputs, channels, feed.head_size)
        division = self._division(feed, list(matrices.values()), owner)
        for part in feed.readers:
            name = f"{part.path}.weight"
            columns[name] = division[:, None] if part.transposed else division
            self._largest[part.path] = (self._peaks(feed) / division).amax()
        own = torch.ones(channels, dtype=torch.float64)
        own[owner] = 1 / division
        self._divide(feed.source, own, rows)

    def _matrix(self, part: Part, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The rows of a part, `[out, in]` float64, its own division applied."""
        name = f"{part.path}.weight"
        weight = self._weights(name).double()
        weight = weight * rows[name] if name in rows else weight
        weight = weight.t() if part.transposed else weight
        return weight if part.rows is None else torch.cat([weight[stretch] for stretch in part.rows])

    def _channels(self, feed: Feed) -> int:
        if isinstance(feed.source, str):
            return len(self._weights(f"{feed.source}.weight"))
        return len(self._matrix(feed.source, {}))

    def _division(self, feed: Feed, matrices: list[torch.Tensor], owner: torch.Tensor) -> torch.Tensor:
        """What each input is divided by, the same for inputs of one channel."""
        path = feed.readers[0].path

        def share(logs: torch.Tensor) -> torch.Tensor:
            count = int(owner.max()) + 1
            sums = torch.zeros(count, dtype=logs.dtype).index_add(0, owner, logs)
            sizes = torch.zeros(count, dtype=logs.dtype).index_add(0, owner, torch.ones_like(logs))
            return (sums / sizes)[owner]

        start = share(smoothing(self._peaks(feed), matrices, self._alpha).log()).exp()
        if not self._tuning:
            return start
        sample = self._statistics.state(f"{path}:sample", SAMPLE)["rows"]
        levels = self._levels(path)
        return tuned_smoothing(sample, matrices, start, steps=self._tuning, levels=levels, share=share)

    def _peaks(self, feed: Feed) -> torch.Tensor:
        """The largest magnitude of each input, float64 `[in]`."""
        state = self._statistics.state(f"{feed.readers[0].path}:peaks", PEAKS)
        return torch.maximum(state["max"], -state["min"]).double()

    def _levels(self, path: str) -> tuple[int | None, int]:
        """The largest codes of a linear's inputs and weights. A matrix that stays float is as fine as INT8 here."""
        description = self._modules.get(path)
        if description is None:
            return 127, 127
        activations = description["activations"]
        return None if activations == "float" else 127, QuantSpec.parse(description["weights"]).qmax

    def _divide(self, source: str | Part, factor: torch.Tensor, rows: dict[str, torch.Tensor]) -> None:
        """Multiply the channels that leave a norm or a part."""
        if isinstance(source, str):
            rows[f"{source}.weight"] = rows[f"{source}.bias"] = factor
            return
        weight = self._weights(f"{source.path}.weight")
        outputs = weight.shape[1 if source.transposed else 0]
        whole = torch.ones(outputs, dtype=torch.float64)
        places = torch.arange(outputs)
        whole[places if source.rows is None else torch.cat([places[stretch] for stretch in source.rows])] = factor
        rows[f"{source.path}.weight"] = whole if source.transposed else whole[:, None]
        rows[f"{source.path}.bias"] = whole


def _owners(inputs: int, channels: int, head_size: int) -> torch.Tensor:
    """The channel that each input is, int64 `[in]`: grouped heads read one head's channels several times."""
    places = torch.arange(inputs)
    repeats = inputs // channels
    return places // (repeats * head_size) * head_size + places % head_size if repeats > 1 else places
