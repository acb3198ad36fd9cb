"""Integer encoders in plain transformers: classes, outputs, copies, what is refused, and what no result depends on."""

import copy
import functools
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

import qtool
from qtool.artifact import damaged_tensors
from qtool.encoder import IntegerEncoder, integrate
from qtool.errors import QtoolError
from qtool.nn import IntModule
from qtool.nn.integer.module import integer_outputs

HEADS = SEQUENCE, TOKENS, ANSWERS, MASKED = tuple(
    f"For{head}" for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
)
BERT, ROBERTA_MASKED = f"Bert{SEQUENCE}", f"Roberta{MASKED}"
FAMILIES = [BERT, ROBERTA_MASKED, f"DistilBert{SEQUENCE}", f"Electra{TOKENS}"]
PAD = 0
Text = list[int]
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(shelf: Any) -> Made:
    """The artifact of a tiny model by architecture, made once; its float source is beside it."""
    found: dict[tuple[str, str], Path] = {}

    def make(architecture: str, method: str = "ibert") -> Path:
        if (architecture, method) not in found:
            name = f"encoder-{method}-{architecture}"
            labels = ("bad", "good", "so so") if "Classification" in architecture else ()
            source = shelf.make(name, architecture, labels=labels, change=shelf.noise(0.1))
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(shelf.folder)
                patch.setattr("qtool.pipeline._check_in_fresh_process", lambda *run: None)  # it takes seconds
                entries = ["calibration.source=random", "calibration.num_samples=4"]
                entries += ["methods.ibert.tuning=2"] if method == "ibert" else []
                output = shelf.folder / f"{name}-out"
                found[architecture, method] = qtool.quantize(
                    str(source), method=method, output=output, set=entries
                ).path
        return found[architecture, method]

    return make


def source_of(artifact: Path) -> Path:
    return artifact.with_name(artifact.name.removesuffix("-out"))


def load(folder: Path, **options: Any) -> Any:
    """The model of the class that its config names."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def loaded(made: Made) -> Callable[[str], Any]:
    """A model that is only read."""
    return functools.cache(lambda architecture: load(made(architecture)))


def draw_texts(seed: int, count: int, longest: int = 11) -> list[Text]:
    draw = random.Random(seed)
    return [[draw.randrange(2, 65) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def batch_of(texts: list[Text], length: int = 0, junk: int | None = None) -> dict[str, torch.Tensor]:
    """Texts padded on the right to `length` or more; `junk` seeds ids for the padding, which stand for nothing."""
    length = max(length, *map(len, texts))
    mask = torch.tensor([[int(at < len(text)) for at in range(length)] for text in texts])
    ids = torch.tensor([text + [PAD] * (length - len(text)) for text in texts])
    if junk is not None:
        other = torch.randint(65, ids.shape, generator=torch.Generator().manual_seed(junk))
        ids = torch.where(mask.bool(), ids, other)
    return {"input_ids": ids, "attention_mask": mask}


@torch.inference_mode()
def rows(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What comes first out of `model`, one tensor a text, without what stands at padding."""
    first = model(**inputs)[0]
    lengths = inputs["attention_mask"].sum(1).tolist()
    if first.dim() == 2:
        return list(first)
    return [row[:length] for row, length in zip(first, lengths, strict=True)]


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


BATCH = batch_of(draw_texts(1, 4))


@torch.inference_mode()
def logits(model: Any, inputs: dict[str, torch.Tensor] = BATCH) -> torch.Tensor:
    found: torch.Tensor = model(**inputs)[0]
    return found


