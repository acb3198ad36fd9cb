"""Units and parts against the modules of the models themselves, for every class that is supported."""

from typing import Any

import pytest
import torch
import transformers

from qtool.anatomy import Anatomy, anatomy, head_kind
from qtool.errors import InputError

FAMILIES = {"Bert": "bert", "Roberta": "roberta", "XLMRoberta": "roberta", "Camembert": "roberta"}
CLASSES = [f"{family}{head}" for family in FAMILIES for head in ("ForSequenceClassification", "ForMaskedLM", "Model")]
KINDS = {"ForSequenceClassification": "sequence-classification", "ForMaskedLM": "masked-lm", "Model": "encoder"}
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
SIZES |= {"max_position_embeddings": 40, "num_hidden_layers": 3, "pad_token_id": 0, "type_vocab_size": 2}


def build(architecture: str, **options: Any) -> Any:
    """A model of this class on the meta device."""
    cls = getattr(transformers, architecture)
    with torch.device("meta"):
        return cls(cls.config_class(**SIZES, **options))


def base_of(architecture: str) -> str:
    """The prefix of paths inside the base model."""
    if architecture.endswith("Model"):
        return ""
    return next(f"{prefix}." for family, prefix in FAMILIES.items() if architecture.startswith(family))


def kind_of(architecture: str) -> str:
    return next(kind for suffix, kind in KINDS.items() if architecture.endswith(suffix))


@pytest.mark.parametrize("architecture", CLASSES)
def test_units_in_order(architecture: str) -> None:
    found, base = anatomy(build(architecture)), base_of(architecture)
    assert (found.architecture, found.head_kind) == (architecture, kind_of(architecture))
    assert [unit.name for unit in found.units] == ["embeddings", "block.0", "block.1", "block.2", "head"]
    assert [unit.kind for unit in found.units] == ["embeddings", "block", "block", "block", "head"]
    assert found.embeddings.modules == (f"{base}embeddings",)
    assert [unit.modules for unit in found.blocks] == [(f"{base}encoder.layer.{index}",) for index in range(3)]
    assert found.word_table == f"{base}embeddings.word_embeddings"
    assert found.head is found.units[-1] and found.head.parts == ()


@pytest.mark.parametrize("architecture", CLASSES)
def test_units_own_every_tensor_once(architecture: str) -> None:
    model = build(architecture)
    found = anatomy(model)
    for name in model.state_dict():
        owners = [unit.name for unit in found.units if unit.owns(name)]
        assert len(owners) == 1, (name, owners)
        assert (owners == ["embeddings"]) == (".embeddings." in f".{name}")
        assert owners[0].startswith("block.") == (".encoder.layer." in f".{name}")


@pytest.mark.parametrize("architecture", CLASSES)
def test_parts_are_the_matrices_of_embeddings_and_blocks(architecture: str) -> None:
    model = build(architecture)
    found = anatomy(model)
    matrices = {
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and not found.head.owns(path)
    }
    parts = [part for _, part in found.parts()]
    assert {part.path for part in parts} == matrices and len(parts) == len(matrices) == 3 + 3 * 6
    assert all(part.rows is None and not part.transposed for part in parts)
    assert all(unit.owns(part.path) and part in unit.parts for unit, part in found.parts())


def test_parts_by_name() -> None:
    found = anatomy(build("RobertaModel"))
    assert {part.name: part.path for part in found.embeddings.parts} == {
        "word": "embeddings.word_embeddings",
        "position": "embeddings.position_embeddings",
        "token_type": "embeddings.token_type_embeddings",
    }
    assert {part.name: part.path for part in found.blocks[2].parts} == {
        "attention.query": "encoder.layer.2.attention.self.query",
        "attention.key": "encoder.layer.2.attention.self.key",
        "attention.value": "encoder.layer.2.attention.self.value",
        "attention.output": "encoder.layer.2.attention.output.dense",
        "ffn.up": "encoder.layer.2.intermediate.dense",
        "ffn.down": "encoder.layer.2.output.dense",
    }


@pytest.mark.parametrize(
    ("architecture", "modules"),
    [
        ("BertForSequenceClassification", {"bert.pooler", "dropout", "classifier"}),
        ("BertForMaskedLM", {"cls"}),
        ("BertModel", {"pooler"}),
        ("RobertaForSequenceClassification", {"classifier"}),
        ("CamembertForMaskedLM", {"lm_head"}),
        ("XLMRobertaModel", {"pooler"}),
    ],
)
def test_what_is_in_the_head(architecture: str, modules: set[str]) -> None:
    assert set(anatomy(build(architecture)).head.modules) == modules


@pytest.mark.parametrize("architecture", CLASSES)
def test_the_tied_head(architecture: str) -> None:
    wanted = "cls.predictions.decoder" if architecture == "BertForMaskedLM" else "lm_head.decoder"
    tied = wanted if architecture.endswith("ForMaskedLM") else None
    assert anatomy(build(architecture)).tied_head == tied
    if tied:
        assert anatomy(build(architecture)).head.owns(tied)
        assert anatomy(build(architecture, tie_word_embeddings=False)).tied_head is None


@pytest.mark.parametrize(("path", "owned"), [("a.b", True), ("a.b.c", True), ("a.bc", False), ("a", False)])
def test_a_path_is_owned_whole_words_only(path: str, owned: bool) -> None:
    found: Anatomy = anatomy(build("BertModel"))
    unit = type(found.head)("u", "block", ("a.b",), ())
    assert unit.owns(path) is owned
    assert not found.blocks[1].owns("encoder.layer.10.output.dense.weight")


@pytest.mark.parametrize("option", ["is_decoder", "add_cross_attention"])
def test_decoders_are_refused(option: str) -> None:
    options = {"is_decoder": True, option: True}
    with pytest.raises(InputError, match="bert used as a decoder is not supported; set is_decoder to false"):
        anatomy(build("BertModel", **options))


@pytest.mark.parametrize("model_type", ["gpt2", "distilbert", "electra"])
def test_other_types_are_refused(model_type: str) -> None:
    config = transformers.AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    with pytest.raises(InputError) as error:
        anatomy(model)
    assert f"model type '{model_type}' is not supported" in str(error.value)
    assert all(known in str(error.value) for known in ("bert", "roberta", "xlm-roberta", "camembert"))


@pytest.mark.parametrize(
    "architecture",
    [
        *("BertForQuestionAnswering", "RobertaForTokenClassification", "CamembertForMultipleChoice"),
        *("BertForPreTraining", "BertForNextSentencePrediction", "BertLMHeadModel", "RobertaForCausalLM"),
    ],
)
def test_other_heads_are_refused(architecture: str) -> None:
    for ask in (lambda: anatomy(build(architecture)), lambda: head_kind(architecture)):
        with pytest.raises(InputError, match=f"{architecture} is not supported; heads that are: ForSequenceClass"):
            ask()


@pytest.mark.parametrize("architecture", CLASSES)
def test_kinds_of_heads(architecture: str) -> None:
    assert head_kind(architecture) == kind_of(architecture)
