"""Units and parts against the modules of the models themselves, for every class that is supported."""

import itertools
from typing import Any

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from qtool.anatomy import FAMILIES as TABLE
from qtool.anatomy import Anatomy, anatomy, head_kind, matrix_kind, max_tokens
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


@pytest.mark.parametrize(
    "architecture",
    [
        *("BertForPreTraining", "BertForNextSentencePrediction", "CamembertForMultipleChoice"),
        *("GPT2DoubleHeadsModel", "ElectraForPreTraining", "T5ForConditionalGeneration"),
    ],
)
def test_other_heads_are_refused(architecture: str) -> None:
    for ask in (lambda: anatomy(build(architecture)), lambda: head_kind(architecture)):
        with pytest.raises(InputError, match=f"{architecture} is not supported; heads that are: ForSequenceClass"):
            ask()


@pytest.mark.parametrize("architecture", ["BertLMHeadModel", "RobertaForCausalLM", "ElectraForCausalLM"])
def test_an_encoder_with_a_causal_head_is_refused(architecture: str) -> None:
    with pytest.raises(InputError, match="used as a decoder is not supported"):
        anatomy(build(architecture))


@pytest.mark.parametrize("architecture", CLASSES)
def test_kinds_of_heads(architecture: str) -> None:
    assert head_kind(architecture) == kind_of(architecture)


# Other families: each as its headed class, with what its blocks hold

MORE = {
    "DistilBertForTokenClassification": ("distilbert", "distilbert.transformer.layer", 6, "token-classification"),
    "DistilBertForQuestionAnswering": ("distilbert", "distilbert.transformer.layer", 6, "question-answering"),
    "ElectraForQuestionAnswering": ("electra", "electra.encoder.layer", 6, "question-answering"),
    "GPT2LMHeadModel": ("gpt2", "transformer.h", 4, "causal-lm"),
    "GPT2Model": ("gpt2", "h", 4, "encoder"),
    "OPTForCausalLM": ("opt", "model.decoder.layers", 6, "causal-lm"),
    "GPTNeoXForCausalLM": ("gpt_neox", "gpt_neox.layers", 4, "causal-lm"),
    "GPTJForCausalLM": ("gptj", "transformer.h", 6, "causal-lm"),
    "LlamaForCausalLM": ("llama", "model.layers", 7, "causal-lm"),
    "LlamaForQuestionAnswering": ("llama", "transformer.layers", 7, "question-answering"),
    "MistralForTokenClassification": ("mistral", "model.layers", 7, "token-classification"),
    "Qwen2ForSequenceClassification": ("qwen2", "model.layers", 7, "sequence-classification"),
}
OPTIONS: dict[str, Any] = {"GPTJForCausalLM": {"rotary_dim": 8}, "ElectraForQuestionAnswering": {"embedding_size": 16}}
OPTIONS |= {name: {"num_key_value_heads": 1} for name in MORE if name.startswith(("Llama", "Mistral", "Qwen2"))}


def test_every_type_in_the_table_is_tested() -> None:
    assert {"bert", "roberta", "xlm-roberta", "camembert", *(kind for kind, *_ in MORE.values())} == set(TABLE)


@pytest.mark.parametrize("architecture", MORE)
def test_units_and_parts_of_other_families(architecture: str) -> None:
    model_type, blocks, matrices, kind = MORE[architecture]
    model = build(architecture, **OPTIONS.get(architecture, {}))
    found = anatomy(model)
    assert (model.config.model_type, found.head_kind, found.generic) == (model_type, kind, False)
    assert [unit.modules for unit in found.blocks] == [(f"{blocks}.{index}",) for index in range(3)]
    assert model.get_submodule(found.word_table) is model.get_input_embeddings()
    for name in itertools.chain(model.state_dict(), (name for name, _ in model.named_buffers())):
        assert sum(unit.owns(name) for unit in found.units) == 1, name
    for unit in found.blocks:
        inside = model.get_submodule(unit.modules[0]).named_modules(prefix=unit.modules[0])
        weights = {path for path, module in inside if isinstance(module, torch.nn.Linear | Conv1D)}
        assert {part.path for part in unit.parts} == weights and len(weights) == matrices
        assert [part.name for part in unit.parts][:4] == [f"attention.{x}" for x in ("query", "key", "value", "output")]
        assert [part.name for part in unit.parts][-2:] == ["ffn.up", "ffn.down"]
        assert all(part.transposed == isinstance(model.get_submodule(part.path), Conv1D) for part in unit.parts)