# What it is


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_class_is_transformers_own_by_name_and_instance(loaded: Any, architecture: str) -> None:
    model, own = loaded(architecture), getattr(transformers, architecture)
    assert isinstance(model, own) and isinstance(model, IntegerEncoder)
    assert type(model).__name__ == architecture and type(model).__module__ == own.__module__
    base = getattr(transformers, type(model.base_model).__name__)
    assert isinstance(model.base_model, base) and isinstance(model.base_model, IntegerEncoder)
    assert model.device == torch.device("cpu") and model.dtype == torch.float32 and not model.training
    assert not issubclass(own, IntegerEncoder) and not issubclass(base, IntegerEncoder)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_outputs_have_the_names_and_shapes_of_the_float_models(loaded: Any, made: Made, architecture: str) -> None:
    models = loaded(architecture), load(source_of(made(architecture)))
    with torch.inference_mode():
        found, floats = (model(**BATCH) for model in models)
    assert type(found) is type(floats)
    shapes = {name: (value.shape, value.dtype) for name, value in floats.items()}
    assert {name: (value.shape, value.dtype) for name, value in found.items()} == shapes
    # Random, untrained weights and four calibration texts: the outputs are alike, not equal.
    pair = torch.stack([torch.cat([row.flatten() for row in rows(model, BATCH)]) for model in models])
    assert 0.95 < torch.corrcoef(pair)[0, 1] < 1


def test_integrate_leaves_float_and_zeroquant_models_alone(made: Made) -> None:
    for folder in (source_of(made(BERT)), made(BERT, "zeroquant")):
        model = load(folder)
        before, forward = logits(model), type(model).forward
        integrate(model)
        assert isinstance(model, transformers.BertForSequenceClassification) and type(model).forward is forward
        assert not isinstance(model, IntegerEncoder)
        assert type(model.bert) is transformers.BertModel
        assert torch.equal(logits(model), before)


# What comes out


def test_hidden_states_of_a_bare_encoder_are_its_integers_times_a_power_of_two(made: Made) -> None:
    model = transformers.AutoModel.from_pretrained(made(BERT))
    assert type(model).__name__ == "BertModel"
    with torch.inference_mode():
        floats = model(**BATCH)
        with integer_outputs():
            integers = model(**BATCH)
    places = {"last_hidden_state": model.embeddings.exponents[1].item(), "pooler_output": 15}
    assert set(floats) == set(integers) == set(places)
    for name, exponent in places.items():
        assert integers[name].dtype == torch.int32 and floats[name].dtype == torch.float32
        assert torch.equal(floats[name], (integers[name].double() * 2.0**-exponent).float())
        assert len(integers[name].unique()) > 50


def test_the_encoder_inside_a_classifier_gives_floats_when_it_is_called_alone(made: Made, loaded: Any) -> None:
    bare, whole = transformers.AutoModel.from_pretrained(made(BERT)), loaded(BERT)
    assert torch.equal(logits(whole.bert), logits(bare))
    with pytest.raises(QtoolError):
        whole(**BATCH, inputs_embeds=torch.zeros(1, 1, 32))
    assert torch.equal(logits(whole.bert), logits(bare)), "also after a call that failed"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_hidden_states_on_request(loaded: Any, made: Made, architecture: str) -> None:
    real = BATCH["attention_mask"][..., None].bool()
    model, configured = loaded(architecture), load(made(architecture), output_hidden_states=True)
    stem = model.base_model.embeddings
    inner, outer = stem.exponents.tolist()
    with torch.inference_mode():
        found = model(**BATCH, output_hidden_states=True).hidden_states
        other = configured(**BATCH).hidden_states
        assert len(found) == len(other) == 3 and all(map(torch.equal, found, other))
        assert configured(**BATCH, output_hidden_states=False).hidden_states is None
        assert model(**BATCH).hidden_states is None
        with integer_outputs():
            first = stem(BATCH["input_ids"])
            last = model.base_model(**BATCH)[0]
    if not hasattr(model.base_model, "embeddings_project"):
        assert torch.equal(found[0].double(), first.double() * 2.0**-inner)
    assert torch.equal(found[-1], (last.double() * 2.0**-outer).float())
    assert (found[-1][~real[..., 0]] == 0).all() and (found[1][~real[..., 0]] != 0).any()
    assert all(state.dtype == torch.float32 and state.shape == (*real.shape[:2], 32) for state in found)
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("hidden", [False, True])
def test_tuples_hold_what_dictionaries_hold(loaded: Any, made: Made, architecture: str, hidden: bool) -> None:
    configured = load(made(architecture))
    configured.config.return_dict = False
    whole = loaded(architecture)
    with torch.inference_mode():
        for model, plain in ((whole, configured), (whole.base_model, configured.base_model)):
            values = list(model(**BATCH, output_hidden_states=hidden).values())
            assert torch.is_tensor(values[0]) and len(values) >= 1 + hidden
            for found in (
                model(**BATCH, output_hidden_states=hidden, return_dict=False),
                plain(**BATCH, output_hidden_states=hidden),
            ):
                assert isinstance(found, tuple) and len(found) == len(values)
                for one, other in zip(found, values, strict=True):
                    assert type(one) is type(other)
                    assert torch.equal(one, other) if torch.is_tensor(one) else equal(list(one), list(other))
            assert list(plain(**BATCH, return_dict=True).keys()) == list(model(**BATCH).keys())


