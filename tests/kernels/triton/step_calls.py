"""Every kernel of a step of generation, launched as decoders of common shapes launch it."""

import torch

from qtool.kernels.triton.backend import Triton


def attention() -> None:
    """Own and shared keys, of a static cache."""
    for number, (groups, shared, size) in enumerate([(32, 1, 64), (8, 4, 128), (2, 7, 128), (1, 8, 256)]):
        query = torch.zeros((2, groups * shared, 1, size))
        key = torch.zeros((2, groups, 384, size))
        mask = torch.ones((2, 1, 1, 384), dtype=torch.bool) if number % 3 else None
        Triton.wide_attention(query, key, key, mask, size**-0.5)


def calls() -> None:
    """Launch them all."""
    attention()
