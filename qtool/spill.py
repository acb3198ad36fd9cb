"""Hidden states of calibration batches in files, for runs whose memory is too small for them."""

import tempfile
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from qtool.artifact import writing_failed
from qtool.device import mapped
from qtool.stream import Call

State = tuple[torch.Tensor, tuple[Call, ...]]
"""What enters a block, `[batch, tokens, hidden]`, and how the model calls each block."""

_LEAST = 1 << 16  # bytes of a tensor that is worth a file


class SpilledStates(MutableSequence[State]):
    """A list of states whose tensors lie in nameless files of `folder`, mapped: the system drops pages as it likes.

    A file goes when its tensor goes, or its process, however that ends. Raises UnavailableError when `folder` has no
    space left.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._states: list[State] = []

    @overload
    def __getitem__(self, index: int) -> State: ...
    @overload
    def __getitem__(self, index: slice) -> MutableSequence[State]: ...
    def __getitem__(self, index: int | slice) -> State | MutableSequence[State]:
        return self._states[index]

    def __setitem__(self, index: Any, state: Any) -> None:
        hidden, calls = state
        known = self._states[index][1]
        self._states[index] = self._on_disk(hidden), known if calls is known else self._calls_on_disk(calls)

    def insert(self, index: int, state: State) -> None:
        """As a list does."""
        hidden, calls = state
        self._states.insert(index, (self._on_disk(hidden), self._calls_on_disk(calls)))

    def __delitem__(self, index: Any) -> None:
        del self._states[index]

    def __len__(self) -> int:
        return len(self._states)

    def _calls_on_disk(self, calls: tuple[Call, ...]) -> tuple[Call, ...]:
        """Most blocks are called with the same masks: those are written once."""
        done: dict[int, torch.Tensor] = {}

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = self._on_disk(tensor)
            return done[id(tensor)]

        return tuple(call.moved(lambda value: mapped(value, moved)) for call in calls)

    def _on_disk(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values, mapped; what is small stays as it is."""
        if tensor.numel() * tensor.element_size() < _LEAST:
            return tensor
        plain = tensor.detach().contiguous()
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.write(plain.flatten().view(torch.uint8).numpy().data)
                file.flush()
                mapped = np.memmap(file, np.uint8, mode="c")
        except OSError as error:
            raise writing_failed(self.folder, error) from error
        return torch.from_numpy(mapped).view(plain.dtype).view(plain.shape)
