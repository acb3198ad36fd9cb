"""What times a call: the host's clock, or events in the queue of a GPU, which a host's clock cannot see."""

from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol


class Clock(Protocol):
    """Something that times calls. `cold` says whether caches are emptied of what the call before left in them."""

    cold: bool

    def now(self) -> float:
        """Seconds of the host, for the length of a turn."""

    def took(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call, from an idle device until all of its work is done."""


class HostClock:
    """For engines that are finished when their call returns."""

    cold = False

    def __init__(self, now: Callable[[], float] = perf_counter) -> None:
        self.now = now

    def took(self, call: Callable[[], Any]) -> float:
        """See `Clock`."""
        start = self.now()
        call()
        return 1000 * (self.now() - start)


class CudaClock:
    """Events around a call, in the queue of a GPU.

    The GPU is idle at the first event, so what it waits for the host to launch counts: a caller waits for it too. With
    `cold` a buffer of twice the L2 cache is written before, and nothing of the model is left there.
    """

    def __init__(self, device: Any, cold: bool = False) -> None:
        import torch

        self.cold, self.device, self._cuda = cold, device, torch.cuda
        self._scrap = None
        if cold:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._scrap = torch.empty(size, dtype=torch.int8, device=device)

    def now(self) -> float:
        """See `Clock`."""
        return perf_counter()

    def took(self, call: Callable[[], Any]) -> float:
        """See `Clock`."""
        cuda = self._cuda
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        if self._scrap is not None:
            self._scrap.zero_()
        cuda.synchronize(self.device)
        start.record()
        call()
        end.record()
        cuda.synchronize(self.device)
        return float(start.elapsed_time(end))


def clock_for(device: str, cold: bool = False) -> Clock:
    """Of a device by its name; `cold` is for GPUs."""
    if device == "cpu":
        return HostClock()
    import torch

    torch.cuda.set_device(device)  # events go into the queue of the present device
    return CudaClock(torch.device(device), cold)
