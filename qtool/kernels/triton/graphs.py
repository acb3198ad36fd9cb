"""Calls recorded as CUDA graphs. Small batches are bound by what it takes to launch kernels; a graph launches once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

KEPT = 16
"""Graphs that a function has at most; each holds the memory of its intermediate results."""
_SEEN = 256
"""Shapes that came once, and are remembered."""

Tensors = Mapping[str, torch.Tensor]


class Recording:
    """A call of a function of tensors on one GPU, recorded on a stream of its own.

    `pool` is memory that recordings share, for they run one at a time.
    """

    def __init__(self, function: Callable[..., Any], tensors: Tensors, pool: Any) -> None:
        self._device = next(iter(tensors.values())).device
        # torch's own stream for recording belongs to the GPU that was recorded on first.
        stream = torch.cuda.Stream(self._device)
        with torch.inference_mode(False), torch.no_grad():  # or later calls could not write into what is made here
            self._inputs = {name: tensor.clone() for name, tensor in tensors.items()}
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
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
        self._recorded: OrderedDict[Hashable, Recording] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._pool: Any = None
        self._turn = threading.Lock()  # a recording has one place for its inputs, whoever calls

    def call(self, function: Callable[..., Any], tensors: Tensors, words: Hashable = ()) -> Any:
        """`function(**tensors)`. `words` is what the result depends on beside numbers and shapes."""
        key = words, *((name, x.shape, x.dtype, x.device) for name, x in tensors.items())
        with self._turn, _on(next(iter(tensors.values()))):
            if key not in self._recorded and key not in self._seen:
                result = function(**tensors)  # compiles kernels; what fails here is not recorded next time
                self._seen[key] = None
                _forget(self._seen, _SEEN)
                return result
            if key not in self._recorded:
                self._pool = self._pool or torch.cuda.graph_pool_handle()
                self._recorded[key] = Recording(function, tensors, self._pool)
                del self._seen[key]
                _forget(self._recorded, KEPT)
            self._recorded.move_to_end(key)
            return self._recorded[key].play(tensors)


def _forget(known: "OrderedDict[Hashable, Any]", most: int) -> None:
    """Of those that were used longest ago."""
    while len(known) > most:
        known.popitem(last=False)


def _on(x: torch.Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
