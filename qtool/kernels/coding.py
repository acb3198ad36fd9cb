"""Attention whose probabilities are codes: the specification of the operation `coded_attention` (Ji et al., 2021).

A key's weight is 2^(score - largest) in whole units of 2^-36; the sum of a row's weights is exact, in whatever order it
is taken. A weight gets the code of the last edge that it reaches; edges are shares of the row's sum (that is the
probability) or of its largest weight. Each comparison is of two float64 numbers that single IEEE operations make.

Scores are products in float64, rounded once to float32. So a row's codes depend on nothing but its own query and the
keys that it may see, whatever else is in the batch, and are the same with a key-value cache, as long as no score lies
within the rounding of float64 (about 1e-15 of it) of the middle between two float32 numbers: then, one time in tens of
millions, its last bit depends on the order of the sum, and the code does where an edge lies in that bit. Levels are
float32, so that their products with values are exact: keys of one code often make a sum that is a tie.
"""

from collections.abc import Iterator

import torch

from qtool.errors import InputError
from qtool.kernels.attention import LOG2_E, capped, exp2, masked

MAX_KEYS = 1 << 17
"""Keys that a row may have: the sum of their weights must stay exact in float64."""
_UNIT = 2.0**36
_LOWEST = -126.0  # of the exponents that `exp2` takes; far less than a unit
_PIECE = 1 << 18  # scores at a time: their copies stay in the CPU's cache
_WIDE_PIECE = 1 << 26  # on a GPU, where few large operations are better


def coded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    edges: torch.Tensor,
    levels: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    relative: bool = False,
    renormalize: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context float32 `[batch, queries, heads, size]` and codes uint8 `[batch, heads, queries, keys]`.

    `query` is float `[batch, heads, queries, size]`; `key` and `value` `[batch, groups, keys, size]`, where a group's
    keys serve `heads / groups` heads side by side. `edges` float64 `[heads, codes - 1]` and `levels` float32
    `[heads, codes]` are a codebook of each head (`numerics.codebook`): of probabilities, or with `relative` of
    probabilities divided by the largest of their row. Without levels what has a code above 0 is kept as it is, and the
    rest pruned. With `renormalize` what stands for the probabilities of a row is divided by its sum.

    `mask` is true where a query may look, or what is added to the scores, as in `attention.int8_attention`. Keys that a
    query may not look at get code 0; a query that may look nowhere, or whose codes are all 0, gets zeros. NaN or
    infinity in a query or a key makes the context NaN where it is looked at, in a value for every query of its text.
    Raises InputError beyond `MAX_KEYS`.
    """
    (batch, heads, queries, size), (groups, keys) = query.shape, key.shape[1:3]
    if keys > MAX_KEYS:
        raise InputError(f"coded attention adds up {keys} weights; sums are exact for {MAX_KEYS}")
    shape = (groups, heads // groups)
    allowed = None if mask is None else mask.expand(batch, heads, queries, keys)
    codes = torch.empty((batch, heads, queries, keys), dtype=torch.uint8, device=query.device)
    context = torch.empty((batch, heads, queries, size), dtype=torch.float32, device=query.device)
    for text in range(batch):
        q, k, v = (states[text].double() for states in (query, key, value))
        for rows in _pieces(heads * keys, queries, _PIECE if query.device.type == "cpu" else _WIDE_PIECE):
            scores = (q[:, rows].unflatten(0, shape) @ k.mT[:, None]).flatten(0, 1).mul_(scaling * LOG2_E)
            scores = scores if softcap is None else capped(scores, softcap)
            scores = scores if allowed is None else masked(scores, allowed[text, :, rows])
            weights, alive = _weights(scores)
            total = weights.sum(-1, keepdim=True)
            whole = torch.full_like(total, _UNIT) if relative else total.masked_fill(total == 0, torch.inf)
            found = _codes(weights, edges[:, None] * whole)
            codes[text, :, rows] = found.to(torch.uint8)
            coded = _kept(weights, found, levels)
            share = coded.sum(-1, keepdim=True) if renormalize else total if levels is None else total / whole
            mixed = (coded.unflatten(0, shape) @ v[:, None]).flatten(0, 1)
            context[text, :, rows] = mixed.div_(share.masked_fill_(share == 0, 1)).add_(alive)
    return context.transpose(1, 2), codes


def _pieces(width: int, queries: int, most: int) -> Iterator[slice]:
    step = max(1, most // max(1, width))
    return (slice(start, start + step) for start in range(0, queries, step))


def _weights(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole float64 numbers from rows of scores in octaves (consumed), and 0 a row, or NaN where one is no number."""
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)
    alive = top.mul(0)
    weights = exp2(scores.sub_(top).nan_to_num_(0).float().clamp_(_LOWEST, 0))
    return weights.double().mul_(_UNIT).floor_(), alive


def _codes(weights: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """int64: how many of the rising `limits` `[heads, rows, codes - 1]` each weight `[heads, rows, keys]` reaches."""
    return torch.searchsorted(limits.contiguous(), weights, right=True)


def _kept(weights: torch.Tensor, codes: torch.Tensor, levels: torch.Tensor | None) -> torch.Tensor:
    """What codes stand for: `levels` `[heads, codes]`, or the weights themselves."""
    if levels is None:
        return weights.masked_fill_(codes == 0, 0)
    return levels.double()[:, None].expand(-1, codes.shape[1], -1).gather(-1, codes)
