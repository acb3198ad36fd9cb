"""What a method that learns from data is shown of a block: its inputs in both models, and the block itself to try on.

The float block is in memory. Modules that are lowered already can stand in it, so that rounding and distillation see
what the lowered model will compute, and nobody has to know what a block is made of.
"""

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qtool.anatomy import Unit
from qtool.rounding import Moments
from qtool.stream import Call, Stream, give_back


@dataclass(frozen=True)
class Example:
    """A batch on its way into a block: hidden states `[batch, tokens, hidden]` of the float and of the lowered model,
    the arguments that come with them, and which tokens are real, boolean `[batch, tokens]`."""

    exact: torch.Tensor
    lowered: torch.Tensor
    call: Call
    real: torch.Tensor


class _Seen(Exception):
    """The input that was asked for is there: nothing behind it is needed."""


class Lesson:
    """A float block, loaded, and the examples that go into it."""

    def __init__(
        self,
        stream: Stream,
        unit: Unit,
        examples: Sequence[Example],
        keep: Callable[[], MutableSequence[Any]] = list,
    ) -> None:
        """`keep` makes lists for further hidden states, which may lie on disk."""
        self.unit, self.examples, self.keep = unit, examples, keep
        self._stream = stream

    def forward(self, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """What the block, as it stands, makes of hidden states."""
        return self._stream.forward_block(self.unit, hidden, call)

    def module(self, path: str) -> nn.Module:
        """A module of the block by its path in the model."""
        module: nn.Module = self._stream.model.get_submodule(path)
        return module

    @contextmanager
    def standing_in(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """While active, `modules` stand at their paths."""
        known = {path: self.module(path) for path in modules}
        try:
            for path, module in modules.items():
                _put(self._stream.model, path, module)
            yield
        finally:
            for path, module in known.items():
                _put(self._stream.model, path, module)

    def stages(self, paths: Sequence[str]) -> list[list[str]]:
        """`paths` in the order of computation; those that read the same tensor are one stage.

        What the first example does not reach comes last, each by itself.
        """
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def note(path: str) -> Callable[..., None]:
            def hook(_: Any, args: Any) -> None:
                if seen and seen[-1][0] is args[0]:
                    seen[-1][1].append(path)
                else:
                    seen.append((args[0], [path]))

            return hook

        with ExitStack() as stack, torch.inference_mode():
            for path in paths:
                stack.callback(self.module(path).register_forward_pre_hook(note(path)).remove)
            self.forward(self.examples[0].exact, self.examples[0].call)
        reached = {path for _, stage in seen for path in stage}
        return [stage for _, stage in seen] + [[path] for path in paths if path not in reached]

    def moments(self, path: str, lowered: Mapping[str, nn.Module]) -> Moments | None:
        """Of what the module at `path` reads, in the float block and where `lowered` modules stand in it.

        None where no token of any example reaches it.
        """
        moments: Moments | None = None
        with torch.inference_mode():
            for example in self.examples:
                exact = self._input(path, example.exact, example)
                with self.standing_in(lowered):
                    own = self._input(path, example.lowered, example)
                if own is not None and len(own):
                    moments = moments or Moments(own.shape[-1])
                    moments.update(own if exact is None else exact, own)
                give_back()
        return moments

    def _input(self, path: str, hidden: torch.Tensor, example: Example) -> torch.Tensor | None:
        """Rows of real tokens that enter a module."""
        found: list[torch.Tensor] = []

        def keep(_: Any, args: Any) -> None:
            found.append(args[0].flatten(0, -2))
            raise _Seen

        handle = self.module(path).register_forward_pre_hook(keep)
        try:
            self.forward(hidden, example.call)
        except _Seen:
            pass
        finally:
            handle.remove()
        if not found:
            return None
        # An expert sees only the tokens that were sent to it: then nobody knows which are padding.
        real = example.real.flatten()
        return found[0][real] if len(found[0]) == len(real) else found[0]


def _put(model: Any, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
