"""Layer-by-layer distillation: what the student computes, what learns, and what happens to a block that got worse."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from qtool import distill as lkd
from qtool.distill import Schedule, distill
from qtool.lesson import Example, Lesson
from qtool.nn import QLinear
from qtool.nn.linear import parse_activations
from qtool.numerics import QuantSpec
from qtool.rounding import nearest

MODELS = ["BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"]
SPEC = QuantSpec.parse("int3:group:8:sym")


def rounded(known: Lesson, spec: QuantSpec = SPEC) -> tuple[dict[str, QLinear], dict[str, torch.Tensor]]:
    """The block's linears to nearest, and their float weights `[out, in]`."""
    linears, weights = {}, {}
    for path, module in known.module(known.unit.modules[0]).named_modules(prefix=known.unit.modules[0]):
        if path in {part.path for part in known.unit.parts}:
            transposed = type(module).__name__ == "Conv1D"
            weights[path] = (module.weight.t() if transposed else module.weight).detach().clone().contiguous()
            tensor = nearest(weights[path], spec)
            own = QLinear(tensor.shape, spec, QuantSpec.parse("int8:token:sym"), bias=module.bias is not None)
            own.fill(tensor)
            if module.bias is not None:
                own.bias = module.bias.detach().clone()
            linears[path] = own
    return linears, weights


@torch.inference_mode()
def held_out_loss(known: Lesson, linears: Any, floats: Any, *, inputs: str = "teacher") -> float:
    """Mean over real tokens of every eighth batch of the squared error, with `linears` and `floats` in the block, over
    the square of what the token should be."""
    examples = known.examples[7::8]
    targets = [known.forward(one.exact, one.call) for one in examples]
    block = known.module(known.unit.modules[0])
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    own = {name.removeprefix(f"{known.unit.modules[0]}."): tensor for name, tensor in floats.items()}
    block.load_state_dict(own, strict=False)
    with known.standing_in(linears):
        found = [known.forward(one.exact if inputs == "teacher" else one.lowered, one.call) for one in examples]
    block.load_state_dict(before, strict=False)
    pairs = [(a[one.real].double(), b[one.real].double()) for a, b, one in zip(found, targets, examples, strict=True)]
    return float(torch.cat([(a - b).square().sum(-1) / b.square().sum(-1) for a, b in pairs]).mean())


@pytest.mark.parametrize("inputs", ["teacher", "student"])
@pytest.mark.parametrize("architecture", MODELS)
def test_a_block_learns(architecture: str, inputs: Any, lesson: Any) -> None:
    """Losses are those of the modules that will run, computed here again, and the last one is much less."""
    with lesson(architecture) as known:
        linears, weights = rounded(known)
        outcome = distill(known, linears, weights, Schedule(inputs=inputs, steps=150, learning_rate=0.05))
        before = held_out_loss(known, linears, {}, inputs=inputs)
        after = held_out_loss(known, outcome.linears, outcome.floats, inputs=inputs)
    assert outcome.before == pytest.approx(before, rel=1e-5)
    assert outcome.after == pytest.approx(after, rel=1e-5)
    assert after < (0.75 if inputs == "teacher" else 0.9) * before  # disturbed inputs leave an error behind
    assert outcome.linears.keys() == linears.keys()
    assert all(int(one.matrix().integers().abs().max()) <= SPEC.qmax for one in outcome.linears.values())


