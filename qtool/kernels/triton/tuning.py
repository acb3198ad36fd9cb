"""How kernels are cut into programs: one small table for each generation of GPUs.

Integers are the same however they are cut. Sizes follow from what a generation has (the shape of its tensor core
instructions, shared memory) and from the registers that the compiler asks for: a tile of 128 × 256 spills, because an
epilogue in 64 bits needs two for each sum. Nothing is searched for at run time: a first call is like the next.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from qtool.kernels.triton import interpreted


class Tile(NamedTuple):
    """What a program of a product computes, `m` rows of activations × `n` outputs, `k` inputs at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


TILES: dict[int, Sequence[Tile]] = {
    # 100 KiB of shared memory on the small chips of this generation.
    8: (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 8, 4), Tile(64, 64, 128, 4, 3), Tile(32, 64, 128, 4, 4),
        Tile(16, 32, 128, 4, 5)),
    9: (Tile(128, 128, 128, 8, 4), Tile(64, 128, 128, 8, 4), Tile(64, 64, 128, 4, 4),
        Tile(32, 64, 128, 4, 5), Tile(16, 32, 256, 4, 5)),
    10: (Tile(128, 128, 128, 8, 4), Tile(64, 128, 128, 8, 4), Tile(64, 64, 128, 4, 4),
         Tile(32, 64, 128, 4, 5), Tile(16, 32, 256, 4, 5)),
}  # fmt: skip
"""By the first digit of the compute capability, largest first; newer chips take the last."""
_INTERPRETED = Tile(16, 32, 32, 4, 1)
_ROW_VALUES = 4096
"""Values that a program on whole rows has at most, unless a row has more."""


def machine() -> tuple[int, int]:
    """Generation and number of multiprocessors of the present GPU; (0, 1) where kernels are interpreted."""
    return (0, 1) if interpreted() else _gpu(torch.cuda.current_device())


