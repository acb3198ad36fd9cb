"""Where there is a GPU the kernels run on it; else Triton interprets them on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
