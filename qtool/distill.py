"""LKD: layer-by-layer knowledge distillation (Yao et al. 2022, section 4.3), for one block.

The float block is the teacher. The student is the same block with its linears rounded; what is rounded learns by
gradient descent through the rounding (straight-through), against the teacher's output on all real tokens. Gradients and
optimizer state exist for one block at a time. Every tenth batch or so is held out: it tells when to stop, and whether
the block got better at all; if not, nothing changes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from qtool.kernels.reference import QMAX
from qtool.lesson import Example, Lesson
from qtool.nn import QLinear
from qtool.numerics import QTensor
from qtool.numerics.qtensor import QParams, column_width
from qtool.stream import give_back

_HELD_OUT = 8  # one batch of so many
CHECK_STEPS = 25
"""Updates between two looks at the held-out batches."""
_SCALE_SHARE = 0.1  # scales move by this share of what codes move, relative to themselves
_VECTOR_SHARE = 0.01  # biases and norms, whose natural unit is 1, move by this share
_SILENT = 1e-6  # of the mean energy of tokens: one with less is taken for that, or its error would be infinite
_NOTHING = 1e-12  # energy of a token where all are silent
_INSIDE = 0.49  # how far from its code a weight may start, in steps


@dataclass(frozen=True)
class Schedule:
    """How a block is taught.

    `inputs` are those that the float model has (teacher) or those that the lowered one has (student); `loss` is the
    mean squared error of the block's output, relative to each token's mean square, or the KL divergence of its softmax
    over features. `learning_rate` is in steps of the weights' grid; it falls to 0 along a cosine. Every 25 steps comes
    a look at the held-out batches, of which the best counts; after `patience` looks without gain training ends.
    """

    inputs: Literal["teacher", "student"] = "teacher"
    loss: Literal["mse", "kl"] = "mse"
    train: Literal["weights", "scales", "both"] = "both"
    steps: int = 300
    learning_rate: float = 0.01
    patience: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a block: its loss on the held-out batches before and after, with the modules as they will run.

    `linears` by path and other parameters, `floats`, by name are empty where the block would have got worse.
    """

    before: float
    after: float
    steps: int
    linears: Mapping[str, QLinear]
    floats: Mapping[str, torch.Tensor]


Targets = Sequence[tuple[torch.Tensor, Any]]
"""The teacher's outputs, by example, on the host."""


