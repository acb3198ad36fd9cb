"""Whole forwards as CUDA graphs; without a GPU, as tapes of their operations and kernels."""

import copy
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from small_models import DECODERS, ENCODERS, Artifacts, batch, load, outputs
from transformers import StaticCache

from qtool import kernels
from qtool.kernels.reference import Reference
from qtool.nn.integer.module import integer_outputs
from qtool.recorded import Recorded, _Call, _torch_settings

pytest.importorskip("triton", reason="Triton is not installed: pip install triton (Linux)")
from taped_graph import Tape, tape

HERE = torch.cuda.is_available()
ATTENTION = ("methods.zeroquant.attention=int8",)
W8A8, W4A16 = ("zeroquant",), ("weights=int4:group:16:min", "activations=float")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    return tape(monkeypatch)


@pytest.fixture
def quick(made: list[Tape], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tape]]:
    """The reference in Triton's place: what is recorded are operations of torch, and nothing has to be interpreted."""

    class InItsPlace(Reference):
        name = "triton"

    known = kernels._make
    monkeypatch.setattr(kernels, "_make", lambda name: InItsPlace() if name == "triton" else known(name))
    with kernels.using("triton"):
        yield made


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return Artifacts(tmp_path_factory.mktemp("models"), "recorded")


@pytest.fixture(scope="module")
def folder(artifacts: Artifacts) -> Path:
    return artifacts.make("BertForSequenceClassification", ("ibert",))


def test_a_forward_is_recorded_whole(folder: Path, made: list[Tape]) -> None:
    model, inputs = load(folder), batch()
    wanted = outputs(load(folder), inputs)
    with kernels.using("triton"):
        for _ in range(3):
            assert torch.equal(outputs(model, inputs), wanted)
        assert len(made) == 1 and made[0].plays == 2
        other = {name: value.flip(0) for name, value in inputs.items()}
        assert torch.equal(outputs(model, other).view(5, -1), wanted.view(5, -1).flip(0))
        assert made[0].plays == 3
        model.classifier.bias.add_(1 << 20)  # and what was recorded is not what the model is any more
        assert not torch.equal(outputs(model, inputs), wanted)
        assert made[0].plays == 3


