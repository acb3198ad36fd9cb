"""Kernels of a decoder's step against float64, and blocks that they join; products are split in several ways."""

from typing import Any

import pytest
import torch
from blocks64 import angles, back64, close, front64
from draws import Draw
from small_models import Artifacts, load
from taped_graph import tape
from transformers import StaticCache

from qtool import kernels
from qtool.decoder import FEW_ROWS, _plan
from qtool.kernels.triton import step, tuning
from qtool.kernels.triton.float_launch import Codes
from qtool.nn.plan import NoPlan, one_by_one
from qtool.nn.step import StepPlan
from qtool.numerics.qtensor import pack_nibbles, tile

FLOAT = "activations=float"
RECIPES: dict[str, tuple[str, ...]] = {
    "minimum": ("weights=int4:group:16:min", FLOAT),
    "zero points": ("weights=int8:channel:asym", FLOAT),
    "blocks": ("weights=int4:block:4x8:sym", FLOAT),
}
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen2ForCausalLM": {},  # queries, keys and values have biases
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.mktemp("models"), "steps")


@pytest.fixture(params=[1, 20])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a GPU: with more, products are split."""
    monkeypatch.setattr(tuning, "machine", lambda: (9, request.param))
    return int(request.param)


def drawn(outputs: int, inputs: int, width: int, bits: int, offset: bool) -> tuple[step.Matrix, torch.Tensor]:
    """A matrix, and what it stands for in float64."""
    draw = Draw(outputs)
    codes = draw.integers(-8, 7, outputs, inputs).to(torch.int8)
    scale, point = draw.normal(2, outputs, -(-inputs // width)).unbind(0)
    stored = tile(codes) if bits == 8 else pack_nibbles(tile(codes))
    wide = [x.double().repeat_interleave(width, 1)[:, :inputs] for x in (scale, point)]
    meant = codes.double() * wide[0] + (wide[1] if offset else 0)
    return step.Matrix(Codes.of(stored, (outputs, inputs), width), scale, point if offset else None), meant


def moved(device: torch.device, matrix: step.Matrix) -> step.Matrix:
    codes, scale, offset = matrix
    words = codes._replace(words=codes.words.to(device))
    return step.Matrix(words, scale.to(device), None if offset is None else offset.to(device))


@pytest.mark.parametrize("width, bits, offset", [(40, 8, False), (16, 4, True), (6, 4, False)])
@pytest.mark.parametrize("sizes", [(33,), (48, 16), (40, 7, 24)])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_the_same_rows(
    rows: int, sizes: tuple[int, ...], width: int, bits: int, offset: bool, processors: int, device: torch.device
) -> None:
    matrices, meant = zip(*(drawn(size, 40, width, bits, offset) for size in sizes), strict=True)
    assert len({matrix.form for matrix in matrices}) == 1
    x = Draw(rows).normal(rows, 40)
    product = step.Product([moved(device, matrix) for matrix in matrices], None)
    found = step.multiply(x.to(device), product).values.cpu()
    assert len(found) > 1 or processors == 1 or width == 40
    wanted = x.double() @ torch.cat(meant).T
    bound = x.double().abs() @ torch.cat(meant).abs().T * 60 * 2.0**-24  # as `test_float_linear` has it for one
    assert ((found.double().sum(0) - wanted).abs() <= bound).all()


@pytest.mark.parametrize("splits, bias", [(0, False), (1, True), (3, False), (5, True)])
@pytest.mark.parametrize("width", [1, 40, 129])
def test_norms(splits: int, bias: bool, width: int, device: torch.device) -> None:
    draw = Draw(splits + width)
    beside, weight, values = draw.normal(3, width) * 100, draw.normal(width), draw.normal(max(1, splits), 3, width)
    parts = step.Parts(values.to(device), draw.normal(width).to(device) if bias else None) if splits else None
    sums, normal = step.norm(beside.to(device), weight.to(device), 1e-5, parts)
    x = beside.double()
    if parts is not None:
        x = x + parts.values.cpu().double().sum(0) + (0 if parts.bias is None else parts.bias.cpu().double())
    torch.testing.assert_close(sums.cpu().double(), x, rtol=1e-6, atol=1e-5)
    wanted = weight.double() * x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(normal.cpu().double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", step.ACTIVATIONS)
def test_gates_of_all_sizes(activation: str, device: torch.device) -> None:
    """None overflows, what is far below zero lets nothing through, and what is no number shows."""
    inner = 1025
    gates = torch.cat((-torch.logspace(-3, 3, 512), torch.logspace(-3, 3, 513)))
    ups = Draw(0).normal(inner)
    parts = torch.stack((torch.cat((gates, ups)), torch.zeros(2 * inner)))[:, None].repeat(1, 2, 1)
    parts[0, 1, 7] = float("nan")
    found = step.gate(step.Parts(parts.to(device), None), activation).cpu()
    function = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}[activation]
    torch.testing.assert_close(found[0].double(), function(gates.double()) * ups.double(), rtol=2e-6, atol=1e-6)
    assert found[1].isnan().nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("architecture, recipe", [*zip(FAMILIES, RECIPES, strict=True)])
def test_halves_of_a_block_are_those_of_float64(
    artifacts: Artifacts, architecture: str, recipe: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "machine", lambda: (9, 20))  # products are split
    folder = artifacts.make(architecture, ("zeroquant",), *RECIPES[recipe], **FAMILIES[architecture])
    exact, layer = load(folder).model.layers[1], load(folder).to(device).model.layers[1]
    draw, size = Draw(0), exact.self_attn.head_dim
    for batch, tokens in [(1, 1), (3, 1), (2, 2)]:
        x = draw.normal(batch, tokens, 32) * torch.logspace(-2, 2, batch * tokens).view(batch, tokens, 1)
        context = draw.normal(batch, tokens, exact.self_attn.o_proj.in_features)
        turns = angles(batch, tokens, size, each=batch == 3)
        with kernels.using("triton"):
            plan = planned(layer, x.to(device), [turn.to(device) for turn in turns])
            states = plan.front(x.to(device), *(turn.to(device) for turn in turns))
            found = plan.back(context.to(device), x.to(device))
        with kernels.using("reference"):
            for one, wanted in zip(states, front64(exact, x.double(), *turns), strict=True):
                close(one.cpu(), wanted)
            close(found.cpu(), back64(exact, context.double(), x.double()))


def planned(layer: Any, x: torch.Tensor, turns: Any) -> Any:
    plan = _plan(layer, x, turns)
    assert isinstance(plan, StepPlan)
    return plan


@torch.no_grad()
def steps(model: Any, rows: int, device: torch.device, count: int = 2) -> torch.Tensor:
    """Scores of steps behind a prompt of four."""
    ids = torch.randint(5, 65, (rows, 4 + count), generator=torch.Generator().manual_seed(rows)).to(device)
    cache = StaticCache(config=model.config, max_cache_len=12)
    model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
    given = {"past_key_values": cache, "use_cache": True}
    return torch.stack([model(input_ids=ids[:, place, None], **given).logits for place in range(4, 4 + count)]).cpu()


def plans(model: Any) -> set[type]:
    return {type(layer.__dict__.get("_plan")) for layer in model.model.layers}


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_steps_are_joined(artifacts: Artifacts, architecture: str, device: torch.device) -> None:
    model = load(artifacts.make(architecture, ("zeroquant",), *RECIPES["minimum"], **FAMILIES[architecture])).to(device)
    with kernels.using("triton"):
        found = steps(model, 2, device)
        assert plans(model) == {StepPlan}
        with one_by_one():
            wanted = steps(model, 2, device)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, wanted)  # or they were not joined


def test_no_text_at_all(artifacts: Artifacts, device: torch.device) -> None:
    model = load(artifacts.make("LlamaForCausalLM", ("zeroquant",), *RECIPES["minimum"])).to(device)
    layer, angles = model.model.layers[0], torch.zeros(1, 1, 8, device=device)
    with kernels.using("triton"):
        assert _plan(layer, torch.zeros(0, 1, 32, device=device), (angles, angles)) is None


@pytest.mark.parametrize("why", ["rows", "int8 activations", "another form", "half"])
def test_what_is_not_joined(artifacts: Artifacts, why: str, device: torch.device) -> None:
    recipe: tuple[str, ...] = RECIPES["minimum"]
    if why == "int8 activations":
        recipe = ("weights=int4:group:16:min",)
    if why == "another form":
        recipe = (*recipe, 'rules={"part:attention.key": {"weights": "int8:channel:sym"}}')
    options: dict[str, Any] = {"dtype": torch.bfloat16} if why == "half" else {}
    model = load(artifacts.make("LlamaForCausalLM", ("zeroquant",), *recipe), **options).to(device)
    with kernels.using("triton"):
        assert steps(model, FEW_ROWS + 1 if why == "rows" else 1, device).isfinite().all()
    assert plans(model) == {type(None) if why == "rows" else NoPlan}


TAPED = pytest.mark.skipif(torch.cuda.is_available(), reason="tapes are of interpreted kernels")


@TAPED
def test_what_is_joined_is_recorded(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a step is a number that Python had when it was recorded, and what changes is recorded anew."""
    made = tape(monkeypatch)
    model = load(artifacts.make("Qwen2ForCausalLM", ("zeroquant",), *RECIPES["minimum"]))
    with kernels.using("triton"):
        found = steps(model, 1, torch.device("cpu"), 4)
        assert plans(model) == {StepPlan} and [one.plays for one in made] == [3]
        with one_by_one():
            wanted = steps(model, 1, torch.device("cpu"), 4)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.equal(found[2], found[3])
        model.model.layers[0].self_attn.q_proj.bias.add_(1)
        changed = steps(model, 1, torch.device("cpu"), 4)
        with one_by_one():
            wanted = steps(model, 1, torch.device("cpu"), 4)
    torch.testing.assert_close(changed, wanted, rtol=1e-4, atol=1e-4)
    assert (changed - found).abs().max() > 0.01


@TAPED
def test_a_block_takes_few_kernels(artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three before its attention, two of that, and six behind; five are of transformers' cache, in version 5.23."""
    made, folder = tape(monkeypatch), artifacts.make("LlamaForCausalLM", ("zeroquant",), *RECIPES["minimum"])

    def kernels_of_a_block() -> int:
        made.clear()
        for count in (1, 2):
            model = load(folder)
            del model.model.layers[count:]
            model.config.num_hidden_layers = count
            with kernels.using("triton"):
                steps(model, 1, torch.device("cpu"))
        one, two = made
        return two.kernels - one.kernels

    assert 11 < kernels_of_a_block() < 20
    monkeypatch.setattr("qtool.decoder._PLANS", {})
    assert kernels_of_a_block() > 40