class _Round(torch.autograd.Function):
    """Half up; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.floor(x + 0.5)

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> torch.Tensor:
        return gradient[0]


def _rounded(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _Round.apply(x)  # type: ignore[no-untyped-call]
    return result


class _Learner(nn.Module):
    """A linear that computes what a `QLinear` will, while its codes and scales learn.

    `places` are the weights in steps of the grid, `[out, in]`: they start where the float weights are, moved just so
    far that they round to the codes that were chosen. Inputs are rounded as they will be.
    """

    def __init__(self, linear: QLinear, weight: torch.Tensor, train: str) -> None:
        super().__init__()
        self.linear, self._known = linear, linear.matrix()
        scale, codes = linear.weight_scale, self._known.integers().float()
        offset = self._known.params.offsets()
        zero = torch.zeros_like(scale) if offset is None else offset / scale  # what code 0 stands for, in steps
        places = weight.float() / self._spread(scale) - self._spread(zero)
        places = torch.minimum(torch.maximum(places, codes - _INSIDE), codes + _INSIDE)
        self.places = nn.Parameter(places, requires_grad=train != "scales")
        self.logs = nn.Parameter(torch.zeros_like(scale), requires_grad=train != "weights")
        self.zero = nn.Parameter(zero, requires_grad=train != "weights" and linear.weights.minimum)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.float().clone(), requires_grad=train != "scales")

    def _spread(self, blocks: torch.Tensor) -> torch.Tensor:
        """`[row blocks, column blocks]` as `[out, in]`; the last block of columns may be narrower."""
        rows, columns = self._known.shape
        wide = blocks.repeat_interleave(rows // blocks.shape[0], 0)
        return wide.repeat_interleave(column_width(self.linear.weights, columns), 1)[:, :columns]

    def _codes(self) -> torch.Tensor:
        return _rounded(self.places).clamp(self.linear.weights.qmin, self.linear.weights.qmax)

    def _scale(self) -> torch.Tensor:
        return self.linear.weight_scale * self.logs.exp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` to `[..., out]`."""
        weight = (self._codes() + self._spread(self.zero)) * self._spread(self._scale())
        return F.linear(self._rounded_input(x.float()), weight, self.bias).to(x.dtype)

    def _rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        if self.linear.activations == "float":
            return x
        if self.linear.act_scale is not None:
            return _rounded(x / self.linear.act_scale).clamp(-QMAX, QMAX) * self.linear.act_scale
        scale = x.detach().abs().amax(-1, keepdim=True).div(QMAX).clamp_min(torch.finfo(torch.float32).tiny)
        return _rounded(x / scale) * scale

    @torch.no_grad()
    def learned(self) -> QLinear:
        """The linear with the matrix and the bias as they are now."""
        known, spec = self.linear, self.linear.weights
        own = QLinear(self._known.shape, spec, known.activations, bias=known.bias is not None, device="meta")
        scale = self._scale()
        params = QParams(scale, known.weight_zero_point, scale * self.zero if spec.minimum else None)
        own.fill(QTensor.store(self._codes().to(torch.int8), params, spec, "tiled"))
        own.bias, own.act_scale = None if self.bias is None else self.bias.clone(), known.act_scale
        return own


def distill(
    lesson: Lesson, linears: Mapping[str, QLinear], weights: Mapping[str, torch.Tensor], schedule: Schedule
) -> Outcome:
    """Teach the block of `lesson`, whose `linears` are rounded, by path, from float `weights` `[out, in]`.

    The order of batches comes from torch's random numbers. Deterministic for a number of threads.
    """
    if not linears:
        return Outcome(0.0, 0.0, 0, {}, {})
    taught, held_out = _split(lesson.examples)
    targets = _teach(lesson)
    exam = _Exam(lesson, schedule, held_out, targets)
    with lesson.standing_in(linears):
        before = exam.loss()
    learners = {path: _Learner(linear, weights[path], schedule.train) for path, linear in linears.items()}
    with _own_floats(lesson, linears, schedule) as floats:
        with lesson.standing_in(learners):
            steps = _train(lesson, schedule, taught, targets, [*learners.values()], [*floats.values()], exam)
        found = {path: learner.learned() for path, learner in learners.items()}
        with lesson.standing_in(found):
            after = exam.loss()
    if not after < before:  # NaN is no gain either
        return Outcome(before, after, steps, {}, {})
    learned = {name: tensor.detach().clone().cpu() for name, tensor in floats.items()}
    return Outcome(before, after, steps, found, learned)