def test_labels_of_texts_give_a_loss(loaded: Any) -> None:
    labels = torch.tensor([0, 1, 2, 1])
    output = loaded(BERT)(**BATCH, labels=labels)
    assert torch.equal(output.logits, logits(loaded(BERT)))
    assert (
        output.loss.item() == pytest.approx(cross_entropy(output.logits, labels).item(), rel=1e-6) and output.loss > 0
    )


@pytest.mark.parametrize("architecture", [ROBERTA_MASKED, f"Electra{TOKENS}"])
def test_labels_of_tokens_give_a_loss(loaded: Any, architecture: str) -> None:
    labels = torch.where(BATCH["attention_mask"].bool(), BATCH["input_ids"] % 3, -100)
    output = loaded(architecture)(**BATCH, labels=labels)
    wanted = cross_entropy(output.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_labels_of_answers_give_a_loss(made: Made) -> None:
    ends = {"start_positions": torch.tensor([0, 1, 0, 2]), "end_positions": torch.tensor([3, 1, 0, 2])}
    output = load(made(f"Bert{ANSWERS}"))(**BATCH, **ends)
    sides = zip((output.start_logits, output.end_logits), ends.values(), strict=True)
    assert output.loss.item() == pytest.approx(sum(cross_entropy(*side).item() for side in sides) / 2, rel=1e-6)


def test_a_pipeline_classifies(made: Made) -> None:
    texts = ["w1 w2 w3", "w7", "w40 w41 w42 w43 w44 w45"]
    model = load(made(BERT))
    own = transformers.AutoTokenizer.from_pretrained(made(BERT))
    said = transformers.pipeline("text-classification", str(made(BERT)), top_k=None)(texts, batch_size=3)
    with torch.inference_mode():
        for text, labels in zip(texts, said, strict=True):
            wanted = model(**own(text, return_tensors="pt")).logits[0].softmax(0)
            found = {entry["label"]: entry["score"] for entry in labels}
            assert found == pytest.approx(dict(zip(("bad", "good", "so so"), wanted.tolist(), strict=True)), rel=1e-6)


# Copies


@pytest.mark.parametrize("architecture", [*FAMILIES, f"Bert{MASKED}", "BertModel"])
def test_copies_and_pickles_compute_the_same(made: Made, architecture: str) -> None:
    model = load(made(architecture))
    wanted = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert type(other) is type(model) and type(other.base_model) is type(model.base_model)
        assert torch.equal(logits(other), wanted)
    other = copy.deepcopy(model)
    other.get_input_embeddings().weight.zero_()
    assert torch.equal(logits(model), wanted) and not torch.equal(logits(other), wanted)


@pytest.mark.parametrize("architecture", [*FAMILIES, f"Bert{MASKED}", "BertModel"])
def test_a_saved_model_loads_to_the_same_bits(made: Made, tmp_path: Path, architecture: str) -> None:
    first = load(made(architecture))
    first.save_pretrained(tmp_path / "one")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["architectures"] == [architecture] and damaged_tensors(tmp_path / "one") == []
    second = load(tmp_path / "one")
    assert type(second) is type(first) and torch.equal(logits(second), logits(first))
    before, after = first.state_dict(), second.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    second.save_pretrained(tmp_path / "two")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_encoder_of_a_classifier_can_be_saved_alone(made: Made, tmp_path: Path) -> None:
    whole = load(made(BERT))
    whole.bert.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(load(tmp_path / "base")), logits(whole.bert))
    assert torch.equal(logits(transformers.AutoModel.from_pretrained(tmp_path / "base")), logits(whole.bert))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("architecture", [BERT, "BertModel"])
