"""How many operations the matrix products of a model take, by the shapes of its layers alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtool.bench.batches import Workload
from qtool.errors import InputError

_BATCH, _TOKENS = 2, 5  # of the forward that shows which layers see every token and which one a text


@dataclass(frozen=True)
class Products:
    """Multiply-adds of a model: `per_token` and `per_text` in its linear layers, and in attention `widths`, the
    channels of all heads, block by block: each pair of a query and a key that it sees takes two of each channel.

    A token sees all others, with `causal` those before it and itself, with `window` at most so many of them.
    """

    per_token: int
    per_text: int
    widths: tuple[int, ...]
    causal: bool = False
    window: int | None = None

    def operations(self, tokens: int, context: int = 0) -> int:
        """Of one text, whose `tokens` follow `context` others that a cache holds. A multiply-add is two operations."""
        pairs = sum(self._seen(context + number, context + tokens) for number in range(tokens))
        return 2 * (self.per_token * tokens + self.per_text + 2 * sum(self.widths) * pairs)

    def _seen(self, place: int, total: int) -> int:
        """Keys that the token at `place` of `total` attends to."""
        seen = place + 1 if self.causal else total
        return seen if self.window is None else min(seen, self.window)

    def of(self, workload: Workload) -> int:
        """Of one pass over the batches of a workload; padding takes none."""
        lengths = [int(length) for batch in workload.batches for length in batch["attention_mask"].sum(1)]
        known = {length: self.operations(length - workload.context, workload.context) for length in set(lengths)}
        return sum(known[length] for length in lengths)


def products_of(folder: Path) -> Products:
    """Of a model folder: the float model that its config describes, without weights and without its removed heads.

    Attention is counted for the types of qtool's table; of others only the linear layers.
    """
    import torch
    import transformers

    from qtool import artifact, pruning
    from qtool.checkpoint import load_config

    config = load_config(folder)
    with torch.device("meta"):
        model = getattr(transformers, config.architectures[0])(config).eval()
    if artifact.is_artifact(folder) and (gone := artifact.pruned_heads(artifact.quantization_config(folder))):
        pruning.shrink(model, gone)
    return counted(model)


def counted(model: Any) -> Products:
    """Of a whole transformers model on the meta device."""
    from qtool.anatomy import FAMILIES

    family = FAMILIES.get(model.config.model_type)
    causal = family is not None and family.decoder
    per_token, per_text = _linear(model)
    window = getattr(model.config, "sliding_window", None) if causal else None
    return Products(per_token, per_text, _widths(model), causal, window)


def _linear(model: Any) -> tuple[int, int]:
    """Multiply-adds a token and a text, by a forward that computes nothing and shows each layer's rows."""
    import torch

    from qtool.anatomy import matrix_kind

    found = [0, 0]

    def saw(module: Any, given: Sequence[Any], result: Any) -> None:
        rows = given[0].shape[:-1].numel()
        if rows not in (_BATCH, _BATCH * _TOKENS):
            raise InputError(f"a layer of {type(model).__name__} sees {rows} of {_BATCH * _TOKENS} tokens")
        found[rows == _BATCH] += module.weight.numel()

    layers = [module for module in model.modules() if matrix_kind(module) in ("linear", "conv1d")]
    hooks = [layer.register_forward_hook(saw) for layer in layers]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(_BATCH, _TOKENS, dtype=torch.int64, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0], found[1]


def _widths(model: Any) -> tuple[int, ...]:
    """What the output projection of each block's attention takes is the context of all of its heads."""
    from qtool.anatomy import anatomy

    outputs = [part for _, part in anatomy(model).parts() if part.name == "attention.output"]
    return tuple(model.get_submodule(part.path).weight.shape[0 if part.transposed else 1] for part in outputs)
