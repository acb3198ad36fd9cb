"""Threads of native kernels: several Python threads, and a child of fork."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qtool.kernels import native, reference
from qtool.kernels.integer import Native
from qtool.numerics import QTensor, QuantSpec

pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason() or "")


def product(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A product that two threads share, and the reference's."""
    draw = torch.Generator().manual_seed(seed)
    stored = QTensor.quantize(
        torch.randn(320, 256, generator=draw), QuantSpec.parse("int8:channel:sym"), layout="tiled"
    )
    x = torch.randn(64, 256, generator=draw)
    found, wanted = (
        ops.int8_linear(x, ops.prepare(stored.codes, (320, 256)), stored.params.scale, None, None)
        for ops in (Native(), reference.Reference())
    )
    return found, wanted


@pytest.fixture(autouse=True)
def two_threads() -> None:
    if torch.get_num_threads() < 2:
        pytest.skip("torch has one thread")


def test_calls_from_several_python_threads() -> None:
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in pool.map(product, range(40)):
            assert torch.equal(found, wanted)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_of_fork_computes_too() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(-1000, 1000, (600, 300), generator=draw, dtype=torch.int32)
    wanted = Native.quantize_rows(x)  # with the parent's threads
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(30)  # a child that hangs is ended
        found = Native.quantize_rows(x)
        torch.set_num_threads(1)  # torch's own threads do not outlive a fork
        os._exit(0 if all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
