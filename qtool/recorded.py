"""The forward of a whole integer encoder as a CUDA graph, where nothing is asked for but what its head says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qtool import kernels
from qtool.nn.integer.module import gives_integers
from qtool.nn.module import fleeting
from qtool.nn.plan import Plan, kept_plan

_READ = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})


class GraphPlan(Plan):
    """Recordings of a model's forward, as long as all of its modules and tensors are what they were.

    A recording also reads what modules have made of their weights, plans of encoders and operands of products: these
    are kept here, and recordings end when a module has made them anew, as it does after a move.
    """

    def __init__(self, model: Any) -> None:
        from qtool.kernels.triton.graphs import Graphs

        super().__init__([model], called=True)
        self.graphs = Graphs()
        self._made: list[Any] | None = None

    def note(self) -> None:
        """Keep what modules have made by now."""
        self._made = self._made_now()

    def holds(self, roots: Sequence[nn.Module]) -> bool:
        """See `Plan`; also whether modules have what they had made."""
        if not super().holds(roots):
            return False
        return self._made is None or all(a is b for a, b in zip(self._made, self._made_now(), strict=True))

    def _made_now(self) -> list[Any]:
        return [module.__dict__.get(name) for module in self._inner for name in ("_plan", "_operand")]


def recorded(model: Any, forward: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    """`forward(**given)`, recorded and played again where it can be.

    It cannot where somebody watches modules, wants hidden states or a loss, or records a graph of his own.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    tensors = {name: value for name, value in asked.items() if isinstance(value, torch.Tensor)}
    words = {name: value for name, value in asked.items() if name not in tensors}
    if not _recordable(model, tensors, words):
        return forward(**given)
    plan = kept_plan(model, [model], lambda: GraphPlan(model), backends=("triton",))
    if plan is None:
        return forward(**given)
    key = model.config.return_dict, *sorted(words.items())
    result = plan.graphs.call(lambda **own: forward(**words, **own), tensors, key)
    plan.note()
    return result


def _recordable(model: Any, tensors: Mapping[str, torch.Tensor], words: Mapping[str, Any]) -> bool:
    if "input_ids" not in tensors or not tensors.keys() <= _READ:
        return False
    if any(not isinstance(value, bool) for value in words.values()) or words.get("output_hidden_states"):
        return False
    settled = model.config.output_hidden_states and words.get("output_hidden_states") is None
    if settled or fleeting() or gives_integers():
        return False
    return kernels.backend(tensors["input_ids"].device).name == "triton" and _on_gpu(tensors)


def _on_gpu(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether the tensors are there, and nobody else is recording."""
    return all(x.is_cuda for x in tensors.values()) and not torch.cuda.is_current_stream_capturing()