@pytest.mark.parametrize("activations", ["int8:token:sym", "int8:tensor:sym", "float"])
@pytest.mark.parametrize(
    "spelling",
    [
        "int3:group:8:sym",
        "int4:rows:4:sym",
        "int8:channel:sym",
        "int2:tensor:sym",
        "int4:group:12:asym",
        "int3:group:20:min",
    ],
)
def test_a_learner_computes_what_the_linear_will(spelling: str, activations: str) -> None:
    """Before it learned anything, and after its codes and scales were moved about."""
    torch.manual_seed(1)
    spec, x, weight = QuantSpec.parse(spelling), torch.randn(50, 32), torch.randn(24, 32)
    linear = QLinear((24, 32), spec, parse_activations(activations), bias=True)
    linear.fill(nearest(weight + 0.2, spec))
    linear.bias = torch.randn(24)
    linear.act_scale = torch.tensor([0.02]) if activations == "int8:tensor:sym" else None
    learner = lkd._Learner(linear, weight, "both")
    torch.testing.assert_close(learner(x), linear(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        learner.places += torch.randn(24, 32)
        learner.logs += 0.1 * torch.randn(learner.logs.shape)
        if spec.minimum:
            learner.zero += 0.3
        assert learner.bias is not None
        learner.bias += 1
    moved = learner.learned()
    assert not torch.equal(moved.weight, linear.weight)
    torch.testing.assert_close(learner(x), moved(x), rtol=1e-5, atol=1e-5)


def test_a_learner_starts_at_the_codes_that_were_chosen() -> None:
    """Also at such that are not the nearest, as GPTQ chooses."""
    torch.manual_seed(2)
    spec, weight = QuantSpec.parse("int4:channel:sym"), torch.randn(16, 32)
    tensor = nearest(weight + 0.3 * torch.randn(16, 32), spec)
    linear = QLinear((16, 32), spec, QuantSpec.parse("int8:token:sym"), bias=False)
    linear.fill(tensor)
    learner = lkd._Learner(linear, weight, "both")
    assert torch.equal(learner.learned().weight, linear.weight)
    places, codes = learner.places.detach(), tensor.integers()
    free = (weight / tensor.params.scale - codes).abs() < 0.49
    torch.testing.assert_close(places[free], (weight / tensor.params.scale)[free], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("train", "same"), [("weights", "weight_scale"), ("scales", "weight")])
def test_only_what_shall_learn_does(train: Any, same: str, lesson: Any) -> None:
    with lesson() as known:
        linears, weights = rounded(known)
        outcome = distill(known, linears, weights, Schedule(train=train, steps=50, learning_rate=0.05))
        assert outcome.after < outcome.before
        other = {"weight": "weight_scale", "weight_scale": "weight"}[same]
        for path, own in outcome.linears.items():
            assert torch.equal(getattr(own, same), getattr(linears[path], same)), path
        assert any(
            not torch.equal(getattr(own, other), getattr(linears[path], other)) for path, own in outcome.linears.items()
        )


def test_a_block_that_gets_worse_stays_as_it_was(lesson: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exam that decides is the one after training; here it finds the block spoiled."""
    with lesson() as known:
        linears, weights = rounded(known)
        real, told = lkd._Exam.loss, list[float]()

        def spoiled(self: Any) -> float:
            told.append(real(self))
            return told[-1] if len(told) < 4 else told[0] * 1.01

        monkeypatch.setattr(lkd._Exam, "loss", spoiled)
        outcome = distill(known, linears, weights, Schedule(steps=25))
    assert len(told) == 4
    assert outcome.after > outcome.before and not outcome.linears and not outcome.floats


def test_the_best_look_counts(lesson: Any) -> None:
    """A rate that ruins the block soon: what was seen before that is kept, never something worse than the start."""
    with lesson() as known:
        linears, weights = rounded(known)
        outcome = distill(known, linears, weights, Schedule(steps=75, learning_rate=1.0))
        assert min(outcome.before, outcome.after) == pytest.approx(
            held_out_loss(known, {**linears, **outcome.linears}, outcome.floats), rel=1e-5
        )


def test_patience_ends_it(lesson: Any) -> None:
    with lesson() as known:
        linears, weights = rounded(known)
        outcome = distill(known, linears, weights, Schedule(steps=500, learning_rate=1.0, patience=2))
    assert outcome.steps < 500 and outcome.steps % 25 == 0


def test_the_float_block_is_as_before(lesson: Any) -> None:
    with lesson() as known:
        block = known.module(known.unit.modules[0])
        before = copy.deepcopy(block.state_dict())
        parameters = dict(block.named_parameters())
        distill(known, *rounded(known), Schedule(steps=30, learning_rate=0.05))
        assert dict(block.named_parameters()) == parameters  # the same objects
        assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


def test_padding_teaches_nothing(lesson: Any) -> None:
    """What stands at padded places changes no result: neither theirs nor their targets'."""
    outcomes = []
    for junk in (0.0, 100.0):
        with lesson() as known:
            known.examples = [_with_junk(one, junk) for one in known.examples]
            torch.manual_seed(5)
            outcomes.append(distill(known, *rounded(known), Schedule(steps=30, learning_rate=0.05)))
    first, second = outcomes
    assert first.before == second.before and first.after == second.after
    for path, own in first.linears.items():
        assert torch.equal(own.weight, second.linears[path].weight)


def _with_junk(example: Example, junk: float) -> Example:
    where = ~example.real[..., None]
    return replace(
        example,
        exact=example.exact.clone().masked_fill(where, junk),
        lowered=example.lowered.clone().masked_fill(where, junk),
    )


def test_a_large_token_counts_as_others_do() -> None:
    """One token is a thousand times as large: the loss hears of an error in another one; of none that are silent."""
    target, real = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 5, dtype=torch.bool)
    target[0, 0] *= 1000
    off = torch.zeros_like(target)
    off[0, 3] = 0.5 * target[0, 3]
    assert float(lkd._loss(Schedule(), target + off, target, real)) == pytest.approx(0.25 / 5, rel=1e-5)
    off[0, 0] = 0.5 * target[0, 0]
    assert float(lkd._loss(Schedule(), target + off, target, real)) == pytest.approx(0.5 / 5, rel=1e-5)
    assert lkd._loss(Schedule(), target + off, torch.zeros_like(target), real).isfinite()


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_the_same_seed_gives_the_same_codes(loss: Any, lesson: Any) -> None:
    found = []
    for seed in (3, 3, 4):
        with lesson() as known:
            torch.manual_seed(seed)
            found.append(distill(known, *rounded(known), Schedule(loss=loss, steps=40, learning_rate=0.05)))
    assert found[0].after < found[0].before
    same = [all(torch.equal(a.weight, b.linears[path].weight) for path, a in found[0].linears.items()) for b in found]
    assert same == [True, True, False]


def test_the_divergence_is_that_of_softmax_over_features() -> None:
    torch.manual_seed(0)
    found, target = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    p, q = target[real].double().softmax(-1), found[real].double().softmax(-1)
    wanted = (p * (p / q).log()).sum(-1).mean()
    loss = lkd._loss(Schedule(loss="kl"), found, target, real)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)


def test_batches_that_are_held_out_do_not_teach() -> None:
    examples: Any = list(range(20))
    taught, held_out = lkd._split(examples)
    assert held_out == [7, 15] and sorted(taught + held_out) == examples
    assert lkd._split(examples[:3]) == ([0, 1], [2])
    assert lkd._split(examples[:1]) == ([0], [0])
