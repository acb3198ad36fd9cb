"""Every kernel of a step of generation, launched as decoders of common shapes launch it."""

import torch

from qtool.kernels.triton import step
from qtool.kernels.triton.backend import Triton
from qtool.kernels.triton.float_launch import Codes
from qtool.numerics.qtensor import pack_nibbles, tile


def attention() -> None:
    """Own and shared keys, of a static cache."""
    for number, (groups, shared, size) in enumerate([(32, 1, 64), (8, 4, 128), (2, 7, 128), (1, 8, 256)]):
        query = torch.zeros((2, groups * shared, 1, size))
        key = torch.zeros((2, groups, 384, size))
        own = groups * shared if number == 1 else 1
        mask = torch.ones((2, own, 1, 384), dtype=torch.bool) if number % 3 else None
        Triton.wide_attention(query, key, key, mask, size**-0.5)


def matrices(count: int, outputs: int, inputs: int, width: int, nibbles: bool) -> list[step.Matrix]:
    codes = tile(torch.zeros((outputs, inputs), dtype=torch.int8))
    stored = Codes.of(pack_nibbles(codes) if nibbles else codes, (outputs, inputs), width)
    scale = torch.ones((outputs, -(-inputs // width)))
    return [step.Matrix(stored, scale, scale if nibbles else None)] * count


def block() -> None:
    """A block, with and without biases, of one text and of three."""
    hidden, inner, heads = 1024, 2816, 16
    for rows, nibbles, width in ((1, True, 128), (3, False, inner)):
        x, norm = torch.zeros((rows, hidden)), torch.ones(hidden)
        bias = torch.zeros(3 * hidden) if rows > 1 else None
        _, normal = step.norm(x, norm, 1e-5)
        states = step.multiply(normal, step.Product(matrices(3, hidden, hidden, width, nibbles), bias))
        turns = torch.zeros((rows, hidden // heads))
        mixed = step.turn(states, turns, turns, 3 * heads, 2 * heads).view(rows, -1)[:, :hidden].contiguous()
        output = step.multiply(mixed, step.Product(matrices(1, hidden, hidden, width, nibbles), None))
        sums, normal = step.norm(x, norm, 1e-5, output)
        gates = step.multiply(normal, step.Product(matrices(2, inner, hidden, width, nibbles), None))
        for activation in step.ACTIVATIONS:
            through = step.gate(gates, activation)
        step.finish(step.multiply(through, step.Product(matrices(1, hidden, inner, width, nibbles), None)), sums)


def calls() -> None:
    """Launch them all."""
    attention()
    block()
