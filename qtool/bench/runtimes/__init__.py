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
    `calibration` a file of batches, `max_tokens` the model's positions where it has a limit.
    """

    engine: str
    model: Path
    threads: int
    scratch: Path
    inputs: list[str]
    calibration: Path
    max_tokens: int | None = None

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
    """What a runner says of itself: version, threads in effect, bytes of its weights on disk, and more by name."""

    version: str
    threads: int
    size_bytes: int
    details: dict[str, str] = field(default_factory=dict)


class Runner(Protocol):
    """A loaded model."""

    facts: Facts

    def feed(self, batch: Batch) -> Any:
        """The batch as the engine takes it; not timed."""

    def run(self, feed: Any) -> Any:
        """Compute; this is timed."""

    def arrays(self, result: Any) -> dict[str, Any]:
        """Outputs by name as arrays; not timed."""
