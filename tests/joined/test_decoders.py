"""Decoder blocks in two native calls: against float64, against their modules, and after what people do to models."""

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks64 import angles, back64, close, front64, norm64, product64
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from qtool import kernels
from qtool.decoder import JoinedLayer
from qtool.errors import InputError
from qtool.nn import QLinear
from qtool.nn.decoder import DecoderPlan
from qtool.nn.plan import one_by_one
from qtool.numerics import QuantSpec

SHAPE = {
    "hidden_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 88,
    "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
    "max_position_embeddings": 400,
}  # fmt: skip
LLAMA = "LlamaForCausalLM"
FAMILIES: dict[str, dict[str, Any]] = {
    LLAMA: {"attention_bias": True, "mlp_bias": True},
    "MistralForCausalLM": {"sliding_window": 6},
    "Qwen2ForCausalLM": {"head_dim": 10, "num_hidden_layers": 2},  # it has no other; q, k and v have biases
}
RECIPES: dict[str, tuple[str, ...]] = {
    "w8a8": (),
    "w4a8": ("weights=int4:group:8:sym",),
    "zero points": ("weights=int8:channel:asym",),
    "minimum": ("weights=int4:group:16:min",),
    "static": ("weights=int8:channel:sym", "activations=int8:tensor:sym"),
    "float": ("weights=int4:group:16:min", "activations=float"),
    "float int8": ("weights=int8:channel:asym", "activations=float"),
    "mixed": (
        "weights=int8:group:12:sym",
        'rules={"part:ffn.gate": {"activations": "float"}, "part:attention.key": {"activations": "float"}, '
        '"part:ffn.down": {"weights": "int4:block:4x8:min"}, "part:attention.value": {"weights": "int4:group:8:asym"}}',
    ),
}
FEW, OWN, ALONE = 2, 4, 128  # rows: kFew in code_linear.h, kOwnRows in float_decoder.h, kAloneRows in schedule.h
SHAPES = [(1, 1), (2, 1), (5, 1), (1, 23), (3, 101)]
Load = Callable[..., Any]
Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def decoder(load: Any) -> Load:
    """A fresh copy of a tiny quantized decoder, by its class, a recipe or entries of one, and options of the config."""

    def make(architecture: str = LLAMA, *entries: str, **options: Any) -> Any:
        recipe = RECIPES[entries[0]] if entries and entries[0] in RECIPES else entries
        config = {"words": None, **SHAPE, **FAMILIES.get(architecture, {}), **options}
        return load(architecture, "zeroquant", *recipe, **config)

    return make


def batch(rows: int, tokens: int, padding: str = "none") -> Batch:
    draw = torch.Generator().manual_seed(rows * tokens)
    ids = torch.randint(5, 65, (rows, tokens), generator=draw)
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=draw)
    at = torch.arange(tokens)
    mask = {"none": at < tokens, "right": at < lengths, "left": at >= tokens - lengths}[padding].long().expand_as(ids)
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: Any, inputs: Batch, **options: Any) -> torch.Tensor:
    """Of all real tokens `[tokens, vocabulary]`."""
    found: torch.Tensor = model(**inputs, use_cache=False, **options).logits
    return found[inputs["attention_mask"].bool()]


def joined(calls: list[str], model: Any) -> bool:
    """Whether every layer ran in two calls; that some did and others did not is an error."""
    count = len(model.model.layers)
    fronts, backs = calls.count("qtool_decoder_front"), calls.count("qtool_decoder_back")
    assert fronts == backs and fronts % count == 0
    assert not fronts or "qtool_float_linear" not in calls
    return fronts > 0


def planned(model: Any, layer: int = 0) -> tuple[Any, DecoderPlan]:
    """A layer with its plan, after a forward."""
    logits(model, batch(1, 3))
    plan = model.model.layers[layer].__dict__["_plan"]
    assert isinstance(plan, DecoderPlan)
    return model.model.layers[layer], plan


