"""Whole encoders in one native call against their modules one by one and against the reference backend."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from qtool import kernels
from qtool.errors import InputError
from qtool.fused import FusedEncoder
from qtool.kernels import integer, native
from qtool.nn.plan import one_by_one

MODELS = ["BertForSequenceClassification", "RobertaForMaskedLM", "DistilBertForSequenceClassification"]
MODELS += ["ElectraForTokenClassification"]
MANY = 300  # tokens, of which two threads take blocks of their own (csrc/schedule.h)
Load = Callable[..., Any]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("isa", native.ISAS)
def test_integers_are_those_of_the_modules_and_of_the_reference(
    load: Load, architecture: str, isa: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if isa not in native.isas():
        pytest.skip(f"this CPU has no {isa}")
    monkeypatch.setattr(native, "isa", lambda: isa)
    model = load(architecture)
    for rows, tokens, kind in ((1, 1, "none"), (3, 9, "ragged"), (4, 12, "one empty"), (MANY // 10, 13, "ragged")):
        inputs = load.batch(model, rows, tokens, kind)
        calls.clear()
        joined = load.integers(model, inputs)
        assert "qtool_integer_encoder" in calls and "qtool_integer_attention" not in calls
        calls.clear()
        with one_by_one():
            assert same(joined, load.integers(model, inputs))
        assert "qtool_integer_encoder" not in calls and "qtool_integer_attention" in calls
        with kernels.using("reference"):
            assert same(joined, load.integers(model, inputs))
        assert not joined[1][inputs["attention_mask"] == 0].any()


@pytest.mark.parametrize(
    "entries",
    [
        ("methods.ibert.gelu=polynomial",),
        ("methods.ibert.probability_bits=16", "methods.ibert.scores_grid=6", "methods.ibert.shifted_gelu=false"),
        ("activations=int8:tensor:sym",),
        ("methods.ibert.smoothing=null", "methods.ibert.centering=false"),
    ],
)
def test_recipes(load: Load, entries: tuple[str, ...], calls: list[str]) -> None:
    model = load(MODELS[0], "ibert", *entries)
    inputs = load.batch(model, 5, 11)
    joined = load.integers(model, inputs)
    assert "qtool_integer_encoder" in calls
    with kernels.using("reference"):
        assert same(joined, load.integers(model, inputs))


def test_threads_and_company_do_not_matter(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "_ALONE", -1)  # small models are shared out too
    model, before = load(MODELS[0]), torch.get_num_threads()
    inputs = load.batch(model, MANY // 10, 13)
    try:
        torch.set_num_threads(1)
        alone = load.integers(model, inputs)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert same(alone, load.integers(model, inputs))
    finally:
        torch.set_num_threads(before)
    row = {name: value[3:4] for name, value in inputs.items()}
    assert torch.equal(load.integers(model, row)[0], alone[0][3:4])


def test_a_table_for_fewer_bits_than_come_is_refused(load: Load) -> None:
    model = load(MODELS[0])
    block = next(module for module in model.modules() if type(module).__name__ == "IntBlock")
    block.part("up").out_bits = block.part("act").in_bits + 1
    with pytest.raises(InputError, match="damaged"):
        model(**load.batch(model, 2, 5))


def test_ids_that_are_no_rows(load: Load) -> None:
    model = load(MODELS[0])
    for wrong in (-1, model.config.vocab_size):
        with pytest.raises(IndexError, match="not one of the rows"):
            model(input_ids=torch.tensor([[5, wrong]]))


def test_hooks_see_what_happens_inside(load: Load, calls: list[str]) -> None:
    model = load(MODELS[0])
    inputs, seen = load.batch(model, 3, 9), []
    joined = load.integers(model, inputs)
    hook = model.bert.encoder.layer[1].register_forward_hook(lambda module, given, output: seen.append(output))
    calls.clear()
    assert same(joined, load.integers(model, inputs))
    assert len(seen) == 2 and "qtool_integer_encoder" not in calls
    hook.remove()
    assert same(joined, load.integers(model, inputs))
    assert "qtool_integer_encoder" in calls


def test_changed_buffers_are_noticed(load: Load) -> None:
    model = load(MODELS[0])
    inputs = load.batch(model, 3, 9)
    before = load.integers(model, inputs)
    dense = model.bert.encoder.layer[0].output.dense
    dense.bias += 1 << 24
    changed = load.integers(model, inputs)
    assert not same(before, changed)
    dense.bias = dense.bias - (1 << 24)
    assert same(before, load.integers(model, inputs))


@pytest.mark.parametrize("method", ["ibert", "zeroquant"])
def test_copies_and_pickles(load: Load, method: str) -> None:
    model = load(MODELS[0], method)
    inputs = load.batch(model, 3, 9)
    wanted = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = other(**inputs).logits
        assert torch.equal(found, wanted)
        assert type(other).__name__ == MODELS[0]


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_float_blocks_together(load: Load, architecture: str, attention: str, calls: list[str]) -> None:
    """Floats round in another order, and what is close to a tie gets another code: 0.1 is `golden.GROSS`."""
    model = load(architecture, "zeroquant")
    model.set_attn_implementation(attention)
    for kind in ("none", "ragged", "one empty"):
        inputs = load.batch(model, 4, 12, kind)
        calls.clear()
        joined = model.base_model(**inputs).last_hidden_state
        assert "qtool_float_encoder" in calls and "qtool_float_linear" not in calls
        with one_by_one():
            wanted = model.base_model(**inputs).last_hidden_state
        real = inputs["attention_mask"].bool()
        assert (joined - wanted)[real].norm() < 0.1 * wanted[real].norm()
        assert not joined[~real].any()


def test_a_float_row_does_not_depend_on_its_company(load: Load) -> None:
    model = load(MODELS[0], "zeroquant")
    inputs = load.batch(model, MANY // 10, 13)
    whole = model.base_model.encoder(model.base_model.embeddings(inputs["input_ids"])).last_hidden_state
    alone = model.base_model.encoder(model.base_model.embeddings(inputs["input_ids"][7:8])).last_hidden_state
    assert torch.equal(whole[7:8], alone)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions", "training", "hook", "mask by query"])
def test_float_blocks_one_by_one_where_somebody_looks(load: Load, asked: str, calls: list[str]) -> None:
    model = load(MODELS[0], "zeroquant")
    inputs: dict[str, Any] = load.batch(model, 3, 9)
    if asked == "output_attentions":
        model.set_attn_implementation("eager")
    if asked == "mask by query":
        inputs["attention_mask"] = torch.ones(9, 9, dtype=torch.bool).tril().expand(3, 1, 9, 9)
    model.train(asked == "training")
    if asked == "hook":
        model.bert.encoder.layer[0].register_forward_hook(lambda module, given, output: None)
    options = {asked: True} if asked.startswith("output") else {}
    output = model(**inputs, **options)
    assert "qtool_float_encoder" not in calls and "qtool_float_linear" in calls
    if options:
        assert len(output[asked.removeprefix("output_")]) == model.config.num_hidden_layers + ("hidden" in asked)
    if asked == "output_hidden_states":  # what transformers leaves on the blocks then sees nothing of other calls
        assert model.bert.encoder.layer[0]._forward_hooks
        model(**inputs)
        assert "qtool_float_encoder" in calls


def test_the_holder_keeps_its_class_name(load: Load) -> None:
    model = load(MODELS[0], "zeroquant")
    assert isinstance(model.bert.encoder, FusedEncoder)
    assert type(model.bert.encoder).__name__ == "BertEncoder"
    assert issubclass(type(model.bert.encoder), transformers.models.bert.modeling_bert.BertEncoder)