def test_another_type_changes_only_how_the_output_is_rounded(made: Made, architecture: str, dtype: torch.dtype) -> None:
    plain, asked, moved = load(made(architecture)), load(made(architecture), dtype=dtype), load(made(architecture))
    moved.to(dtype)
    exact = logits(load(made(architecture)).to(torch.float64))
    assert torch.equal(exact.float(), logits(plain))
    wanted = exact if dtype == torch.float64 else logits(plain).to(dtype)
    buffers = dict(plain.named_buffers())
    for model in (asked, moved):
        assert model.dtype == dtype
        found = logits(model)
        assert found.dtype == dtype and torch.equal(found, wanted)
        kept = dict(model.named_buffers())
        assert list(kept) == list(buffers)
        assert all(kept[name].dtype == x.dtype and torch.equal(kept[name], x) for name, x in buffers.items())


# What is refused


def four_axes(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return inputs["attention_mask"][:, None, None, :].expand(-1, 1, inputs["input_ids"].shape[1], -1)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "embeddings": ({"input_ids": None, "inputs_embeds": torch.zeros(4, 11, 32)}, "no inputs_embeds"),
    "ids and embeddings": ({"inputs_embeds": torch.zeros(4, 11, 32)}, "no inputs_embeds"),
    "attentions": ({"output_attentions": True}, "no output_attentions"),
    "mask of three axes": (
        {"attention_mask": four_axes(BATCH)[:, 0]},
        r"attention mask \[batch, tokens\] as its ids are, not \[",
    ),
    "mask of four axes": (
        {"attention_mask": four_axes(BATCH)},
        r"attention mask \[batch, tokens\] as its ids are, not \[",
    ),
    "no ids": ({"input_ids": None}, "takes input_ids"),
}


@pytest.mark.parametrize("case", list(REFUSED))
@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_integers_cannot_honour_is_refused_in_one_line(loaded: Any, architecture: str, case: str) -> None:
    options, said = REFUSED[case]
    for model in (loaded(architecture), loaded(architecture).base_model):
        with pytest.raises(QtoolError, match=said) as error:
            model(**{**BATCH, **options})
        message = str(error.value)
        assert "\n" not in message and f"an integer {type(model.base_model).__name__} takes" in message


def test_attentions_asked_for_in_the_config_are_refused(made: Made) -> None:
    model = load(made(BERT), attn_implementation="eager", output_attentions=True)
    with pytest.raises(QtoolError, match="no output_attentions"):
        model(**BATCH)
    assert torch.equal(model(**BATCH, output_attentions=False)[0], logits(load(made(BERT))))


def test_options_that_say_no_are_no_reason_to_refuse(loaded: Any) -> None:
    found = loaded(BERT)(**BATCH, output_attentions=False, inputs_embeds=None)
    assert torch.equal(found.logits, logits(loaded(BERT)))


def runs_or_is_refused(loader: Any, folder: Path) -> None:
    try:
        model = loader.from_pretrained(folder)
        found = logits(model)
    except QtoolError as error:
        assert "\n" not in str(error)
        return
    assert found.is_floating_point() and found.shape[:2] == BATCH["input_ids"].shape


@pytest.mark.parametrize("architecture", [f"Bert{ANSWERS}", ROBERTA_MASKED])
def test_an_encoder_whose_source_had_no_pooler(made: Made, architecture: str) -> None:
    runs_or_is_refused(transformers.AutoModel, made(architecture))


