"""What a model's score loses without some of its attention heads, on examples that are read once.

A head is masked by setting its slice of the attention context to zero before the output projection: the same numbers,
up to rounding, as from a model of which it is cut out (`qtool.pruning`).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from qtool import ranks
from qtool.analysis.search import NOTHING, Head, Heads
from qtool.anatomy import known_blocks
from qtool.errors import InputError
from qtool.evaluation import metrics
from qtool.evaluation.batches import cut
from qtool.evaluation.divergence import row_divergences
from qtool.evaluation.exams import Exam
from qtool.evaluation.exams.classification import Classification
from qtool.evaluation.sides import Side, put_together
from qtool.pruning import Attention, attentions

Kind = Literal["score", "agreement", "kl"]
KINDS: dict[str, str] = {
    "score": "the task's score in points (perplexity: 100 · whole / pruned)",
    "agreement": "percent of answers that are those of the whole model",
    "kl": "minus the mean KL divergence from the whole model's distributions, in nats",
}
"""What a search may keep up; the last two need no labels."""
BUDGETS: dict[str, float] = {"score": 0.5, "agreement": 2.0, "kl": 0.02}
"""What a search may cost unless something else is asked for, in the unit of the metric."""
KEPT_VALUES = 1 << 27
"""Hidden states and logits of the whole model that are kept, 512 MB; others are computed again each time."""
_ASKED = "heads to measure"


def removable(model: Any, protected: Iterable[tuple[int, int | None]] = ()) -> list[Head]:
    """Every head of a model but the protected ones (None: all of a layer), in order.

    Raises InputError for one that does not exist.
    """
    every = [(layer, head) for layer, site in enumerate(attentions(model)) for head in range(site.count)]
    kept: set[Head] = set()
    for layer, number in protected:
        own = {head for head in every if head[0] == layer and number in (None, head[1])}
        if not own:
            raise InputError(f"there is no head {layer}{'' if number is None else f'.{number}'} that could be kept")
        kept |= own
    return [head for head in every if head not in kept]


@contextmanager
def without(model: Any, heads: Heads) -> Iterator[None]:
    """While active, `heads` of a float model say nothing."""
    sites = attentions(model) if heads else []
    with ExitStack() as stack:
        for layer in sorted({layer for layer, _ in heads}):
            channels = sites[layer].channels(sorted(head for own, head in heads if own == layer))
            stack.callback(_muted(model, sites[layer], torch.tensor(channels)).remove)
        yield


def _muted(model: Any, site: Attention, channels: torch.Tensor) -> Any:
    def mute(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0].index_fill(-1, channels.to(args[0].device), 0.0),)

    return model.get_submodule(site.output.path).register_forward_pre_hook(mute)


@dataclass(frozen=True)
class Measured:
    """A model on an exam: its score in points (a perplexity as it is), answers, what agreement compares, and its mean
    KL divergence from the whole model, None where that was not measured."""

    score: float
    answers: list[Any]
    choices: list[Any] | None
    kl: float | None


class Judge:
    """Measures what is left of a model without a set of heads. Deterministic: batches are cut once.

    `side` is the whole model with its rows, prepared by `exam`. What the whole model computes in each block is kept, as
    long as there is room, and taken for the blocks before the first that loses a head: the same numbers, sooner.
    """

    def __init__(self, exam: Exam, side: Side, kind: Kind, group: ranks.Ranks = ranks.ALONE) -> None:
        """Of a `group` of ranks the first one asks, the others `serve` it, and each measures a share of the batches.

        Raises InputError for a metric that the task does not have, or a model whose score is NaN.
        """
        self.exam, self.side, self.kind, self._group = exam, side, kind, group
        self._batches = cut(side.rows, exam.batch_size())
        self._blocks = [side.model.get_submodule(unit.modules[0]) for unit in known_blocks(side.model)]
        self._states: dict[int, list[Any]] = {}
        self._logits: dict[int, list[torch.Tensor]] = {}
        self._room = KEPT_VALUES
        if kind == "kl" and not exam.distributes:
            raise InputError(f"task '{exam.task.name}' has no probabilities to compare; use --metric score")
        self.whole = self._measured(NOTHING)
        if math.isnan(self.whole.score):
            raise InputError(f"{side.subject.name} gives NaN on {exam.task.name}; its checkpoint is damaged")
        if kind == "agreement" and self.whole.choices is None:
            raise InputError(f"task '{exam.task.name}' has no answers that could be equal; use --metric score")

    def __call__(self, heads: Heads) -> float:
        """The metric, higher is better; NaN where the pruned model gives it."""
        found = self.measure(heads)
        if self.kind == "kl":
            assert found.kl is not None
            return 0.0 - found.kl  # not -0.0
        if self.kind == "agreement":
            assert found.choices is not None and self.whole.choices is not None
            return metrics.agreement(found.choices, self.whole.choices)
        return points(self.exam, found.score, self.whole.score)

    def measure(self, heads: Heads) -> Measured:
        """The model without `heads` on all examples."""
        if not heads:
            return self.whole
        self._group.told(_ASKED, [list(head) for head in sorted(heads)])
        return self._measured(heads)

    def serve(self) -> None:
        """Measure what the first rank asks for, until it is done."""
        while (asked := self._group.told(_ASKED, None)) is not None:
            self._measured(frozenset((layer, head) for layer, head in asked))

    def dismiss(self) -> None:
        """Let the ranks that serve go."""
        self._group.told(_ASKED, None)
        self._group = ranks.ALONE

    @torch.inference_mode()
    def _measured(self, heads: Heads) -> Measured:
        empty: Any = np.empty(0)
        divergences = [empty] * len(self.side.rows) if self.kind == "kl" else []
        side = replace(self.side, collected=[None] * len(self.side.rows), divergences=divergences)
        mine = self._group.share(len(self._batches))
        for number in mine:
            self._batch(side, number, self._batches[number], heads)
        if self._group.size > 1:
            put_together(side, [index for number in mine for index in self._batches[number]])
        answers = self.exam.answers(side)
        score = metrics.points(self.exam.task.metric, answers, self.exam.references)
        found = self.exam.divergences(side) if divergences else []
        return Measured(score, answers, self.exam.choices(side), math.fsum(found) / len(found) if found else None)

    def _batch(self, side: Side, number: int, indices: Sequence[int], heads: Heads) -> None:
        """Collect a batch, and how far its distributions are from the whole model's."""
        batch, about = side.batch(indices), [side.about[index] for index in indices]
        with ExitStack() as stack:
            stack.enter_context(without(side.model, heads))
            if not heads:
                stack.enter_context(self._recording(number))
            elif number in self._states:
                stack.enter_context(self._replaying(number, min(layer for layer, _ in heads)))
            output = side.forward(batch)
        for index, value in zip(indices, self.exam.collect(side, output, batch, about), strict=True):
            side.collected[index] = value
        if self.kind != "kl":
            return
        own = self.exam.logits(side, output, batch, about)
        if not heads:
            self._keep(own, lambda: self._logits.update({number: [row.clone() for row in own]}))
        theirs = self._logits.get(number) or self.exam.logits(side, side.forward(batch), batch, about)
        for index, value in zip(indices, row_divergences(theirs, own), strict=True):
            side.divergences[index] = value

    @contextmanager
    def _recording(self, number: int) -> Iterator[None]:
        """Keep what leaves each block for a batch."""
        left: list[Any] = []
        with ExitStack() as stack:
            for block in self._blocks[:-1]:
                stack.callback(block.register_forward_hook(lambda _, __, out: left.append(out)).remove)
            yield
        tensors = [out[0] if isinstance(out, tuple | list) else out for out in left]
        self._keep(tensors, lambda: self._states.update({number: left}))

    @contextmanager
    def _replaying(self, number: int, first: int) -> Iterator[None]:
        """While active, blocks before `first` give what they gave the whole model."""
        known = self._states[number]
        try:
            for index, block in enumerate(self._blocks[:first]):
                block.forward = lambda *args, out=known[index], **kwargs: out
            yield
        finally:
            for block in self._blocks[:first]:
                vars(block).pop("forward", None)

    def _keep(self, tensors: Sequence[torch.Tensor], keep: Callable[[], None]) -> None:
        """Where there is room."""
        size = sum(tensor.numel() for tensor in tensors)
        if size <= self._room:
            self._room -= size
            keep()