class Switched(torch.nn.Module):
    """As an adapter: something that no tensor says decides what it does."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.on = inner, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.inner(x)
        return found if self.on else -found


WAYS = ["hidden states", "attentions", "configured", "labels", "watched", "reference", "grad", "foreign"]


@pytest.mark.parametrize("what", WAYS)
def test_what_is_not_recorded(artifacts: Artifacts, quick: list[Tape], what: str) -> None:
    model, inputs = load(artifacts.make("BertForSequenceClassification", W8A8)), batch()
    asked: dict[str, Any] = {
        "hidden states": {"output_hidden_states": True},
        "attentions": {"output_attentions": True},
        "labels": {"labels": torch.zeros(5).long()},
    }
    model.config.output_hidden_states = what == "configured"
    if what == "watched":
        model.bert.encoder.layer[1].register_forward_hook(lambda *_: None)
    if what == "foreign":
        model.classifier = Switched(model.classifier)
    with torch.set_grad_enabled(what == "grad"), kernels.using("reference" if what == "reference" else "triton"):
        for _ in range(2):
            model(**inputs, **asked.get(what, {}))
    assert not quick


def test_integers_are_not_recorded(folder: Path, made: list[Tape]) -> None:
    """A recording would return what its first caller wanted."""
    model, inputs = load(folder), batch()
    with torch.no_grad(), kernels.using("triton"), integer_outputs():
        for _ in range(2):
            assert model(**inputs).logits.dtype == torch.int32
    assert not made


def test_integers_that_gradients_pass_behind_are_not_recorded(folder: Path, made: list[Tape]) -> None:
    """A float head or pooler may learn from them: what was recorded without gradients would never let it."""
    model, inputs = load(folder), batch()
    with torch.enable_grad(), kernels.using("triton"):
        for _ in range(2):
            model(**inputs)
    assert not made


def test_a_cache_that_is_offloaded_does_not_lie_still(artifacts: Artifacts, quick: list[Tape]) -> None:
    model = load(artifacts.make("LlamaForCausalLM", W8A8))
    cache = steps(model, 3)[1]
    assert [one.plays for one in quick] == [2]
    cache.offloading = True
    given = {"input_ids": torch.tensor([[7], [8]]), "past_key_values": cache}
    assert not _Call.of(given)._is_step(model.config)
    cache.offloading = False
    assert _Call.of(given)._is_step(model.config)


def test_what_a_module_made_anew_ends_recordings(folder: Path, made: list[Tape]) -> None:
    """A recording reads what modules made of their weights: memory that is free once they have let go of it."""
    model, inputs = load(folder), batch()
    wanted = outputs(load(folder), inputs)
    with kernels.using("triton"):
        assert torch.equal(outputs(model, inputs), wanted)
        for part in (model.bert, model.bert.embeddings, model.classifier):
            assert torch.equal(outputs(model, inputs), wanted)
            plays = [one.plays for one in made]
            assert plays[-1] == 1
            part.float()  # changes no tensor, but what was made of them is gone
            assert torch.equal(outputs(model, inputs), wanted)
            assert [one.plays for one in made] == plays


@pytest.mark.skipif(not HERE, reason="no GPU: tapes take their place above")
@pytest.mark.parametrize("part", ["whole", "base"])
def test_a_real_graph(folder: Path, part: str) -> None:
    model, exact = (load(folder) if part == "whole" else load(folder).bert for _ in range(2))
    model.to("cuda")
    inputs = {name: value.to("cuda") for name, value in batch().items()}
    wanted = outputs(exact, batch())
    for _ in range(4):
        assert torch.equal(outputs(model, inputs).cpu(), wanted)


@pytest.mark.parametrize(
    "methods, sets",
    [(W8A8, ()), (W8A8, ATTENTION), (W8A8, W4A16), (("logattn",), ()), ((*W8A8, "logattn"), ATTENTION)],
)
def test_an_encoder_that_computes_with_floats(
    artifacts: Artifacts, quick: list[Tape], methods: tuple[str, ...], sets: tuple[str, ...]
) -> None:
    """What attention is told of a mask must not depend on whether the mask can be looked at: texts are padded."""
    model, inputs = load(artifacts.make("RobertaForQuestionAnswering", methods, *sets)), batch()
    assert isinstance(model, Recorded)
    other = {**inputs, "input_ids": inputs["input_ids"].clamp(max=30)}
    wanted, wanted_other = outputs(copy.deepcopy(model), inputs), outputs(copy.deepcopy(model), other)
    for plays in (0, 1, 2):
        assert torch.equal(outputs(model, inputs), wanted)
        assert sum(one.plays for one in quick) == plays
    assert torch.equal(outputs(model, other), wanted_other) and not torch.equal(wanted, wanted_other)
    assert quick[0].plays == 3
    with torch.enable_grad():
        model(**inputs)
    assert len(quick) == 1 and quick[0].plays == 3


@pytest.mark.parametrize("architecture", ENCODERS)
def test_every_family_of_encoders(artifacts: Artifacts, quick: list[Tape], architecture: str) -> None:
    model, inputs = load(artifacts.make(architecture, W8A8)), batch()
    wanted = outputs(model, inputs)
    assert torch.equal(outputs(model, inputs), wanted)
    assert [one.plays for one in quick] == [1]


def test_kernels_do_not_depend_on_whether_padding_can_be_seen(
    artifacts: Artifacts, quick: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others than those of the first call would have to be compiled amid the recording: here nothing is padded."""
    masks, attend = [], Reference.int8_attention

    def seen(*args: Any, **options: Any) -> Any:
        masks.append(None if args[4] is None else (args[4].dtype, args[4].shape, args[4].stride()))
        return attend(*args, **options)

    monkeypatch.setattr(Reference, "int8_attention", staticmethod(seen))
    model = load(artifacts.make("RobertaForQuestionAnswering", W8A8, *ATTENTION))
    inputs = {"input_ids": torch.full((2, 3), 7), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    wanted = outputs(model, inputs)
    first = masks.copy()
    masks.clear()
    assert torch.equal(outputs(model, inputs), wanted)
    assert [one.plays for one in quick] == [1]
    assert len(first) == 2 and masks[:2] == first  # two blocks; what is played calls it again


def test_what_a_module_returns_may_change_though_no_tensor_does(artifacts: Artifacts, quick: list[Tape]) -> None:
    model, inputs = load(artifacts.make("BertForSequenceClassification", W8A8)), batch()
    before = outputs(model, inputs)
    assert torch.equal(outputs(model, inputs), before)
    changed = copy.deepcopy(model)
    for one in (model, changed):
        one.bert.embeddings.word_embeddings.half()
    found = outputs(model, inputs)
    assert torch.equal(found, outputs(changed, inputs)) and not torch.equal(found, before)
    assert [one.plays for one in quick] == [1]


def test_what_is_random_stays_random(artifacts: Artifacts, quick: list[Tape]) -> None:
    """Dropout alone is switched on, to see what the model is unsure of."""
    model, inputs = load(artifacts.make("BertForSequenceClassification", W8A8)), batch()
    sure = outputs(model, inputs)
    assert torch.equal(outputs(model, inputs), sure)
    assert [one.plays for one in quick] == [1]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.train()
    assert not torch.equal(outputs(model, inputs), sure)


def test_calls_after_one_that_looked_inside_are_recorded(artifacts: Artifacts, quick: list[Tape]) -> None:
    """transformers leaves its hooks there; they see nothing of calls that do not ask."""
    model, inputs = load(artifacts.make("BertForSequenceClassification", W8A8)), batch()
    wanted = outputs(model, inputs)
    with torch.no_grad():
        seen = model(**inputs, output_hidden_states=True).hidden_states
    assert len(seen) == 3 and any(module._forward_hooks for module in model.modules())
    for _ in range(2):
        assert torch.equal(outputs(model, inputs), wanted)
    assert [one.plays for one in quick] == [2]
    with torch.no_grad():
        again = model(**inputs, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(seen, again, strict=True))
    assert [one.plays for one in quick] == [2]


MATMUL = {"fp32_precision": "ieee"}
MATMUL |= {f"allow_{kind}_reduced_precision_reduction": True for kind in ("fp16", "bf16")}


@pytest.mark.parametrize("setting", ["fp32_precision", "flash", "attention"])
def test_what_decides_on_kernels_has_recordings_of_its_own(
    artifacts: Artifacts, quick: list[Tape], setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = load(artifacts.make("BertForSequenceClassification", W8A8)), batch()
    for _ in range(2):
        outputs(model, inputs)
    if setting == "fp32_precision":
        monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(**MATMUL | {setting: "tf32"}))
    elif setting == "flash":
        monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    else:
        name, known = model.config._attn_implementation, transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
        before = known[name]
        monkeypatch.setitem(known._local_mapping, name, lambda *args, **kwargs: before(*args, **kwargs))
    outputs(model, inputs)
    assert [one.plays for one in quick] == [1]
    outputs(model, inputs)
    assert [one.plays for one in quick] == [1, 1]


def test_what_decides_on_kernels_is_known_of_every_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch before 2.9 knows no precision of matrix products but its own."""
    known = _torch_settings()
    assert known[0] == torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert _torch_settings() != known
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert _torch_settings()[1:] == known[1:]
    monkeypatch.setattr(torch.backends.cuda, "matmul", types.SimpleNamespace(**MATMUL))
    monkeypatch.delattr(torch.backends.cuda.matmul, "fp32_precision")
    assert _torch_settings()[0] == torch.get_float32_matmul_precision()


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "linear"])
def test_angles_that_move_are_not_recorded(artifacts: Artifacts, quick: list[Tape], kind: str) -> None:
    """transformers looks at how long the text is, which waits for the device, or writes other angles each time."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8}
    model = load(artifacts.make("LlamaForCausalLM", W8A8, rope_parameters=rope))
    steps(model, 3)
    assert [one.plays for one in quick] == ([2] if kind == "linear" else [])


class Mine(torch.nn.Module):
    """What somebody adds to a model's class."""

    def twice(self) -> int:
        return 2


@pytest.mark.parametrize("methods", [W8A8, ("ibert",)])
def test_subclasses_of_recorded_models_are_copied(artifacts: Artifacts, methods: tuple[str, ...]) -> None:
    model, inputs = load(artifacts.make("BertForSequenceClassification", methods)), batch()
    with kernels.using("reference"):
        wanted = outputs(model, inputs)
    model.__class__ = type("Theirs", (Mine, type(model)), {})
    for one in (copy.copy(model), copy.deepcopy(model)):
        assert type(one) is type(model) and one.twice() == 2
        with kernels.using("reference"):
            assert torch.equal(outputs(one, inputs), wanted)


@torch.no_grad()
def steps(model: Any, count: int) -> tuple[list[torch.Tensor], Any]:
    """Scores of tokens one behind the other, after a prompt of 4."""
    ids = torch.randint(5, 65, (2, 4 + count), generator=torch.Generator().manual_seed(1))
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
    found = []
    for place in range(4, 4 + count):
        output = model(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        assert output.past_key_values is cache
        found.append(output.logits)
    return found, cache


@pytest.mark.parametrize("sets", [(), W4A16, ATTENTION])
@pytest.mark.parametrize("architecture", [name for name in DECODERS if name != "OPTForCausalLM"])
def test_a_step_behind_a_cache(
    artifacts: Artifacts, quick: list[Tape], architecture: str, sets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions, lengths and masks are read from the cache each time, as no number of Python's could be."""
    whole = {"sliding_window": None} if architecture == "MistralForCausalLM" else {}
    model = load(artifacts.make(architecture, W8A8, *sets, **whole))
    scores, cache = steps(model, 6)
    assert [one.plays for one in quick] == [5]
    monkeypatch.setattr("qtool.recorded._is_on_gpu", lambda value: False)
    wanted, other = steps(model, 6)
    assert [one.plays for one in quick] == [5]
    assert all(torch.equal(one, two) for one, two in zip(scores, wanted, strict=True))
    assert len({tuple(row.flatten().tolist()) for row in scores}) == 6  # or a step that stands still would pass
    for layer, theirs in zip(cache.layers, other.layers, strict=True):
        assert int(layer.cumulative_length) == 10
        assert torch.equal(layer.keys, theirs.keys) and torch.equal(layer.values, theirs.values)


def test_generation_with_a_static_cache(artifacts: Artifacts, quick: list[Tape]) -> None:
    model = load(artifacts.make("LlamaForCausalLM", W8A8, *W4A16))
    prompt = torch.randint(5, 65, (1, 4), generator=torch.Generator().manual_seed(2))
    given: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    given |= {"max_new_tokens": 8, "min_new_tokens": 8}
    wanted = model.generate(prompt, **given)
    assert not quick
    assert model.generate(prompt, cache_implementation="static", **given).tolist() == wanted.tolist()
    assert sum(one.plays for one in quick) >= 5


def test_what_of_a_decoder_is_not_recorded(artifacts: Artifacts, quick: list[Tape]) -> None:
    model = load(artifacts.make("LlamaForCausalLM", W8A8, *W4A16))
    ids = torch.randint(5, 65, (1, 5), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for _ in range(2):
            model(input_ids=ids)
            model(input_ids=ids[:, :1], use_cache=False)
            model(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=8), use_cache=True)
    assert not quick


@pytest.mark.parametrize("architecture, why", [("OPTForCausalLM", "waits"), ("MistralForCausalLM", "window")])
def test_steps_that_cannot_be_recorded(
    artifacts: Artifacts, quick: list[Tape], architecture: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPT's counts positions on the host; a window's cache counts there where it begins."""
    model = load(artifacts.make(architecture, W8A8))
    steps(model, 3)
    assert not quick
    if why == "waits":  # which is why
        monkeypatch.setattr("qtool.recorded._STEPS", {"opt"})
        with pytest.warns(UserWarning, match="runs kernel by kernel"):
            steps(model, 3)
        assert not quick
