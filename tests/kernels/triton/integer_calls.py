"""Every kernel of integer models, launched as models of common shapes launch them."""

import torch
from draws import Draw

from qtool.kernels.codebook import WholeCodebook
from qtool.kernels.triton import launch, linear
from qtool.kernels.triton.backend import Triton
from qtool.kernels.triton.encoder import Block, Encoder
from qtool.kernels.triton.launch import Activation, Coding, Heads, Layer, Norm, Table

HIDDEN, HEADS = 768, 12


def layer(outputs: int, inputs: int, *, unsigned: bool = False, act: Activation | None = None) -> Layer:
    draw = Draw(outputs)
    vector = draw.integers(1, 9, outputs)
    correction = vector if unsigned else None
    return Layer(draw.codes(outputs, inputs), correction, vector[:1], vector, vector, vector, 127, act or Activation())


def block(act: Activation, book: WholeCodebook | None, *, static: bool = False) -> Block:
    vector = torch.ones(HIDDEN, dtype=torch.int32)
    norm = Norm(vector, vector, vector, torch.ones(1, dtype=torch.int64), 127)
    states = layer(3 * HIDDEN, HIDDEN)
    states = states._replace(align=states.bias, limit=states.bias)
    head = vector[:HEADS]
    heads = Heads(HEADS, HIDDEN // HEADS, vector[:1], (head, head), (vector, vector), 10, 14, 127, book)
    coding = Coding(False, static, vector, vector, vector, 127)
    return Block(
        coding, states, heads, Coding(), layer(HIDDEN, HIDDEN), norm, coding, layer(4 * HIDDEN, HIDDEN, act=act),
        Coding(True), layer(HIDDEN, 4 * HIDDEN, unsigned=True), norm,
    )  # fmt: skip


def calls() -> None:
    """Launch them all."""
    vector = torch.ones(HIDDEN, dtype=torch.int32)
    norm = Norm(vector, vector, vector, torch.ones(1, dtype=torch.int64), 127)
    table = Table(torch.zeros((40, HIDDEN), dtype=torch.int8), vector[:40], vector[:40])
    wide = table._replace(codes=table.codes.to(torch.int16))
    acts = [
        Activation(linear.TABLE, 2048, torch.zeros(4096, dtype=torch.int16)),
        Activation(linear.POLYNOMIAL, 1, None, torch.ones(4, dtype=torch.int64), vector[:1], vector[:1]),
        Activation(linear.RELU),
    ]
    edges, levels = torch.ones((HEADS, 7), dtype=torch.int32), torch.ones((HEADS, 8), dtype=torch.int32)
    books = [
        None, WholeCodebook(edges, levels, True, True), WholeCodebook(edges, levels, True, False),
        WholeCodebook(edges, levels, False, False), WholeCodebook(edges[:, :1], None, False, True),
    ]  # fmt: skip
    blocks = [block(acts[number % 3], book, static=number % 3 == 2) for number, book in enumerate(books)]
    for batch, tokens in ((1, 32), (16, 128), (1, 384)):
        ids = torch.zeros((batch, tokens), dtype=torch.int64)
        projection = layer(HIDDEN, HIDDEN) if tokens == 32 else None
        encoder = Encoder([table, wide, table], norm, projection and Coding(), projection, blocks)
        encoder.forward([ids, ids, None if batch == 1 else ids], torch.ones((batch, tokens), dtype=torch.bool))
    x = vector[None, :] * torch.ones((5, 1), dtype=torch.int32)
    Triton.quantize_rows(x)
    Triton.integer_norm(x, norm.eps, (vector, vector), vector, 22)
    Triton.integer_tanh(x, 10)
    Triton.integer_gelu(x, norm.eps, norm.eps, 3)
    operand = Triton().prepare(torch.zeros((HIDDEN, HIDDEN), dtype=torch.int8), (HIDDEN, HIDDEN))
    amax = torch.ones((5, 1), dtype=torch.int64)
    for given in (amax, None):
        Triton.integer_linear(x.to(torch.int8), given, operand, None, vector[:1], vector, (vector, vector), 22)
    states = torch.ones((2, 5, HEADS, HIDDEN // HEADS), dtype=torch.int32)
    head, channel = vector[:HEADS, None, None], vector.view(HEADS, 1, -1)
    Triton.integer_attention(
        states, states, states, torch.ones((2, 5), dtype=torch.bool), vector[:1], (head, head), (channel, channel),
        grid=10, bits=14, context_bits=16,
    )  # fmt: skip
    launch.norm(x, x, norm, launch.Count(5), x)