def points(exam: Exam, score: float, whole: float) -> float:
    """A score on a scale where higher is better; a perplexity as 100 · whole / score."""
    return 100.0 * whole / score if exam.task.metric == "perplexity" else score


def gradient_ranking(exam: Exam, side: Side) -> dict[Head, float]:
    """E|∂L/∂m_h| of every head, where m_h = 1 multiplies its slice of the context (Michel, Levy and Neubig 2019,
    "Are Sixteen Heads Really Better than One?", equation 2).

    L is, of each row, −log of the probability of its label; where the labels of a task are no class of a row, of what
    the whole model itself says at each place. Raises InputError for a task without probabilities.
    """
    if not exam.distributes or side.subject.probed:
        raise InputError(f"task '{exam.task.name}' has no loss to take gradients of; use another --search")
    sites = attentions(side.model)
    sums = [torch.zeros(site.count, dtype=torch.float64) for site in sites]
    for indices in cut(side.rows, exam.batch_size()):
        masks = [torch.ones(len(indices), site.count, requires_grad=True) for site in sites]
        with _scaled(side.model, sites, masks):
            _loss(exam, side, indices).backward()
        for total, mask in zip(sums, masks, strict=True):
            assert mask.grad is not None
            total += mask.grad.double().abs().sum(0)
    side.model.zero_grad(set_to_none=True)
    return {
        (layer, head): float(value) / len(side.rows)
        for layer, total in enumerate(sums)
        for head, value in enumerate(total)
    }


@contextmanager
def _scaled(model: Any, sites: Sequence[Attention], masks: Sequence[torch.Tensor]) -> Iterator[None]:
    """While active, the context of each row is multiplied by its masks `[rows, heads]`."""

    def scale(mask: torch.Tensor, width: int) -> Callable[..., tuple[torch.Tensor]]:
        return lambda module, args: (args[0] * mask.repeat_interleave(width, dim=1)[:, None].to(args[0].device),)

    with ExitStack() as stack:
        for site, mask in zip(sites, masks, strict=True):
            module = model.get_submodule(site.output.path)
            stack.callback(module.register_forward_pre_hook(scale(mask, site.width)).remove)
        yield


def _loss(exam: Exam, side: Side, indices: Sequence[int]) -> torch.Tensor:
    """The sum over rows of −log p of the labels, or of what the model says at each place."""
    batch, about = side.batch(indices), [side.about[index] for index in indices]
    total = torch.zeros(())
    for index, row in zip(indices, exam.logits(side, side.forward(batch), batch, about), strict=True):
        if row.shape[0]:
            label = exam.references[index] if isinstance(exam, Classification) else None
            target = row.detach().argmax(-1) if label is None else torch.tensor([label])
            total = total + torch.nn.functional.cross_entropy(row.float(), target, reduction="sum")
    return total