@pytest.mark.parametrize("architecture", [f"Bert{ANSWERS}", f"DistilBert{MASKED}"])
def test_a_head_that_the_source_had_not(made: Made, architecture: str) -> None:
    runs_or_is_refused(transformers.AutoModelForTokenClassification, made(architecture))


def test_the_head_of_texts_is_no_head_of_tokens(made: Made) -> None:
    runs_or_is_refused(transformers.AutoModelForTokenClassification, made(f"Electra{SEQUENCE}"))


# What no result depends on


@pytest.mark.parametrize("architecture", FAMILIES)
@hypothesis.settings(max_examples=12)
@hypothesis.given(seed=st.integers(0, 10**6), count=st.integers(1, 6), padding=st.integers(0, 20))
def test_a_text_alone_is_a_text_in_any_batch(
    loaded: Any, architecture: str, seed: int, count: int, padding: int
) -> None:
    """Whatever the others are, in whatever order, under any padding on the right and whatever ids stand there."""
    model, texts = loaded(architecture), draw_texts(seed, count)
    alone = [rows(model, batch_of([text]))[0] for text in texts]
    assert equal(rows(model, batch_of(texts)), alone)
    order = random.Random(seed).sample(range(count), count)
    padded = batch_of([texts[at] for at in order], length=11 + padding, junk=seed)
    assert equal(rows(model, padded), [alone[at] for at in order])
    without_mask = model(input_ids=torch.tensor([texts[0]]))[0][0]
    assert torch.equal(without_mask, alone[0])


@pytest.mark.parametrize("architecture", FAMILIES)
@hypothesis.settings(max_examples=5)
@hypothesis.given(seed=st.integers(0, 10**6))
def test_thread_counts_change_nothing(loaded: Any, architecture: str, seed: int) -> None:
    model, inputs = loaded(architecture), batch_of(draw_texts(seed, 7, longest=30))
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(logits(model, inputs))
    torch.set_num_threads(2)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_masks_of_any_type_mean_the_same(loaded: Any, architecture: str) -> None:
    wanted = logits(loaded(architecture))
    for change in (torch.Tensor.bool, torch.Tensor.float, torch.Tensor.int, lambda mask: 7 * mask):
        changed = {**BATCH, "attention_mask": change(BATCH["attention_mask"])}
        assert torch.equal(logits(loaded(architecture), changed), wanted)
    whole = {**BATCH, "attention_mask": torch.ones_like(BATCH["attention_mask"])}
    assert not torch.equal(logits(loaded(architecture), whole), wanted), "a mask that matters"


# Positions and padding


def test_roberta_counts_positions_over_tokens_that_are_not_padding(made: Made) -> None:
    model = load(made("RobertaModel"))
    counted = transformers.models.roberta.modeling_roberta.RobertaEmbeddings.create_position_ids_from_input_ids
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [PAD, PAD, 5, PAD, 6, 7], [5, 6, PAD, PAD, PAD, PAD], [PAD] * 6])
    positions = counted(ids, PAD)
    assert positions[1].tolist() == [0, 0, 1, 0, 2, 3]
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    found = logits(model, inputs)
    assert torch.equal(logits(model, {**inputs, "position_ids": positions}), found)
    others = positions.clone()
    others[1, -1] += 1
    shifted = logits(model, {**inputs, "position_ids": others})
    assert not torch.equal(shifted[1], found[1]) and torch.equal(shifted[[0, 2, 3]], found[[0, 2, 3]])


