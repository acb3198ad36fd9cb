"""Ranks: processes that carry out one command together, on one machine or on many.

Somebody else starts them, with the same command line each: torchrun, `accelerate launch`, Slurm, a Kubernetes
PyTorchJob, or `--jobs` (`jobs.py`). RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who one is and where the others
are found. Each rank takes a share of the work that only its number decides, and what the shares gave is put together in
one order, so that results do not depend on how many there are.

Tensors travel between CPUs, as safetensors: hidden states and statistics lie there anyway, also where GPUs compute.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from qtool.ranks.alone import Ranks
from qtool.ranks.group import Group
from qtool.ranks.life import OtherRankError
from qtool.ranks.values import packed, read, unpacked, written

__all__ = ["ALONE", "OtherRankError", "Ranks", "current", "gathered", "joined", "threads_for"]

ALONE = Ranks()
_CURRENT: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def current() -> Ranks:
    """The ranks of this process."""
    return _CURRENT.get()


@contextmanager
def joined(farewell: Callable[[str, int], None] | None = None) -> Iterator[Ranks]:
    """Meet the other ranks of the environment, and part at the end. An error on any rank ends all of them.

    Where that happens while no exception can reach the first rank, it calls `farewell` with the line and the exit code.
    Raises UnavailableError where they cannot be met, OtherRankError for what ended another rank.
    """
    group = Group.of_environment(farewell)
    token = _CURRENT.set(group)
    try:
        yield group
        group.leave()
    except BaseException as error:
        group.tell(error)
        raise
    finally:
        _CURRENT.reset(token)


def threads_for(cores: int) -> int:
    """Threads of a rank where nobody says: the cores that this process may use, divided among the ranks of the host."""
    return max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))


def gathered(what: str, mine: Mapping[int, Any]) -> dict[int, Any]:
    """What all ranks made of their pieces of work, by the number of the piece and in that order.

    Values are None, numbers, strings, numpy arrays of float64, and lists, tuples and dictionaries of such. `what` they
    are: see `Ranks.exchange`.
    """
    if current().size == 1:
        return dict(sorted(mine.items()))
    own = written([[key, packed(value)] for key, value in mine.items()])
    pairs = [pair for part in current().exchange(what, own) for pair in read(part)]
    return {key: unpacked(value) for key, value in sorted(pairs, key=lambda pair: int(pair[0]))}
