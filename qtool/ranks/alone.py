"""A process that works alone: what one of several does, where there are no others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Ranks:
    """This process alone; `Group` is one of several."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` pieces of work are this rank's."""
        return range(self.rank, count, self.size)

    def owner(self, piece: int) -> int:
        """Which rank a piece belongs to."""
        return piece % self.size

    def exchange(self, what: str, mine: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """What every rank gave, by rank: all of them call this, and each gets all.

        `what` it is, in a word, goes along, here and wherever all ranks make a call together. Ranks that are not at the
        same call are a bug: AssertionError, which says where each is.
        """
        return [dict(mine)]

    def agree(self, what: str, facts: Mapping[str, Any]) -> None:
        """Raises InputError, naming what differs, unless all ranks have the same JSON-clean facts."""

    def told(self, what: str, value: Any) -> Any:
        """The first rank's JSON-clean value."""
        return value

    def fetch(self, file: Path, owner: int) -> None:
        """Let the first rank have the file of another one, the owner: all call this, each with its own path of it.

        Raises UnavailableError where the first one has no room for it.
        """
        raise AssertionError("there is no other rank")

    def check(self) -> None:
        """Raises what ended another rank."""
