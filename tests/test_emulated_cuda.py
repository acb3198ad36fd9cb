"""The emulated GPU that device tests stand on: it refuses what a GPU refuses, or they would prove nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from emulated_cuda import GPU, emulated_cuda


def test_the_emulated_gpu_refuses_what_a_gpu_refuses() -> None:
    with emulated_cuda():
        x, whole = torch.ones(3, 4, device="cuda"), torch.ones(2, 2, dtype=torch.int32, device="cuda")
        assert x.device == GPU and x.is_cuda and type(x.cpu()) is torch.Tensor
        mixed: list[Callable[[], Any]] = [
            lambda: x + torch.ones(4),
            lambda: torch.cat([x, torch.ones(3, 4)]),
            lambda: x @ torch.ones(4, 2),
            lambda: torch.zeros(3, 4).add_(x),
            lambda: torch.zeros(()).add_(x.sum()),
            lambda: torch.ldexp(x, torch.tensor(3)),
            lambda: torch.nn.functional.embedding(torch.tensor([0]), x),
            lambda: torch.equal(x, torch.ones(3, 4)),
        ]
        for operation in mixed:
            with pytest.raises(RuntimeError, match="same device"):
                operation()
        with pytest.raises(RuntimeError, match="indices should be"):
            torch.ones(3)[torch.tensor([0], device="cuda")]
        for read in (x.numpy, lambda: np.asarray(x)):
            with pytest.raises(TypeError, match="cuda:0 device type tensor to numpy"):
                read()
        with pytest.raises(NotImplementedError, match="\"addmm_cuda\" not implemented for 'Int'"):
            whole @ whole
        with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
            torch.randn(2, device="cuda", generator=torch.Generator())
        assert (x + torch.ones(())).device == GPU and x.sum().item() == 12.0
        assert x[torch.tensor([True, False, True])].shape == (2, 4)  # CUDA fetches indices
    assert not torch.cuda.is_available()


def test_gradients_go_through_the_emulated_gpu() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 3), torch.randn(5, 4)
    layer(x).square().sum().backward()
    assert layer.weight.grad is not None
    wanted = layer.weight.grad.clone()
    with emulated_cuda():
        moved = torch.nn.Linear(4, 3)
        moved.load_state_dict(layer.state_dict())
        moved.to("cuda")
        assert isinstance(moved.weight, torch.nn.Parameter) and moved.weight.device == GPU
        moved(x.to("cuda")).square().sum().backward()
        assert moved.weight.grad is not None and moved.weight.grad.device == GPU
        assert torch.equal(moved.weight.grad.cpu(), wanted)
