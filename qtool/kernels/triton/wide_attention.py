"""Attention of one query a head in float64, as a step of generation has it: its keys are cut among programs.

A program holds several of the heads that share keys, and what none of them may see is not read at all. What
the cuts found is put together in their order. A step waits for the keys and values alone: float64 costs it nothing on
GPUs that have units for it, and spares others the copies in float64 that products of torch need.
"""

import math

import torch
import triton
import triton.language as tl

from qtool.kernels.triton import tuning

MAX_SIZE = 256
"""Channels of a head that a program holds."""
_INFINITY = tl.constexpr(math.inf)


# Lengths grow from call to call: a form of the kernel for those that 16 divides would be compiled amid a generation.
@triton.jit(
    do_not_specialize=[
        "key_text", "key_group", "value_text", "value_group", "mask_text", "mask_head", "keys", "per",
    ]
)  # fmt: skip
def sweep_kernel(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, mask: tl.tensor,
    query_text: tl.tensor, query_head: tl.tensor, key_text: tl.tensor, key_group: tl.tensor, key_step: tl.tensor,
    value_text: tl.tensor, value_group: tl.tensor, value_step: tl.tensor, mask_text: tl.tensor, mask_head: tl.tensor,
    tops: tl.tensor, totals: tl.tensor, sums: tl.tensor, keys: tl.tensor, size: tl.tensor, shared: tl.tensor,
    per: tl.tensor,
    SCALING: tl.constexpr, OWN: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Program ids: cut of `per` blocks of KEYS keys; part of a group, HEADS of its `shared` heads; text.

    float32 `query` `[texts, heads, size]`, `key` and `value` `[texts, groups, keys, size]` and boolean `mask`
    `[texts, heads, keys]`, or None, as bytes, with their strides; OWN says that heads have masks of their own. For
    each cut and head float64: the largest score `tops`, the `totals` of the weights e^(score - top), both
    `[cuts, texts · heads]`, and the `sums` of the values by weight `[cuts, texts · heads, size]`. A part with too few
    heads computes its last one again.
    """
    cut, text, parts = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.cdiv(shared, HEADS)
    group, first = (tl.program_id(1) // parts).to(tl.int64), tl.program_id(1) % parts * HEADS
    heads = tl.num_programs(1) // parts * shared
    channels = tl.arange(0, SIZE)
    known = channels < size
    query += text * query_text + group * shared * query_head + channels
    key += text * key_text + group * key_group + channels[None, :]
    value += text * value_text + group * value_group + channels[None, :]
    if mask is not None:
        mask += text * mask_text + group * shared * mask_head
    top = ()  # of each head
    total = ()
    mixed = ()
    for _ in tl.static_range(HEADS):
        top += (tl.full((1,), -_INFINITY, tl.float64),)  # type: ignore[assignment]
        total += (tl.zeros((1,), tl.float64),)  # type: ignore[assignment]
        mixed += (tl.zeros((SIZE,), tl.float64),)  # type: ignore[assignment]
    for block in range(cut * per, tl.minimum((cut + 1) * per, tl.cdiv(keys, KEYS))):
        at = (block * KEYS + tl.arange(0, KEYS)).to(tl.int64)
        seen = at < keys
        if mask is not None and not OWN:
            seen = _seen(mask, at, keys)
        read = seen
        if OWN:  # what any of the heads sees
            for i in tl.static_range(HEADS):
                one = _seen(mask + tl.minimum(first + i, shared - 1) * mask_head, at, keys)
                read = one if i == 0 else read | one
        wanted = read[:, None] & known[None, :]
        k = tl.load(key + at[:, None] * key_step, mask=wanted, other=0.0).to(tl.float64)
        v = tl.load(value + at[:, None] * value_step, mask=wanted, other=0.0).to(tl.float64)
        tops_now = ()
        totals_now = ()
        mixed_now = ()
        for i in tl.static_range(HEADS):
            head = tl.minimum(first + i, shared - 1)
            if OWN:
                seen = _seen(mask + head * mask_head, at, keys)
            asked = tl.load(query + head * query_head, mask=known, other=0.0).to(tl.float64)
            scores = tl.where(seen, tl.sum(k * asked[None, :], 1) * SCALING, -_INFINITY)
            highest = tl.maximum(top[i], tl.max(scores, 0))
            level = tl.where(highest == -_INFINITY, 0.0, highest)  # nothing seen so far
            weights = tl.where(seen, tl.exp(scores - level), 0.0)
            shrunk = tl.exp(top[i] - level)
            part = tl.sum(tl.where(seen[:, None], weights[:, None] * v, 0.0), 0)
            tops_now += (highest,)  # type: ignore[assignment]
            totals_now += (total[i] * shrunk + tl.sum(weights, 0),)  # type: ignore[assignment]
            mixed_now += (mixed[i] * shrunk + part,)  # type: ignore[assignment]
        top, total, mixed = tops_now, totals_now, mixed_now
    for i in tl.static_range(HEADS):
        place = (cut * tl.num_programs(2) + text) * heads + group * shared + tl.minimum(first + i, shared - 1)
        one = place + tl.arange(0, 1)
        tl.store(tops + one, top[i])
        tl.store(totals + one, total[i])
        tl.store(sums + place * size + channels, mixed[i], mask=known)


@triton.jit(do_not_specialize=["cuts"])
def join_kernel(
    tops: tl.tensor, totals: tl.tensor, sums: tl.tensor, result: tl.tensor, cuts: tl.tensor, size: tl.tensor,
    SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """What `sweep_kernel` found in all cuts, for the head of this program: float32 `result` `[texts · heads, size]`."""
    head, heads = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    channels = tl.arange(0, SIZE)
    known = channels < size
    one = tl.arange(0, 1)
    highest = tl.full((1,), -_INFINITY, tl.float64)
    for cut in range(0, cuts):
        highest = tl.maximum(highest, tl.load(tops + cut * heads + head + one))
    level = tl.where(highest == -_INFINITY, 0.0, highest)
    total = tl.zeros((1,), tl.float64)
    mixed = tl.zeros((SIZE,), tl.float64)
    for cut in range(0, cuts):
        place = cut * heads + head
        shrunk = tl.exp(tl.load(tops + place + one) - level)
        total += shrunk * tl.load(totals + place + one)
        mixed += shrunk * tl.load(sums + place * size + channels, mask=known, other=0.0)
    mixed = mixed / tl.where(total == 0.0, 1.0, total)  # who sees nothing gets 0
    tl.store(result + head * size + channels, mixed.to(tl.float32), mask=known)


@triton.jit
def _seen(mask: tl.tensor, at: tl.tensor, keys: tl.tensor) -> tl.tensor:
    return tl.load(mask + at, mask=at < keys, other=0) != 0


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """See `Reference.wide_attention`; heads of up to MAX_SIZE channels."""
    batch, heads, _, size = query.shape
    groups, keys = key.shape[1:3]
    seen = None if mask is None else mask.expand(batch, heads, 1, keys).view(torch.uint8)
    shared, across = heads // groups, tuning.power_of_two(size)
    cut = tuning.keys_of(batch * groups, shared, keys, across)
    cuts = -(-keys // (cut.keys * cut.per))
    # Apart: one behind the other would start at a multiple of 16 bytes for some cuts only, which is another form.
    tops, totals = (query.new_empty((cuts, batch, heads), dtype=torch.float64) for _ in range(2))
    sums = query.new_empty((cuts, batch, heads, size), dtype=torch.float64)
    result = query.new_empty((batch, 1, heads, size))
    steps = (0, 0) if seen is None else (seen.stride(0), seen.stride(1))
    sweep_kernel[(cuts, groups * -(-shared // cut.heads), batch)](
        query, key, value, seen, *query.stride()[:2], *key.stride()[:3], *value.stride()[:3], *steps,
        tops, totals, sums, keys, size, shared, cut.per,
        SCALING=scaling, OWN=steps[1] > 0, HEADS=cut.heads, KEYS=cut.keys, SIZE=across, num_warps=cut.warps,
    )  # fmt: skip
    join_kernel[(batch * heads,)](tops, totals, sums, result, cuts, size, SIZE=across, num_warps=4)
    return result
