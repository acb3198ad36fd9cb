"""The kernels of tables, launched as language models launch them."""

import torch

from qtool.kernels.triton.backend import Triton


def calls() -> None:
    """One row, some, and many; inputs of whole steps, and not."""
    for inputs in (768, 600):
        table = torch.zeros((1 << 12, inputs), dtype=torch.int8)
        for rows in (1, 16, 48, 512):
            bias = torch.ones(len(table)) if inputs == 768 else None
            Triton().row_table_linear(torch.zeros(rows, inputs), table, torch.ones(len(table), 1), bias)
