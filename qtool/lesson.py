"""What a method that learns from data is shown of a block: its inputs in both models, and the block itself to try on.

The float block is in memory. Modules that are lowered already can stand in it, so that rounding and distillation see
what the lowered model will compute, and nobody has to know what a block is made of.
"""

from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from qtool.anatomy import Unit
from qtool.device import CPU, mapped
from qtool.rounding import Moments
from qtool.stream import Call, Stream, give_back

_SILENT = 0.1  # of the median norm of tokens: one with less counts as if it had that


@dataclass(frozen=True)
class Example:
    """A batch on its way into a block: hidden states `[batch, tokens, hidden]` of the float and of the lowered model,
    the arguments that come with them, and which tokens are real, boolean `[batch, tokens]`; all on the host."""

    exact: torch.Tensor
    lowered: torch.Tensor
    call: Call
    real: torch.Tensor

    def normal(self) -> "Example":
        """A copy that gradients may flow through: hidden states and masks were made in inference mode."""
        call = self.call.moved(lambda value: mapped(value, torch.clone))
        return Example(self.exact.clone(), self.lowered.clone(), call, self.real.clone())


class _Seen(Exception):
    """The input that was asked for is there: nothing behind it is needed."""


class Lesson:
    """A float block, loaded on a device, and the examples that go into it, which lie on the host."""

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
        """What the block, as it stands, makes of hidden states, on its device."""
        return self._stream.forward_block(self.unit, hidden, call)

    def module(self, path: str) -> nn.Module:
        """A module of the block by its path in the model."""
        module: nn.Module = self._stream.model.get_submodule(path)
        return module

    @contextmanager
    def standing_in(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """While active, `modules` stand at their paths, on the block's device; behind it they are on the host."""
        with self._there(modules), self._placed(modules):
            yield

    @contextmanager
    def _there(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """While active, `modules` are on the block's device; a block on the host takes them as they are."""
        away = [] if self._stream.device.type == "cpu" else list(modules.values())
        try:
            for module in away:
                module.to(self._stream.device)
            yield
        finally:
            for module in away:
                module.to(CPU)

    @contextmanager
    def _placed(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
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

    def sensitivities(self, paths: Sequence[str]) -> dict[str, list[torch.Tensor]]:
        """How much the float block's output hangs on what each of `paths` gives a token: `[rows]` an example, mean 1.

        An error in a token's row moves the outputs of all tokens that attend to it, and matters by its size beside
        theirs. So a row counts by the mean square of its gradient, that of random sums of the outputs over their norms,
        which stay as they are (Hutchinson's estimate of the diagonal of JᵀJ, rows for elements). In a decoder, most of
        what values do may hang on those of the first token alone, one of hundreds where all count the same. Draws
        torch's random numbers. Examples that do not reach a module have no rows there; where all gradients are zero or
        one is not finite, rows count the same.
        """
        squares: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
        for example in self.examples if paths else ():
            gradients = self._gradients(paths, example.normal())
            for path in paths:
                rows = _real_rows(gradients[path], example.real) if path in gradients else torch.empty(0, 1)
                squares[path].append(rows.float().square().mean(-1).cpu())
            del gradients
            give_back()
        return {path: _over_mean(rows) for path, rows in squares.items()}

    def _gradients(self, paths: Sequence[str], example: Example) -> dict[str, torch.Tensor]:
        """Of a random sum of the block's outputs, each over its token's norm, by what modules give, `[…, out]`."""
        outputs: dict[str, torch.Tensor] = {}
        with ExitStack() as stack, torch.enable_grad():
            for path in paths:
                keep = partial(_keep_output, outputs, path)
                stack.callback(self.module(path).register_forward_hook(keep).remove)
            block = self.forward(example.exact.requires_grad_(True), example.call)
        if not outputs:
            return {}
        direction = _random_direction(block.detach(), example.real)
        found = torch.autograd.grad(block, list(outputs.values()), direction, allow_unused=True)
        return {path: one for path, one in zip(outputs, found, strict=True) if one is not None}

    def moments(
        self,
        paths: Sequence[str],
        lowered: Mapping[str, nn.Module],
        sensitivities: Mapping[str, Sequence[torch.Tensor]] | None = None,
    ) -> dict[str, Moments]:
        """Of what the modules of a stage read, in the float block and where `lowered` modules stand in it, by path.

        Tokens count by `sensitivities`, or all the same, and then matrices that read the same have the same moments.
        Paths that no token of any example reaches are left out.
        """
        found: dict[str, Moments] = {}
        with self._there(lowered), torch.inference_mode():  # in this order: what comes back may learn
            for number, example in enumerate(self.examples):
                exact = self._input(paths[0], example.exact, example)
                with self._placed(lowered):
                    own = self._input(paths[0], example.lowered, example)
                if own is None or not len(own):
                    continue
                for path in paths if sensitivities else paths[:1]:
                    counts = sensitivities[path][number] if sensitivities else None
                    moments = found.setdefault(path, Moments(own.shape[-1], device=own.device))
                    moments.update(own if exact is None else exact, own, counts)
                give_back()
        return found if sensitivities else {path: moments for path in paths for moments in found.values()}

    def _input(self, path: str, hidden: torch.Tensor, example: Example) -> torch.Tensor | None:
        """Rows of real tokens that enter a module."""
        found: list[torch.Tensor] = []

        def keep(_: Any, args: Any) -> None:
            found.append(args[0])
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
        return _real_rows(found[0], example.real)


def _real_rows(rows: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Of `[…, features]`, those of real tokens, `[rows, features]`.

    An expert sees only the tokens that were sent to it: then nobody knows which are padding, and all are real.
    """
    rows, known = rows.flatten(0, -2), real.flatten().to(rows.device)
    return rows[known] if len(rows) == len(known) else rows


def _random_direction(block: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Normal numbers for a block's output `[batch, tokens, hidden]`, over the norm of each token.

    Nothing at padding, unless the block itself padded its input: then nobody knows where that is. A token with next to
    nothing counts as one with a tenth of the median norm, or it would count more than all others.
    """
    norms = block.float().norm(dim=-1, keepdim=True)
    fits = real.shape == norms.shape[:-1]
    known = real.to(norms.device) if fits else torch.ones_like(norms[..., 0], dtype=torch.bool)
    if not known.any():
        return torch.zeros_like(block)
    least = (_SILENT * norms[known].median()).clamp_min(torch.finfo(torch.float32).tiny)
    drawn = torch.randn(block.shape).to(norms.device)  # by the host's generator: the same numbers on every device
    direction: torch.Tensor = drawn / norms.maximum(least) * known[..., None]
    return direction.to(block.dtype)


def _over_mean(rows: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Over the mean of all; where that says nothing, all count the same."""
    mean = torch.cat(list(rows)).mean()
    return [one / mean if mean > 0 and mean.isfinite() else torch.ones_like(one) for one in rows]


def _keep_output(outputs: dict[str, torch.Tensor], path: str, module: nn.Module, args: Any, output: Any) -> None:
    """Of the first call, whose input is the one that counts."""
    outputs.setdefault(path, output)


def _put(model: Any, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
