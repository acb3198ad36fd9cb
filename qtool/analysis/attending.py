"""Attention of transformers' registry in plain float32, whose probabilities can be looked at and changed.

What the model's own attention computes is computed once more with the matrix of probabilities in hand: scores, mask,
softmax in float32, and behind it whatever is asked for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qtool.errors import InputError
from qtool.hf import plain_attention

Change = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of a module's path, its probabilities float32 `[batch, heads, queries, keys]` and which pairs exist (bool, broadcast
to them): the probabilities to go on with."""


class Attending:
    """A loaded float model whose attention can be changed, batch by batch.

    `modules` are the paths of those that attend, in the order in which they run.
    """

    def __init__(self, model: Any) -> None:
        """Raises InputError for a class that does not attend through transformers' registry, or only partly."""
        self.model = model
        self._paths = {module: path for path, module in model.named_modules()}
        self.modules = self._called()

    def _called(self) -> list[str]:
        """Found by running two tokens: what a class says of itself is not always so."""
        seen: list[str] = []

        def note(path: str, probabilities: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
            seen.append(path)
            return probabilities

        ids = torch.ones((1, 2), dtype=torch.int64, device=self.model.device)
        name, layers = type(self.model).__name__, getattr(self.model.config, "num_hidden_layers", 1)
        if self.model._can_set_attn_implementation():
            with torch.inference_mode(), self.changed(note, ids):
                self.model(input_ids=ids, attention_mask=ids)
        if len(set(seen)) < layers:
            raise InputError(
                f"{name} does not attend through transformers' registry of attention functions: its attention cannot "
                "be studied"
            )
        return list(dict.fromkeys(seen))

    @contextmanager
    def changed(self, change: Change, present: torch.Tensor) -> Iterator[None]:
        """Inside, the model attends with what `change` gives. `present` `[batch, tokens]` is the mask of the batch:
        rows of padding do not exist either."""
        queries = present.bool()[:, None, :, None]

        def product(module: Any, probabilities: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            if probabilities.shape[2:] != (present.shape[1], present.shape[1]):
                raise InputError(f"{type(module).__name__} attends to another text: only self-attention can be studied")
            return change(self._paths[module], probabilities, seen & queries.to(seen.device))

        before = self.model.config._attn_implementation
        self.model.set_attn_implementation(plain_attention(product))
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)