@pytest.mark.parametrize("padding", [1, 9])
def test_padding_on_the_left_changes_nothing_where_positions_are_counted(made: Made, padding: int) -> None:
    model, text = load(made("RobertaModel")), [5, 9, 12, 30, 64]
    ids = torch.tensor([[PAD] * padding + text])
    found = logits(model, {"input_ids": ids, "attention_mask": (ids != PAD).long()})
    assert torch.equal(found[0, padding:], logits(model, batch_of([text]))[0])
    bert = load(made("BertModel"))
    moved = logits(bert, {"input_ids": ids, "attention_mask": (ids != PAD).long()})
    assert not torch.equal(moved[0, padding:], logits(bert, batch_of([text]))[0]), "BERT's are places in the row"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_row_without_a_real_token_is_finite_and_always_the_same(loaded: Any, architecture: str) -> None:
    texts = draw_texts(3, 3, longest=6)
    inputs = batch_of(texts, length=6)
    masked = {**inputs, "attention_mask": inputs["attention_mask"] * torch.tensor([[1], [0], [1]])}
    model = loaded(architecture)
    found = logits(model, masked)
    assert found.isfinite().all() and torch.equal(found, logits(model, masked))
    alone = logits(model, {name: value[1:2] for name, value in masked.items()})
    assert torch.equal(found[1], alone[0])
    assert torch.equal(found[[0, 2]], logits(model, inputs)[[0, 2]]), "the rows beside it do not notice"


@pytest.mark.parametrize("architecture", ["BertModel", "RobertaModel", f"DistilBert{SEQUENCE}", f"Electra{TOKENS}"])
def test_hidden_states_at_padding_are_zero(made: Made, architecture: str) -> None:
    model = load(made(architecture)).base_model
    inputs = {**BATCH, "attention_mask": BATCH["attention_mask"].clone()}
    inputs["attention_mask"][0, 0] = 0  # holes count as padding
    found, real = logits(model, inputs), inputs["attention_mask"].bool()
    assert 0 < (~real).sum() < real.numel()
    assert (found[~real] == 0).all() and (found[real] != 0).any(-1).all()


# Without qtool


WITHOUT = """
import json, os, sys, traceback
import transformers
from transformers import BertModel, RobertaModel, DistilBertModel, ElectraModel  # once, not in every child

def child(body):
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            body()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

heads, control, *folders = sys.argv[1:]
found = {}
for folder in folders:
    name = json.load(open(f"{folder}/config.json"))["architectures"][0]
    loaders = {"own": getattr(transformers, name), "AutoModel": transformers.AutoModel}
    loaders |= {f"AutoModelFor{head}": getattr(transformers, f"AutoModelFor{head}") for head in heads.split()}
    found[name] = {other: child(lambda: loader.from_pretrained(folder)) for other, loader in loaders.items()}
assert "qtool" not in sys.modules
print(json.dumps([child(lambda: transformers.AutoModel.from_pretrained(control)), found]))
"""


QUICK = [*FAMILIES, f"Bert{ANSWERS}", f"Bert{MASKED}", "BertModel"]
EVERY = [f"{family}{head}" for family in ("Bert", "Roberta", "DistilBert", "Electra") for head in (*HEADS, "Model")]


@pytest.mark.parametrize(
    ("architectures", "heads"), [(QUICK, ()), pytest.param(EVERY, HEADS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_without_qtool_every_load_is_an_error(made: Made, architectures: list[str], heads: tuple[str, ...]) -> None:
    folders = [made(architecture) for architecture in architectures]
    words = " ".join(head.removeprefix("For") for head in heads)
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT, words, str(source_of(folders[0])), *map(str, folders)],
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    control, found = json.loads(result.stdout.splitlines()[-1])
    assert control == 0 and list(found) == architectures
    # The class of the artifact, AutoModel, and AutoModelFor each head.
    assert all(len(statuses) == 2 + len(heads) for statuses in found.values())
    assert [(name, other) for name, statuses in found.items() for other in statuses if statuses[other] == 0] == []


def test_every_module_of_the_encoder_is_an_integer_one(loaded: Any) -> None:
    """What these tests are about: no float Linear, LayerNorm or table is left anywhere."""
    for architecture in FAMILIES:
        leaves = [module for module in loaded(architecture).modules() if next(module.children(), None) is None]
        weighted = [module for module in leaves if module.state_dict()]
        assert len(weighted) > 15 and all(isinstance(module, IntModule) for module in weighted)
