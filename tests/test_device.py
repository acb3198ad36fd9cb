"""`--device`: names, and what is said where a GPU is not there."""

import pytest
import torch

from qtool.device import usable
from qtool.errors import UnavailableError, UsageError
from qtool.kernels import triton


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that nothing is wrong with."""
    monkeypatch.setattr(triton, "reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_the_cpu_is_always_there() -> None:
    assert usable("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:01", "cpu:0", "CUDA", "", "cuda\n", "mps"])
def test_other_names_are_refused(gpus: None, name: str) -> None:
    with pytest.raises(UsageError, match="known: cpu, cuda, cuda:N"):
        usable(name)


def test_gpus_by_number(gpus: None) -> None:
    assert (usable("cuda"), usable("cuda:1")) == (torch.device("cuda"), torch.device("cuda", 1))
    with pytest.raises(UnavailableError, match="--device cuda:2: torch finds 2 GPUs here"):
        usable("cuda:2")


def test_the_reason_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "reason", lambda: "the package triton is not installed: pip install triton")
    with pytest.raises(UnavailableError, match="--device cuda: the package triton is not installed") as caught:
        usable("cuda")
    assert caught.value.exit_code == 4
