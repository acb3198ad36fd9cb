"""Calls recorded as CUDA graphs. Small batches are bound by what it takes to launch kernels; a graph launches once."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

KEPT = 16
"""Graphs that a function has at most; each holds the memory of its intermediate results."""
STALE = 256
"""Calls after which a graph that was not among them gives way to another. To record takes as long as several calls:
texts of more lengths than there are graphs would else only push one another out."""
_SEEN = 256
"""Shapes that came once, and are remembered."""

Tensors = Mapping[str, torch.Tensor]


_CAPTURING = threading.Lock()
"""One recording at a time in a process, whichever models and threads make them: each begins by waiting for the GPU."""


class Place:
    """Where recordings are made: a stream, and memory that they share, for they run one at a time."""

    def __init__(self, x: torch.Tensor) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        # torch's own stream for recording belongs to the GPU that was recorded on first.
        self.stream: Any = torch.cuda.Stream(x.device) if x.is_cuda else None


class Recording:
    """A call of a function of tensors on one GPU. What it writes is not written yet."""

    def __init__(self, function: Callable[..., Any], tensors: Tensors, place: Place) -> None:
        device = next(iter(tensors.values())).device
        with torch.inference_mode(False), torch.no_grad():  # or later calls could not write into these
            self._inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        self._graph = torch.cuda.CUDAGraph()
        # A recording that fails leaves its stream behind as the current one.
        ours = torch.cuda.stream(torch.cuda.current_stream(device))
        graph = torch.cuda.graph(self._graph, pool=place.pool, stream=place.stream, capture_error_mode="thread_local")
        # cuBLAS keeps memory for each stream, which torch takes away with any graph of that stream: each gets its own.
        _forget_workspaces()
        try:
            with ours, graph:
                self._output = function(**self._inputs)
        finally:
            _forget_workspaces()

    def play(self, tensors: Tensors) -> Any:
        """What the function returns for other numbers in tensors of the same shapes."""
        for name, tensor in tensors.items():
            self._inputs[name].copy_(tensor)
        self._graph.replay()
        return tree_map_only(torch.Tensor, torch.Tensor.clone, self._output)


def _forget_workspaces() -> None:
    torch._C._cuda_clearCublasWorkspaces()


class Graphs:
    """Recordings of one function, by the shapes of its tensors. A shape is recorded the second time that it comes.

    What the function reads and writes beside its tensors must stay where it is. A function that waits for the device
    cannot be recorded: it is called instead from then on, and a warning says so once. A shape that memory is too small
    to record is called, too; others still are recorded.
    """

    def __init__(self) -> None:
        self._recorded: OrderedDict[Hashable, Recording] = OrderedDict()
        self._seen: OrderedDict[Hashable, bool] = OrderedDict()
        """Whether to record a shape that came."""
        self._played: dict[Hashable, int] = {}
        """The number of the last call that each recording was played in."""
        self._refused = False
        self._calls = 0
        self._place: Place | None = None
        self._turn = threading.Lock()
        self._done: Any = None

    def __len__(self) -> int:
        return len(self._recorded)

    def call(self, function: Callable[..., Any], tensors: Tensors, words: Hashable = ()) -> Any:
        """`function(**tensors)`. `words` is what the result depends on beside numbers and shapes."""
        key = words, *((name, x.shape, x.dtype, x.device) for name, x in tensors.items())
        x = next(iter(tensors.values()))
        with self._alone(x):
            self._calls += 1
            if key in self._recorded or self._record(key, function, tensors):
                self._recorded.move_to_end(key)
                self._played[key] = self._calls
                return self._recorded[key].play(tensors)
        with _on(x):
            result = function(**tensors)  # compiles kernels; what fails here is not recorded next time
        with self._turn:
            self._remember(key)
        return result

    @contextmanager
    def _alone(self, x: torch.Tensor) -> Iterator[None]:
        """Recordings have one place for inputs and one for what is between, whichever threads and streams call."""
        with self._turn, _on(x):
            if self._done is not None:
                torch.cuda.current_stream().wait_event(self._done)
            yield
            self._done = torch.cuda.current_stream().record_event() if x.is_cuda else None

    def _record(self, key: Hashable, function: Callable[..., Any], tensors: Tensors) -> bool:
        """Whether there is a recording now."""
        if self._refused or not self._seen.get(key) or not self._makes_room():
            return False
        problem = self._try(key, function, tensors)
        if problem is None:
            return True
        if _is_of_memory(problem):
            self._seen[key] = False
            # What it took stays in its place for as long as any recording there lives: others are made anew elsewhere.
            self._recorded.clear()
            self._played.clear()
            self._place = None
        else:
            self._refused = True  # other shapes would fare no better, and each try costs
            said = (str(problem).splitlines() or [type(problem).__name__])[0]
            warnings.warn(f"a forward cannot be a CUDA graph and runs kernel by kernel: {said}", stacklevel=2)
        return False

    def _try(self, key: Hashable, function: Callable[..., Any], tensors: Tensors) -> RuntimeError | None:
        """Record; what went wrong, without what it held in memory."""
        with _CAPTURING:
            self._place = self._place or Place(next(iter(tensors.values())))
            try:
                self._recorded[key] = Recording(function, tensors, self._place)
            except RuntimeError as error:
                problem: BaseException | None = error
                while problem is not None:
                    problem.__traceback__ = None
                    problem = problem.__context__
                return error
        return None

    def _makes_room(self) -> bool:
        """Whether there is room for one more, or was for one that nobody has asked for in a while."""
        if len(self._recorded) < KEPT:
            return True
        oldest = next(iter(self._recorded))
        if self._calls - self._played[oldest] <= STALE:
            return False
        del self._recorded[oldest], self._played[oldest]
        return True

    def _remember(self, key: Hashable) -> None:
        """That a shape came."""
        self._seen.setdefault(key, True)
        self._seen.move_to_end(key)
        if len(self._seen) > _SEEN:
            self._seen.popitem(last=False)


_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether memory was too small. What ends a recording then may fail, too, and hide it."""
    while error is not None:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
            return True
        if getattr(error, "error_code", None) == _OUT_OF_MEMORY:
            return True
        error = error.__context__
    return False


def _on(x: torch.Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
