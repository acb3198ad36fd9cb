"""Statistics: what observers learned, on disk, with the fingerprint of what they were learned from.

A statistics file is safetensors: one tensor `<observed module>|<observer>|<value>` for each value, and `fingerprint`,
the bytes of a JSON object with digests of the model, the data and the parts of the recipe that observers read. It is
reused only where all of that is the same, so one file serves many recipes and never the wrong one.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qtool.calibrate.observers import State
from qtool.errors import InputError

_FINGERPRINT = "fingerprint"


@dataclass(frozen=True)
class Statistics:
    """Observer states by `(module path, observer name)`."""

    states: Mapping[tuple[str, str], State]
    fingerprint: Mapping[str, Any]

    def state(self, path: str, observer: str) -> State:
        """Raises InputError when that module was not observed in that way."""
        try:
            return self.states[path, observer]
        except KeyError:
            raise InputError(f"the statistics have no '{observer}' values of {path}; calibrate again") from None

    def tensors(self) -> dict[str, torch.Tensor]:
        """As stored."""
        fingerprint = json.dumps(self.fingerprint, sort_keys=True).encode()
        tensors = {
            f"{path}|{observer}|{name}": value
            for (path, observer), state in self.states.items()
            for name, value in state.items()
        }
        return {**tensors, _FINGERPRINT: torch.frombuffer(bytearray(fingerprint), dtype=torch.uint8)}

    @classmethod
    def read(cls, path: Path) -> "Statistics":
        """Raises InputError for a file that is not one of ours."""
        from qtool.checkpoint import opened

        with opened(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return cls.of_tensors(tensors, str(path))

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor], where: str) -> "Statistics":
        """From what `tensors` gave; `where` they come from. Raises InputError for something else."""
        tensors = dict(tensors)
        try:
            fingerprint = dict(json.loads(bytes(tensors.pop(_FINGERPRINT).tolist())).items())
            states: dict[tuple[str, str], State] = {}
            for key, value in tensors.items():
                module, observer, name = key.split("|")
                states.setdefault((module, observer), {})[name] = value
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(f"{where} is not a statistics file of qtool") from error
        return cls(states, fingerprint)

    def require(self, fingerprint: Mapping[str, Any], where: str) -> None:
        """Raises InputError that names every entry in which this file differs from `fingerprint`."""
        different = [key for key in sorted(fingerprint) if self.fingerprint.get(key) != fingerprint[key]]
        if different:
            raise InputError(
                f"{where} was made with a different {', '.join(different)}; calibrate again for this model and data"
            )
