"""Attention with float scores, launched as models of common shapes launch it."""

import itertools

import torch

from qtool.kernels.codebook import WholeCodebook
from qtool.kernels.triton.backend import Triton


def calls() -> None:
    """Launch every form: prefill and one token more, own and shared keys, masks, codebooks."""
    heads = 32
    edges, levels = torch.ones((heads, 7), dtype=torch.int32), torch.ones((heads, 8), dtype=torch.int32)
    books = [None, WholeCodebook(edges[:, :1], None, True, True), WholeCodebook(edges[:, :1], None, False, False)]
    books += [WholeCodebook(edges, levels, *how) for how in itertools.product((False, True), repeat=2)]
    shapes = [(heads, 384, 64), (8, 384, 128), (8, 1, 128), (1, 5, 256)]
    for number, (book, (groups, queries, size)) in enumerate(itertools.product(books, shapes)):
        query = torch.zeros((1, heads, queries, size))
        key = torch.zeros((1, groups, 384, size))
        mask = torch.ones((1, 1, queries, 384), dtype=torch.bool) if number % 3 else None
        if book is None or (groups, queries) == (8, 384):
            unit = torch.ones(heads)
            Triton.int8_attention(query, key, key, torch.ones(groups), mask, scaling=0.1, book=book, level_unit=unit)
