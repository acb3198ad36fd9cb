"""How each engine runs a model. A module has three functions, called in a worker:

`imports(request)` imports what running takes, so that memory can be told from the packages'; `prepare(request)` makes
files (exports, quantizes) in a process of its own, whose memory does not count; `load(request)` gives a `Runner`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qtool.bench.batches import Batch


@dataclass(frozen=True)
class Request:
    """Which model, on which engine, and how: what a worker is told at first.

    `scratch` is a folder for files of this model that its engines share, `inputs` the names of a batch's tensors,
    `calibration` a file of batches, `max_tokens` the model's positions where it has a limit. `device` is `cpu`, `cuda`
    or `cuda:N`; on a GPU `cold` says that its L2 cache is emptied before each timed call.
    """

    engine: str
    model: Path
    threads: int
    scratch: Path
    inputs: list[str]
    calibration: Path
    max_tokens: int | None = None
    device: str = "cpu"
    cold: bool = False

    def to_json(self) -> dict[str, Any]:
        """For a line of JSON."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Request":
        """What `to_json` gave."""
        paths = {key: Path(body[key]) for key in ("model", "scratch", "calibration")}
        return cls(**{**body, **paths})


@dataclass
class Facts:
    """What a runner says of itself: version, threads in effect, bytes of its weights on disk, and more by name.

    `read_bytes` are those of all weights in memory that a forward multiplies by: no tables that it looks rows up in.
    """

    version: str
    threads: int
    size_bytes: int
    details: dict[str, str] = field(default_factory=dict)
    read_bytes: int | None = None


class Stateless:
    """An engine whose feeds stay as they are, and that keeps no cache; it is given no shape that takes one."""

    def ready(self, feed: Any) -> None:
        """Nothing has changed."""


class Runner(Protocol):
    """A loaded model."""

    facts: Facts

    def feed(self, batch: Batch, context: int = 0) -> Any:
        """The batch as the engine takes it, with a cache of the first `context` tokens if there are any; not timed."""

    def ready(self, feed: Any) -> None:
        """Undo what the call before changed in a feed; not timed."""

    def run(self, feed: Any) -> Any:
        """Compute; this is timed, and nothing else is. On a GPU it need not wait for the result."""

    def arrays(self, result: Any) -> dict[str, Any]:
        """Outputs by name as arrays; not timed."""