@pytest.mark.parametrize("architecture", ["GPT2Model", "GPTNeoXForCausalLM"])
def test_rows_of_a_fused_matrix_are_shared_out(architecture: str) -> None:
    """Each row belongs to one of query, key and value; the interleaved layout has a stretch for each head."""
    model = build(architecture)
    for unit in anatomy(model).blocks:
        rows = [part.rows for part in unit.parts if part.rows is not None]
        assert len(rows) == 3 and {len(stretches) for stretches in rows} == {2 if "NeoX" in architecture else 1}
        taken = sorted(row for stretches in rows for part in stretches for row in range(part.start, part.stop))
        assert taken == list(range(96))


def test_the_embeddings_unit_holds_what_must_run_before_the_blocks() -> None:
    assert anatomy(build("GPTNeoXForCausalLM")).embeddings.owns("gpt_neox.rotary_emb.inv_freq")
    assert anatomy(build("OPTForCausalLM", word_embed_proj_dim=16)).embeddings.owns("model.decoder.project_in.weight")
    assert anatomy(build("MPNetModel")).embeddings.owns("encoder.relative_attention_bias.weight")
    assert anatomy(build("DebertaV2Model", relative_attention=True)).embeddings.owns("encoder.rel_embeddings.weight")
    assert anatomy(build("GPTBigCodeForCausalLM")).embeddings.owns("transformer.bias")
    assert anatomy(build("LlamaForCausalLM")).head.owns("model.norm.weight")


@pytest.mark.parametrize("architecture", ["GPTBigCodeForCausalLM", "PhiForCausalLM", "BloomModel", "MPNetForMaskedLM"])
def test_a_type_that_is_not_in_the_table(architecture: str) -> None:
    model = build(architecture)
    found = anatomy(model)
    assert found.generic and len(found.blocks) == 3
    assert model.get_submodule(found.word_table) is model.get_input_embeddings()
    for unit in found.blocks:
        inside = model.get_submodule(unit.modules[0]).named_modules(prefix=unit.modules[0])
        assert (
            [part.path for part in unit.parts] == [path for path, x in inside if isinstance(x, torch.nn.Linear)] != []
        )
    for name in itertools.chain(model.state_dict(), (name for name, _ in model.named_buffers())):
        assert sum(unit.owns(name) for unit in found.units) == 1, name


class Louder(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Named(torch.nn.Linear):
    """Another name, the same product."""


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (torch.nn.Linear(2, 3), "linear"),
        (Named(2, 3), "linear"),
        (Louder(2, 3), None),
        (Conv1D(2, 3), "conv1d"),
        (torch.nn.Conv1d(2, 3, 1), None),
        (torch.nn.Embedding(2, 3), "embedding"),
        (torch.nn.Embedding(2, 3, max_norm=1.0), None),
        (torch.nn.LayerNorm(2), None),
    ],
)
def test_what_can_be_replaced_by_codes(module: torch.nn.Module, kind: str | None) -> None:
    assert matrix_kind(module) == kind


@pytest.mark.parametrize(
    ("config", "tokens"),
    [("BertConfig", 40), ("RobertaConfig", 39), ("GPT2Config", 40), ("LlamaConfig", 40), ("OPTConfig", 40)],
)
def test_how_long_a_text_may_be(config: str, tokens: int) -> None:
    assert max_tokens(getattr(transformers, config)(**SIZES)) == tokens


def test_a_model_without_a_position_table_takes_any_text() -> None:
    assert max_tokens(transformers.BloomConfig()) is None


@pytest.mark.parametrize("option", [{"num_hidden_layers": 0}])
def test_a_model_without_blocks_is_refused(option: dict[str, int]) -> None:
    cls = transformers.BertModel
    with torch.device("meta"), pytest.raises(InputError, match="has 0 blocks"):
        anatomy(cls(cls.config_class(**{**SIZES, **option})))