@functools.cache
def _gpu(number: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(number)
    return properties.major, properties.multi_processor_count


def tile(rows: int, outputs: int, *, twice: bool = False) -> Tile:
    """The largest that leaves no multiprocessor without work and has no more rows than there are, else the smallest.

    With `twice` a kernel keeps two sums of an output, for which the largest has too few registers.
    """
    generation, processors = machine()
    if not generation:
        return _INTERPRETED
    tiles = TILES[min(generation, max(TILES))][twice:]
    for found in tiles:
        if found.m < 2 * rows and -(-rows // found.m) * -(-outputs // found.n) >= processors:
            return found
    return tiles[-1]


def table_tile(rows: int) -> Tile:
    """For float rows by the codes of a table, which are many; the first has a single row."""
    if interpreted():
        return _INTERPRETED
    if rows == 1:
        return Tile(1, 16, 256, 4, 1)
    if machine()[0] not in (9, 10):  # others have 100 KiB of shared memory, at least on small chips
        return Tile(16, 64, 64, 4, 3) if rows <= 16 else Tile(64, 64, 32, 4, 3)
    return Tile(16, 64, 128, 4, 4) if rows <= 16 else Tile(64, 64, 64, 4, 3) if rows <= 64 else Tile(128, 64, 64, 8, 3)


class Cut(NamedTuple):
    """How a step's attention is cut: `heads` that share keys, so many `keys` at a time, `per` times each."""

    heads: int
    keys: int
    per: int
    warps: int


def keys_of(groups: int, shared: int, keys: int, size: int) -> Cut:
    """For so many groups of `shared` heads, all texts together, which see up to so many keys of `size` channels.

    What heads mix, and keys and values, are numbers of 64 bits: more of them would not fit in registers.
    """
    most = max(1, 512 // size)
    parts = -(-shared // most)
    block = 16 if interpreted() else max(8, min(64, 2048 // size))
    blocks = -(-keys // block)
    cuts = max(1, min(blocks, 2 * machine()[1] // (groups * parts)))
    return Cut(-(-shared // parts), block, -(-blocks // cuts), 4)


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def rows_of(width: int) -> tuple[int, int, int]:
    """Rows a program, their padded width, and warps."""
    padded = power_of_two(width)
    rows = 16 if interpreted() else max(1, min(4, _ROW_VALUES // padded))
    return rows, padded, max(1, min(8, rows * padded // 512))


def sums_of(width: int) -> tuple[int, int, int]:
    """Rows a program, columns at a time of `width`, and warps: for sums of parts of rows."""
    size = min(1024, power_of_two(width))
    return 16 if interpreted() else max(1, 2048 // size), size, 4


FEW_ROWS = 4
"""Rows of activations up to which a product waits for the weights alone: tensor cores would not make it faster."""
CODE_TILES: Sequence[Tile] = (
    Tile(64, 128, 32, 8, 3), Tile(64, 64, 32, 8, 3), Tile(32, 64, 64, 4, 3), Tile(16, 32, 64, 4, 3)
)  # fmt: skip
"""Of float rows by codes, largest first, for all generations: two numbers for each activation, codes as floats."""
_WORDS = 1024  # of weights, in a program for few rows at a time


class Steps(NamedTuple):
    """How a product of codes is cut: `m` rows × `n` outputs and `words` of 4 inputs at a time.

    A column block has `chunks` such steps, and each of the `splits` takes `per` of them all.
    """

    m: int
    n: int
    words: int
    chunks: int
    per: int
    splits: int
    warps: int
    stages: int


def codes_of(rows: int, outputs: int, words: int, blocks: int) -> Steps:
    """For so many rows and outputs, of column `blocks` of `words` each."""
    processors = machine()[1]
    if rows <= FEW_ROWS:
        deep = min(32, max(8, power_of_two(words)))
        cut = Tile(rows, 16 if interpreted() else _WORDS // deep, 4 * deep, 4, 1)
        wanted = 8 * processors  # of programs so small, several share a multiprocessor
    else:
        cut = _code_tile(rows, outputs, processors)
        deep = min(cut.k // 4, max(8, power_of_two(words)))
        wanted = 2 * processors
    chunks = -(-words // deep)
    steps = blocks * chunks
    programs = -(-rows // cut.m) * -(-outputs // cut.n)
    per = -(-steps // max(1, min(steps, wanted // programs)))
    return Steps(cut.m, cut.n, deep, chunks, per, -(-steps // per), cut.warps, cut.stages)


def _code_tile(rows: int, outputs: int, processors: int) -> Tile:
    if interpreted():
        return _INTERPRETED
    for found in CODE_TILES:
        if found.m < 2 * rows and -(-rows // found.m) * -(-outputs // found.n) >= processors:
            return found
    return next((found for found in reversed(CODE_TILES) if found.m >= rows), CODE_TILES[1])


class Window(NamedTuple):
    """What a program of attention computes at a time: `m` queries × `n` keys; `single` where these are all."""

    m: int
    n: int
    single: bool
    warps: int


def window(tokens: int, *, coded: bool) -> Window:
    """For texts of up to so many tokens. Codes need more registers."""
    if interpreted():
        return Window(16, max(32, power_of_two(tokens)), True, 4) if tokens <= 32 else Window(16, 32, False, 4)
    longest = 64 if coded else 128
    if tokens <= longest:
        return Window(64 if tokens > 32 else 32, max(32, power_of_two(tokens)), True, 8 if tokens > 64 else 4)
    return Window(64, 64, False, 8)


def sweep(rows: int, size: int) -> Window:
    """For attention with float scores: so many rows that share keys, heads of so many channels."""
    if interpreted():
        return Window(16, 32, False, 4)
    m = max(16, min(64, power_of_two(rows)))
    # Other generations than 9 hold operands of int8 products in registers, where more keys would not fit.
    return Window(m, 64 if machine()[0] == 9 else 32, False, 8 if m * size > 64 * 64 else 4)
