"""Where there is a GPU the kernels run on it; else Triton interprets them on the CPU (`tests/conftest.py` says so)."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
