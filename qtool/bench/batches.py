"""What the engines are given: batches of token ids in a file that every worker reads, and what is compared of outputs.

Needs numpy alone, so that a worker's memory is its engine's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Batch = dict[str, NDArray[np.int64]]
"""A model input's name → int64 `[sequences, tokens]`; `attention_mask` is always there."""

Outputs = dict[str, NDArray[np.float32]]

OUTPUTS = ("logits", "prediction_logits", "start_logits", "end_logits", "last_hidden_state")
"""The outputs of transformers' models that are computed by an exported model and compared."""

COMPARED_ROWS = 16
"""Tokens of a batch at most whose outputs are compared, where a model has outputs for each: vocabularies are large."""

FAR_BELOW = -1e30
"""The logit of an answer that starts on padding: equal on all sides, and never the largest."""


@dataclass(frozen=True)
class Workload:
    """The batches of one shape; `name` is the shape as it is written on the command line.

    With a `context` a call takes the last token of each text, and a cache holds so many before it.
    """

    name: str
    batches: list[Batch]
    ragged: bool = False
    context: int = 0

    @property
    def sequences(self) -> int:
        """In one pass over all batches."""
        return sum(len(batch["attention_mask"]) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """Real ones, padding not counted, nor what a cache holds, in one pass over all batches."""
        return sum(int(batch["attention_mask"][:, self.context :].sum()) for batch in self.batches)

    @property
    def padded_tokens(self) -> int:
        """With padding, in one pass over all batches."""
        return sum(batch["attention_mask"][:, self.context :].size for batch in self.batches)


def write(workload: Workload, path: Path) -> None:
    """One safetensors file: tensors `NUMBER.INPUT`."""
    from safetensors.numpy import save_file

    named = {
        f"{number}.{name}": np.ascontiguousarray(value)
        for number, batch in enumerate(workload.batches)
        for name, value in batch.items()
    }
    about = {"name": workload.name, "ragged": str(int(workload.ragged)), "context": str(workload.context)}
    save_file(named, path, metadata=about)


def read(path: Path) -> Workload:
    """What `write` wrote."""
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    batches: list[Batch] = [{} for _ in {name.partition(".")[0] for name in tensors}]
    for name, value in tensors.items():
        number, _, own = name.partition(".")
        batches[int(number)][own] = value
    return Workload(about["name"], batches, bool(int(about["ragged"])), int(about["context"]))


def comparable(outputs: Mapping[str, Any], mask: NDArray[np.int64]) -> Outputs:
    """Rows of float32 that can be compared between engines: nothing of padding, and of tokens at most `COMPARED_ROWS`.

    `[sequences, classes]` stays; of `[sequences, tokens, n]` real tokens are taken, evenly spread; the padding of
    `start_logits` and `end_logits` is far below everything.
    """
    found: Outputs = {}
    for name, value in outputs.items():
        array = np.asarray(value, dtype=np.float32)
        if array.ndim == 3 and array.shape[:2] == mask.shape:
            real = array[mask.astype(bool)]
            array = real[np.linspace(0, len(real) - 1, min(len(real), COMPARED_ROWS)).astype(int)]
        elif name in ("start_logits", "end_logits"):
            array = np.where(mask.astype(bool), array, np.float32(FAR_BELOW))
        found[name] = np.ascontiguousarray(array)
    return found
