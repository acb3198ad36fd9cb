"""Observers: what is kept of a stream of activations.

An observer sees `[tokens, features]` rows one batch at a time and keeps a state of fixed size, so memory does not grow
with the data. States are dictionaries of tensors: that is how they are written to a statistics file and read back.
"""

from abc import ABC, abstractmethod

import torch

from qtool.errors import InputError

State = dict[str, torch.Tensor]


class Observer(ABC):
    """Watches one activation tensor of the float model."""

    @abstractmethod
    def update(self, rows: torch.Tensor) -> None:
        """Take in `[tokens, features]` float rows of real (not padded) tokens."""

    @abstractmethod
    def state(self) -> State:
        """Everything learned so far."""


class MinMax(Observer):
    """The smallest and the largest value, and the tokens seen. State: `min`, `max` float32, `tokens` int64."""

    def __init__(self) -> None:
        self._min, self._max, self._tokens = torch.tensor(float("inf")), torch.tensor(float("-inf")), 0

    def update(self, rows: torch.Tensor) -> None:
        """Raises InputError when an activation is NaN or infinite: a range would be meaningless."""
        if rows.numel() == 0:
            return
        low, high = torch.aminmax(rows.float())
        if not (low.isfinite() and high.isfinite()):
            raise InputError("the float model computes NaN or infinity on the calibration data")
        self._min, self._max = torch.minimum(self._min, low), torch.maximum(self._max, high)
        self._tokens += len(rows)

    def state(self) -> State:
        """Raises InputError when nothing was seen."""
        if self._tokens == 0:
            raise InputError("calibration saw no token; every row of the data is empty")
        return {"min": self._min, "max": self._max, "tokens": torch.tensor(self._tokens)}


OBSERVERS: dict[str, type[Observer]] = {"minmax": MinMax}
"""Observers by the name that recipes and methods use."""
