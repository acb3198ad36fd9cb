"""Calls recorded as CUDA graphs. Small batches are bound by what it takes to launch kernels; a graph launches once."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

KEPT = 16
"""Graphs that a function has at most; each holds the memory of its intermediate results."""

Tensors = Mapping[str, torch.Tensor]


class Recording:
    """A call of a function of tensors, recorded; `pool` is memory that recordings share, for they run one at a time."""

    def __init__(self, function: Callable[..., Any], tensors: Tensors, pool: Any) -> None:
        with torch.inference_mode(False), torch.no_grad():  # or later calls could not write into what is made here
            self._inputs = {name: tensor.clone() for name, tensor in tensors.items()}
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._output = function(**self._inputs)

    def play(self, tensors: Tensors) -> Any:
        """What the function returns for other numbers in tensors of the same shapes."""
        for name, tensor in tensors.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return tree_map_only(torch.Tensor, torch.Tensor.clone, self._output)


class Graphs:
    """Recordings of one function, by the shapes of its tensors. A shape is recorded the second time that it comes.

    The function must not wait for the device, and what it reads beside its tensors must stay where it is.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self._pool: Any = None

    def call(self, function: Callable[..., Any], tensors: Tensors, words: Hashable = ()) -> Any:
        """`function(**tensors)`. `words` is what the result depends on beside numbers and shapes."""
        key = words, *((name, x.shape, x.dtype, x.device) for name, x in tensors.items())
        if key not in self._known:
            self._known[key] = None  # this call compiles kernels
            self._forget()
            return function(**tensors)
        if self._known[key] is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._known[key] = Recording(function, tensors, self._pool)
        self._known.move_to_end(key)
        recording = self._known[key]
        assert recording is not None
        return recording.play(tensors)

    def _forget(self) -> None:
        """Of those that were used longest ago."""
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