# Against float64


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("architecture", list(FAMILIES))
def test_halves_of_a_block_are_those_of_float64(decoder: Load, architecture: str, recipe: str, isa: str) -> None:
    layer, plan = planned(decoder(architecture, recipe), 1)
    hidden, size = layer.self_attn.q_proj.in_features, layer.self_attn.head_dim
    draw = torch.Generator().manual_seed(0)
    for rows, tokens in SHAPES:
        sizes = torch.logspace(-2, 2, rows * tokens).view(rows, tokens, 1)
        x = torch.randn((rows, tokens, hidden), generator=draw) * sizes
        context = torch.randn((rows, tokens, plan.heads.queries * size), generator=draw)
        turns = angles(rows, tokens, size, each=rows == 3)
        kept = x.clone()
        for found, wanted in zip(plan.front(x, *turns), front64(layer, x.double(), *turns), strict=True):
            close(found, wanted)
        close(plan.back(context, x), back64(layer, context.double(), x.double()))
        assert torch.equal(x, kept), "what went into a block is somebody else's"


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_at_all_sizes(decoder: Load, activation: str, isa: str) -> None:
    """Gates from 1e-3 to 1e3 of either sign: none overflows, and what is far below zero lets nothing through."""
    layer, plan = planned(decoder(LLAMA, "float int8", hidden_act=activation, attention_bias=False, mlp_bias=False))
    x, context = torch.randn(1, 60, 40), torch.zeros(1, 60, 48)
    layer.post_attention_layernorm.weight.copy_(torch.logspace(-3, 3, 40))
    gate = product64(layer.mlp.gate_proj, norm64(layer.post_attention_layernorm, x.double()))
    assert gate.max() > 300 and gate.min() < -300
    found = plan.back(context, x)
    assert found.isfinite().all()
    close(found, back64(layer, context.double(), x.double()), 2e-6)


def test_a_gate_that_is_no_number_shows(decoder: Load, isa: str) -> None:
    layer, plan = planned(decoder())
    layer.mlp.gate_proj.bias[3] = float("nan")
    assert plan.back(torch.zeros(1, 2, 48), torch.ones(1, 2, 40)).isnan().all()


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_rows_depend_on_nothing_else(decoder: Load, recipe: str, isa: str) -> None:
    """Not on threads, and not on the rows beside them but for the two ways in which floats multiply codes."""
    layer, plan = planned(decoder(LLAMA, recipe))
    by_count = any(linear.activations == "float" for linear in layer.modules() if isinstance(linear, QLinear))
    draw = torch.Generator().manual_seed(1)
    for rows, tokens in SHAPES:
        x = torch.randn((rows, tokens, 40), generator=draw)
        context = torch.randn((rows, tokens, 48), generator=draw)
        turns = angles(rows, tokens, 12, each=True)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((*plan.front(x, *turns), plan.back(context, x)))
            assert all(torch.equal(a, b) for a, b in zip(found[-1], found[0], strict=True)), threads
        if by_count:
            continue
        for row in range(rows):
            one = [tensor[row : row + 1] for tensor in (x, *turns)]
            alone = (*plan.front(*one), plan.back(context[row : row + 1], one[0]))
            assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, found[0], strict=True))


def test_the_shapes_are_on_all_sides() -> None:
    counts = [rows * tokens for rows, tokens in SHAPES]
    assert {1, FEW} <= set(counts) and OWN + 1 in counts
    assert any(OWN < count < ALONE for count in counts) and max(counts) > 2 * ALONE


# Against the modules


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("architecture", list(FAMILIES))
def test_joined_layers_are_close_to_the_modules(
    decoder: Load, architecture: str, recipe: str, padding: str, calls: list[str]
) -> None:
    """With float activations to the rounding of floats. Codes that fall to the other side of a tie move a row by about
    1e-2, and in a decoder all rows that attend to it."""
    model, inputs = decoder(architecture, recipe), batch(4, 9, padding)
    calls.clear()  # those of quantizing it, if it was the first
    found = logits(model, inputs)
    assert joined(calls, model)
    calls.clear()
    with one_by_one():
        wanted = logits(model, inputs)
    assert not joined(calls, model)
    off = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    if recipe.startswith("float"):
        assert (off < 2e-5).all()
    else:
        assert off.median() < 1e-4 and (off < 0.1).all()