def _split(examples: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Numbers of the examples to learn from and of those held out; a single one is both."""
    held_out = [number for number in range(len(examples)) if number % _HELD_OUT == _HELD_OUT - 1]
    held_out = held_out or [len(examples) - 1]
    return [number for number in range(len(examples)) if number not in held_out] or held_out, held_out


@torch.inference_mode()
def _teach(lesson: Lesson) -> Targets:
    """The float block's outputs on the float inputs, kept as hidden states are."""
    targets = lesson.keep()
    for example in lesson.examples:
        targets.append((lesson.forward(example.exact, example.call).cpu(), ()))
        give_back()
    return targets


def _student_input(example: Example, schedule: Schedule) -> torch.Tensor:
    return example.lowered if schedule.inputs == "student" else example.exact


def _loss(schedule: Schedule, found: torch.Tensor, target: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Over real tokens: the mean squared error over the mean square of its token, or the mean divergence of features.

    Relative to its token, because the next norm is: the first token of many decoders is hundreds of times as large as
    all others, and would be all that a block learns.
    """
    real = real.to(found.device)
    found, target = found[real].float(), target.to(found.device)[real].float()
    if schedule.loss == "mse":
        energy = target.square().mean(-1, keepdim=True)
        least = (_SILENT * energy.mean()).clamp_min(_NOTHING)
        return ((found - target).square() / energy.maximum(least)).mean()
    return F.kl_div(found.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")


@dataclass(frozen=True)
class _Exam:
    """The held-out batches."""

    lesson: Lesson
    schedule: Schedule
    numbers: Sequence[int]
    targets: Targets

    @torch.inference_mode()
    def loss(self) -> float:
        """Of the block as it stands; a batch counts by its real tokens."""
        total = tokens = 0.0
        for number in self.numbers:
            example = self.lesson.examples[number]
            found = self.lesson.forward(_student_input(example, self.schedule), example.call)
            count = int(example.real.sum())
            total += float(_loss(self.schedule, found, self.targets[number][0], example.real)) * count if count else 0.0
            tokens += count
            give_back()
        return total / max(tokens, 1.0)


@contextmanager
def _own_floats(
    lesson: Lesson, linears: Mapping[str, QLinear], schedule: Schedule
) -> Iterator[dict[str, nn.Parameter]]:
    """While active, vectors beside the block's matrices are copies that may learn, by their names in the model.

    Matrices that are not among `linears` stay as they are: somebody wants them so.
    """
    path, kept = lesson.unit.modules[0], {*linears, *(part.path for part in lesson.unit.parts)}
    floats: dict[str, nn.Parameter] = {}
    with ExitStack() as stack:
        for place, module in lesson.module(path).named_modules(prefix=path):
            if place in kept:
                continue
            for name, known in module._parameters.items():
                if known is None or not known.is_floating_point() or known.dim() != 1:
                    continue
                own = nn.Parameter(known.detach().clone(), requires_grad=schedule.train != "scales")
                stack.callback(module._parameters.__setitem__, name, known)
                floats[f"{place}.{name}"] = module._parameters[name] = own
        yield floats


def _train(
    lesson: Lesson,
    schedule: Schedule,
    numbers: Sequence[int],
    targets: Targets,
    learners: Sequence[_Learner],
    floats: Sequence[nn.Parameter],
    exam: _Exam,
) -> int:
    """Learn, look at the held-out batches now and then, end with the best that was seen, and return the steps made."""
    optimizer = torch.optim.Adam(_groups(schedule, learners, floats))
    learning = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.steps)
    best, kept = exam.loss(), [tensor.detach().clone() for tensor in learning]
    order: list[int] = []
    step = waited = 0
    while step < schedule.steps and waited != schedule.patience:
        order = order or torch.randperm(len(numbers)).tolist()
        number = numbers[order.pop()]
        example = lesson.examples[number].normal()
        found = lesson.forward(_student_input(example, schedule), example.call)
        loss = _loss(schedule, found, targets[number][0].clone(), example.real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        step += 1
        if step % CHECK_STEPS == 0 or step == schedule.steps:
            now = exam.loss()
            waited = 0 if now < best else waited + 1
            if now < best:
                best, kept = now, [tensor.detach().clone() for tensor in learning]
    with torch.no_grad():
        for tensor, value in zip(learning, kept, strict=True):
            tensor.copy_(value)
    return step


def _groups(schedule: Schedule, learners: Sequence[_Learner], floats: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """What learns, and how fast."""
    rate = schedule.learning_rate
    vectors = [*(learner.bias for learner in learners if learner.bias is not None), *floats]
    rates = {
        rate: [learner.places for learner in learners],
        rate * _SCALE_SHARE: [one for learner in learners for one in (learner.logs, learner.zero)],
        rate * _VECTOR_SHARE: vectors,
    }
    groups = [{"params": [one for one in params if one.requires_grad], "lr": own} for own, params in rates.items()]
    return [group for group in groups if group["params"]]
