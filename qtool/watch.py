"""What observers see of the float model in pass 1: inputs and outputs of modules, and attention probabilities."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from qtool.calibrate.observers import Observer
from qtool.hf import plain_attention

Probes = dict[Any, Callable[[torch.Tensor, torch.Tensor], None]]
"""By attention module, what is given its probabilities `[batch, heads, queries, keys]` and which of them exist."""


@contextmanager
def open_attention(model: Any, sites: Iterable[str]) -> Iterator[Probes]:
    """While active, and if one of `sites` asks for it, attention shows its probabilities to the probes of a module."""
    probes: Probes = {}
    if not any(site.endswith(":probabilities") for site in sites):
        yield probes
        return

    def show(module: Any, probabilities: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        if module in probes:
            probes[module](probabilities, seen)
        return probabilities

    before = model.config._attn_implementation
    model.set_attn_implementation(plain_attention(show))
    try:
        yield probes
    finally:
        model.set_attn_implementation(before)


@contextmanager
def watching(model: Any, observers: Mapping[str, Observer], real: torch.Tensor, probes: Probes) -> Iterator[None]:
    """While active, each observer sees the rows of its site, without padding (`real` is `[batch, tokens]`), where the
    model computes them, and so must `real` be.

    A site is a module's path, for its input, `path:output`, or `path:probabilities` of a module that attends; other
    words behind the colon only tell observers apart.
    """
    with ExitStack() as stack:
        for site, observer in observers.items():
            path, _, what = site.partition(":")
            module = model.get_submodule(path)
            if what == "probabilities":
                probes[module] = _attention_rows(observer, real)
                stack.callback(probes.pop, module)
            elif what == "output":
                handle = module.register_forward_hook(lambda _, __, out, seen=observer: _rows(seen, out, real))
                stack.callback(handle.remove)
            else:
                handle = module.register_forward_pre_hook(lambda _, args, seen=observer: _rows(seen, args[0], real))
                stack.callback(handle.remove)
        yield


def _rows(observer: Observer, tensor: torch.Tensor, real: torch.Tensor) -> None:
    rows = tensor.flatten(0, -2)
    # An expert sees only the tokens that were sent to it: then nobody knows which are padding.
    observer.update(rows[real.flatten()] if len(rows) == real.numel() else rows)


def _attention_rows(observer: Observer, real: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Shows `[tokens, heads, keys]` of one text after the other, -1 where a query may not look."""

    def show(probabilities: torch.Tensor, seen: torch.Tensor) -> None:
        exists = seen.expand_as(probabilities)
        for text, tokens in enumerate(real):
            rows = probabilities[text].masked_fill(~exists[text], -1).transpose(0, 1)
            observer.update(rows[tokens])

    return show