@pytest.mark.parametrize("recipe", ["w8a8", "zero points", "float"])
@pytest.mark.parametrize("architecture", list(FAMILIES))
def test_generation_with_and_without_a_cache(decoder: Load, architecture: str, recipe: str, calls: list[str]) -> None:
    model = decoder(architecture, recipe)
    calls.clear()  # those of quantizing it, if it was the first
    prompts = batch(3, 7, "left")
    plain = {"max_new_tokens": 9, "min_new_tokens": 9, "pad_token_id": 0}
    for options in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        cached, uncached = (model.generate(**prompts, **plain, **options, use_cache=cache) for cache in (True, False))
        assert torch.equal(cached, uncached)
    assert joined(calls, model)
    if recipe == "float":
        with one_by_one():
            assert torch.equal(cached, model.generate(**prompts, **plain, num_beams=3, do_sample=False))


@pytest.mark.parametrize("recipe", ["w8a8", "static"])
def test_steps_with_a_cache_give_the_logits_of_the_whole(decoder: Load, recipe: str, calls: list[str]) -> None:
    model, past, steps = decoder(LLAMA, recipe), None, []
    calls.clear()  # those of quantizing it, if it was the first
    ids = batch(2, 12)["input_ids"]
    for token in ids.unbind(1):
        step = model(input_ids=token[:, None], past_key_values=past, use_cache=True)
        past = step.past_key_values
        steps.append(step.logits[:, 0])
    assert joined(calls, model)
    torch.testing.assert_close(torch.stack(steps, 1), model(input_ids=ids, use_cache=False).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", list(FAMILIES))
@pytest.mark.parametrize("cached", [True, False])
def test_attention_is_given_what_the_module_gives_it(
    decoder: Load, architecture: str, cached: bool, calls: list[str]
) -> None:
    model, seen = decoder(architecture, "float"), []
    calls.clear()  # those of quantizing it, if it was the first

    def look(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        seen.append((module.layer_idx, [query, key, value, mask], options))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("look", look)
    AttentionMaskInterface.register("look", sdpa_mask)
    model.set_attn_implementation("look")
    for context in (contextlib.nullcontext, one_by_one):
        with context():
            past = model(**batch(2, 5, "left"), use_cache=cached).past_key_values
            if cached:
                model(input_ids=torch.tensor([[7], [8]]), past_key_values=past, attention_mask=torch.ones(2, 6))
    assert joined(calls, model)
    ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert len(ours) == len(theirs) > 0
    for (layer, states, options), (other, wanted, given) in zip(ours, theirs, strict=True):
        assert layer == other and set(options) == set(given)
        for name, value in given.items():
            assert (torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b)(options[name], value), name
        for state, want in zip(states[:3], wanted[:3], strict=True):
            torch.testing.assert_close(state, want, rtol=1e-4, atol=1e-4)
        assert (states[3] is None) == (wanted[3] is None)
        assert states[3] is None or torch.equal(states[3], wanted[3])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_any_attention_of_the_registry(decoder: Load, implementation: str, calls: list[str]) -> None:
    model = decoder(LLAMA, "float")
    calls.clear()  # those of quantizing it, if it was the first
    model.set_attn_implementation(implementation)
    found = logits(model, batch(3, 8, "left"))
    assert joined(calls, model)
    with one_by_one():
        torch.testing.assert_close(found, logits(model, batch(3, 8, "left")), rtol=1e-4, atol=1e-4)


def test_int8_attention(decoder: Load, calls: list[str]) -> None:
    """Its hooks only check; they do so for joined layers too."""
    model = decoder(LLAMA, "methods.zeroquant.attention=int8")
    calls.clear()  # those of quantizing it, if it was the first
    inputs = batch(3, 8, "left")
    calls.clear()
    found = logits(model, inputs)
    assert joined(calls, model) and calls.count("qtool_int8_attention") == 3
    assert all(layer.self_attn.int8_products.calls == 1 for layer in model.model.layers)
    with one_by_one():
        wanted = logits(model, inputs)
    off = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert off.median() < 1e-4 and (off < 0.1).all()
    model.set_attn_implementation("sdpa")
    with pytest.raises(InputError, match="this model's is quantized"):
        logits(model, inputs)


# Who looks, and what is no such block


@pytest.mark.parametrize("way", ["hook", "pre-hook", "forward", "class", "global hook"])
def test_everybody_who_watches_a_module_sees_it(
    decoder: Load, way: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs, seen = decoder(), batch(2, 5), []
    calls.clear()  # those of quantizing it, if it was the first
    logits(model, inputs)
    dense = model.model.layers[1].mlp.up_proj
    original = dense.forward
    undo = contextlib.ExitStack()
    if way == "hook":
        dense.register_forward_hook(lambda module, given, output: seen.append(module))
    elif way == "pre-hook":
        dense.register_forward_pre_hook(lambda module, given: seen.append(module))
    elif way == "forward":
        dense.forward = lambda *given: (seen.append(dense), original(*given))[1]
    elif way == "class":
        plain = QLinear.forward
        monkeypatch.setattr(QLinear, "forward", lambda self, *given: (seen.append(self), plain(self, *given))[1])
    else:
        hook = nn.modules.module.register_module_forward_hook(lambda module, given, output: seen.append(module))
        undo.callback(hook.remove)
    with undo:
        found = logits(model, inputs)
    assert any(module is dense for module in seen)
    with one_by_one():
        wanted = logits(model, inputs)
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_hooks_of_a_layer_itself_see_what_goes_in_and_out(decoder: Load, calls: list[str]) -> None:
    model, seen = decoder(), []
    calls.clear()  # those of quantizing it, if it was the first
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, given, output: seen.append((given[0].clone(), output.clone())))
    logits(model, batch(2, 5))
    assert joined(calls, model) and len(seen) == 3
    assert torch.equal(seen[0][1], seen[1][0]) and torch.equal(seen[1][1], seen[2][0])


def test_hidden_states_and_attentions(decoder: Load) -> None:
    model, inputs = decoder(LLAMA, "float"), batch(2, 5)
    model.set_attn_implementation("eager")
    with one_by_one():
        wanted = model(**inputs, output_hidden_states=True, output_attentions=True)
    found = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert len(found.hidden_states) == 4 and len(found.attentions) == 3
    for name in ("hidden_states", "attentions"):
        for one, other in zip(found[name], wanted[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_blocks_are_joined_again_after_hidden_states(decoder: Load, calls: list[str]) -> None:
    """What transformers leaves on modules then sees nothing of calls that do not ask."""
    model, inputs = decoder(), batch(2, 5)
    assert len(model(**inputs, output_hidden_states=True).hidden_states) == 4
    calls.clear()
    logits(model, inputs)
    assert joined(calls, model)


@pytest.mark.parametrize("way", ["training", "a module in training", "reference", "half"])
def test_modules_run_where_joining_would_lose_something(decoder: Load, way: str, calls: list[str]) -> None:
    model, inputs = decoder(), batch(2, 5)
    calls.clear()  # those of quantizing it, if it was the first
    context: Any = contextlib.nullcontext()
    if way == "training":
        model.train()
    elif way == "a module in training":
        model.model.layers[0].self_attn.train()
        model.model.layers = model.model.layers[:1]
    elif way == "reference":
        context = kernels.using("reference")
    else:
        model.bfloat16()
    with context:
        assert logits(model, inputs).isfinite().all()
    assert not joined(calls, model)


def test_gradients_are_those_of_the_modules(decoder: Load, calls: list[str]) -> None:
    """Products on codes pass none on; what goes around them, from the hidden states on, has one."""
    model = decoder(LLAMA, "float")
    calls.clear()  # those of quantizing it, if it was the first
    model.requires_grad_(False)

    def gradient(wanted: bool) -> torch.Tensor | None:
        x = model.model.embed_tokens(batch(2, 5)["input_ids"]).requires_grad_(wanted)
        with torch.enable_grad():
            output = model.model(inputs_embeds=x).last_hidden_state
            if output.requires_grad:
                output.square().sum().backward()
        return x.grad

    with one_by_one():
        expected, nothing = gradient(True), gradient(False)
    calls.clear()
    found = gradient(True)
    assert not joined(calls, model) and found is not None and found.any() and torch.equal(found, expected)
    assert gradient(False) is nothing is None and joined(calls, model)


@pytest.mark.parametrize(
    ("architecture", "entries", "options"),
    [
        (LLAMA, (), {"hidden_act": "relu"}),
        (LLAMA, ('rules={"part:ffn.up": {"weights": "int8:group:2:sym"}}',), {}),  # blocks that cut through tiles
        (LLAMA, ('rules={"part:ffn.up": {"keep_float": true}}',), {}),  # a float linear
        ("GPT2LMHeadModel", (), {"head_dim": None}),
    ],
    ids=["relu", "groups of two", "float", "gpt2"],
)
def test_what_does_not_fit_runs_by_modules(
    decoder: Load, architecture: str, entries: tuple[str, ...], options: dict[str, Any], calls: list[str]
) -> None:
    model = decoder(architecture, *entries, **options)
    calls.clear()  # those of quantizing it, if it was the first
    inputs = batch(3, 5)
    found = [logits(model, inputs) for _ in range(2)]
    assert "qtool_decoder_front" not in calls
    with one_by_one():
        assert torch.equal(found[0], logits(model, inputs)) and torch.equal(*found)


def another_activation(layer: Any) -> None:
    layer.mlp.act_fn = nn.Tanh()


def another_norm(layer: Any) -> None:
    class Doubling(type(layer.input_layernorm)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer.input_layernorm.__class__ = Doubling


def a_norm_of_queries(layer: Any) -> None:
    layer.self_attn.q_norm = copy.deepcopy(layer.input_layernorm)


def another_attention(layer: Any) -> None:
    class Other(type(layer.self_attn)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            context, weights = super().forward(*args, **kwargs)
            return 2 * context, weights

    layer.self_attn.__class__ = Other


def another_tensor(layer: Any) -> None:
    layer.mlp.up_proj.register_buffer("weight_zero_point_too", torch.zeros(1, dtype=torch.int8))


def another_linear(layer: Any) -> None:
    layer.mlp.up_proj.__class__ = type("Other", (QLinear,), {})


def other_activations(layer: Any) -> None:
    layer.mlp.up_proj.activations = QuantSpec.parse("int8:tensor:sym")
    layer.mlp.up_proj.act_scale = torch.tensor([0.01])


DIFFERENT = [another_activation, another_norm, a_norm_of_queries, another_attention, another_tensor, another_linear]


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("change", DIFFERENT)
def test_a_layer_that_is_something_else_is_not_joined(decoder: Load, change: Any, early: bool, calls: Any) -> None:
    model, inputs = decoder(), batch(2, 5)
    calls.clear()  # those of quantizing it, if it was the first
    model.model.layers = model.model.layers[:1]
    if not early:
        assert logits(model, inputs).isfinite().all() and joined(calls, model)
    change(model.model.layers[0])
    calls.clear()
    found = logits(model, inputs)
    assert not joined(calls, model)
    with one_by_one():
        assert torch.equal(found, logits(model, inputs))


def test_queries_of_other_codes_than_keys(decoder: Load) -> None:
    """Static scales that differ between linears of the same rows."""
    model = decoder(LLAMA, "static")
    layer, plan = planned(model)
    for linear, scale in ((layer.self_attn.k_proj, 0.01), (layer.mlp.up_proj, 0.02), (layer.self_attn.v_proj, 0.03)):
        linear.act_scale.fill_(scale)
    for tokens in (1, 40):
        x, turns = torch.randn(1, tokens, 40), angles(1, tokens, 12, each=False)
        for found, wanted in zip(plan.front(x, *turns), front64(layer, x.double(), *turns), strict=True):
            close(found, wanted)
        context = torch.randn(1, tokens, 48)
        close(plan.back(context, x), back64(layer, context.double(), x.double()))


# Between two calls


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a layer less": lambda model: model.model.layers.__delitem__(1),
    "layers in another order": lambda model: model.model.layers.__setitem__(0, model.model.layers[1]),
    "a linear replaced": lambda model: setattr(
        model.model.layers[0].mlp, "up_proj", copy.deepcopy(model.model.layers[1].mlp.up_proj)
    ),
    "a norm changed": lambda model: model.model.layers[0].input_layernorm.weight.mul_(1.5),
    "another epsilon": lambda model: setattr(model.model.layers[0].post_attention_layernorm, "variance_epsilon", 2.0),
    "a scale changed": lambda model: model.model.layers[0].mlp.gate_proj.weight_scale.mul_(1.5),
    "codes changed": lambda model: model.model.layers[0].self_attn.o_proj.weight.neg_(),
    "scores scaled": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 1.0),
    "other activations": lambda model: other_activations(model.model.layers[0]),
    "an offset changed": lambda model: model.model.layers[0].mlp.up_proj.weight_zero_point.add_(3),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_changes_between_two_calls_are_noticed(decoder: Load, kind: str, calls: list[str]) -> None:
    recipe = "w8a8" if "offset" not in kind else "zero points"
    model, afresh, inputs = decoder(LLAMA, recipe), decoder(LLAMA, recipe), batch(3, 9)
    calls.clear()  # those of quantizing it, if it was the first
    before = logits(model, inputs)
    CHANGES[kind](model), CHANGES[kind](afresh)
    found = logits(model, inputs)
    assert torch.equal(found, logits(afresh, inputs))
    assert not torch.equal(found, before)


def test_numbers_that_moved_are_found(decoder: Load) -> None:
    """Sharing a model with another process moves its storage; the tensors stay the same objects."""
    model, inputs = decoder(), batch(3, 9)
    before = logits(model, inputs)
    where = {tensor.data_ptr() for tensor in model.state_dict().values()}
    model.share_memory()
    assert not where & {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert torch.equal(logits(model, inputs), before)


def test_copies_go_their_own_way(decoder: Load, tmp_path: Path) -> None:
    model, inputs = decoder(), batch(3, 9)
    wanted = logits(model, inputs)
    model.save_pretrained(tmp_path)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), type(model).from_pretrained(tmp_path).eval()]
    for other in others:
        layer = other.model.layers[0]
        assert isinstance(layer, JoinedLayer) and type(layer).__name__ == "LlamaDecoderLayer"
        assert torch.equal(logits(other, inputs), wanted)
        layer.input_layernorm.weight.mul_(2)
        assert not torch.equal(logits(other, inputs), wanted)
        assert torch.equal(logits(model, inputs), wanted)
    other = copy.deepcopy(model)
    model.model.layers[0].input_layernorm.weight.mul_(2)
    del model
    assert torch.equal(logits(other, inputs), wanted)


def test_a_model_that_ran_is_freed_with_its_last_name(decoder: Load) -> None:
    model = decoder()
    logits(model, batch(3, 9))
    known = weakref.ref(model.model.layers[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert known() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_token_damages_its_text_only(decoder: Load, value: float, isa: str) -> None:
    model = decoder(attention_bias=False)
    x = model.model.embed_tokens(batch(3, 7)["input_ids"])
    clean = model.model(inputs_embeds=x).last_hidden_state
    for token in range(7):
        damaged = x.clone()
        damaged[1, token, 5] = value
        found = model.model(inputs_embeds=damaged).last_hidden_state
        assert not found[1, token:].isfinite().any() and torch.equal(found[[0, 2]], clean[[0, 2]])
