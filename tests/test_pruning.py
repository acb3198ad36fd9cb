"""Models of which heads were cut out against whole models of which the same heads are masked."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qtool.analysis.heads import removable, without
from qtool.anatomy import anatomy
from qtool.checkpoint import open_float, skeleton
from qtool.errors import InputError
from qtool.pruning import attentions, checked, cuts, shrink
from qtool.stream import Stream, whole

OPTIONS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"num_key_value_heads": 2, "attention_bias": True},
    "MistralForCausalLM": {"num_key_value_heads": 2},
    "Qwen2ForCausalLM": {"num_key_value_heads": 4},
    "ElectraForSequenceClassification": {"embedding_size": 16},
    "OPTForCausalLM": {"word_embed_proj_dim": 32, "ffn_dim": 48},
}
ENCODERS = [
    "BertForSequenceClassification", "BertModel", "RobertaForSequenceClassification",
    "DistilBertForSequenceClassification", "ElectraForSequenceClassification",
]  # fmt: skip
DECODERS = ["GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "OPTForCausalLM"]
IDS = torch.tensor([[5, 9, 30, 7, 12, 44], [6, 8, 11, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}


@pytest.fixture(scope="module")
def model(shelf: Any) -> Callable[[str], Path]:
    """Float models with 4 heads in each of 3 layers, biases and all."""
    options = {"num_attention_heads": 4, "num_hidden_layers": 3, "tie_word_embeddings": True}

    def make(architecture: str) -> Path:
        name = f"heads-{architecture}"
        if not (shelf.folder / name).exists():
            own = {**options, **OPTIONS.get(architecture, {})}
            shelf.make(name, architecture, words=None, change=shelf.noise(0.1), **own)
        folder: Path = shelf.folder / name
        return folder

    return make


def every_head_of(folder: Path, layer: int) -> list[int]:
    return list(range(attentions(open_float(folder)[0])[layer].count))


def pruned(folder: Path, gone: dict[int, list[int]]) -> Any:
    """The model with heads cut out, its tensors in memory."""
    full, checkpoint = open_float(folder)
    checkpoint.cut(cuts(full, gone))
    smaller = skeleton(full.config)
    shrink(smaller, gone)
    return whole(smaller, checkpoint.tensor)


def outputs(model: Any, **batch: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**(batch or BATCH))[0]
    return found


@pytest.mark.parametrize("architecture", [*ENCODERS, *DECODERS])
@pytest.mark.parametrize("layer", [None, 0, 1])
def test_masked_is_sliced(architecture: str, layer: int | None, model: Callable[[str], Path]) -> None:
    """Also where layer 0 or 1 loses all of its heads."""
    folder = model(architecture)
    gone = {0: [0], 2: [1]} if layer is None else {layer: every_head_of(folder, layer), 2: [0]}
    full = getattr(transformers, architecture).from_pretrained(folder).eval()
    with without(full, frozenset((at, head) for at, heads in gone.items() for head in heads)):
        masked = outputs(full)
    smaller = pruned(folder, gone)
    assert torch.allclose(outputs(smaller), masked, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(outputs(full), masked, atol=1e-2)
    assert smaller.num_parameters() < full.num_parameters()


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("layer", [0, 1])
def test_pruned_decoders_step_with_a_cache(architecture: str, layer: int, model: Callable[[str], Path]) -> None:
    """Position by position with a cache, as without; the layer that counts its tokens may be one without heads."""
    folder = model(architecture)
    smaller = pruned(folder, {layer: every_head_of(folder, layer)})
    ids = IDS[:1]
    cache, steps = None, []
    for at in range(ids.shape[1]):
        with torch.no_grad():
            out = smaller(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert cache.get_seq_length() == ids.shape[1]
    assert torch.allclose(torch.cat(steps, 1), outputs(smaller, input_ids=ids), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_pruned_models_run_unit_by_unit(architecture: str, model: Callable[[str], Path]) -> None:
    """What the pipeline does; parts without numbers are no parts."""
    folder = model(architecture)
    gone = {0: [0], 1: every_head_of(folder, 1)}
    full, checkpoint = open_float(folder)
    checkpoint.cut(cuts(full, gone))
    shrink(full, gone)
    found = anatomy(full)
    names = [{part.name for part in unit.parts if part.name.startswith("attention")} for unit in found.blocks]
    assert [len(own) for own in names] == [4, 0, 4]
    stream = Stream(full, found, checkpoint.tensor)
    with stream.loaded(found.embeddings):
        hidden, calls = stream.embed(BATCH)
    for unit, call in zip(found.blocks, calls, strict=True):
        with stream.loaded(unit):
            hidden = stream.block(unit, hidden, call)
    with stream.loaded(found.head):
        logits = stream.head(BATCH, hidden)["logits"]
    assert torch.allclose(logits, outputs(pruned(folder, gone)), atol=1e-5)


def test_removed_rows_and_columns_are_those_of_the_heads(model: Callable[[str], Path]) -> None:
    """Against slices written out by hand: 4 heads of 8 channels; GPT-2 has q, k and v side by side."""
    folder = model("GPT2LMHeadModel")
    full = transformers.GPT2LMHeadModel.from_pretrained(folder)
    layer, smaller = full.transformer.h[1].attn, pruned(folder, {1: [0, 2]}).transformer.h[1].attn
    kept = [*range(8, 16), *range(24, 32)]
    columns = [start + channel for start in (0, 32, 64) for channel in kept]
    assert torch.equal(smaller.c_attn.weight, layer.c_attn.weight[:, columns])
    assert torch.equal(smaller.c_attn.bias, layer.c_attn.bias[columns])
    assert torch.equal(smaller.c_proj.weight, layer.c_proj.weight[kept])
    assert torch.equal(smaller.c_proj.bias, layer.c_proj.bias)
    assert (smaller.num_heads, smaller.split_size, smaller.c_attn.nf, smaller.c_proj.nx) == (2, 16, 48, 16)


def test_a_head_of_keys_goes_with_the_queries_that_it_serves(model: Callable[[str], Path]) -> None:
    folder = model("LlamaForCausalLM")
    full = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert removable(full) == [(layer, head) for layer in range(3) for head in range(2)]
    layer, smaller = full.model.layers[0].self_attn, pruned(folder, {0: [0]}).model.layers[0].self_attn
    assert torch.equal(smaller.q_proj.weight, layer.q_proj.weight[16:])
    assert torch.equal(smaller.k_proj.weight, layer.k_proj.weight[8:])
    assert torch.equal(smaller.v_proj.bias, layer.v_proj.bias[8:])
    assert torch.equal(smaller.o_proj.weight, layer.o_proj.weight[:, 16:])
    assert smaller.num_key_value_groups == 2


def test_copies_of_a_headless_attention_compute_the_same(model: Callable[[str], Path]) -> None:
    smaller = pruned(model("DistilBertForSequenceClassification"), {0: [0, 1, 2, 3]})
    assert torch.equal(outputs(copy.deepcopy(smaller)), outputs(smaller))


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ({3: [0]}, "no layer 3; the model's are 0 to 2"),
        ({-1: [0]}, "no layer -1"),
        ({0: [4]}, "layer 0 has no head 4; its heads are 0 to 3"),
        ({0: [-1]}, "layer 0 has no head -1"),
        ({1: [2, 0, 2]}, "layer 1 names head 2 twice"),
        ({1: []}, "no head is to be removed"),
        ({}, "no head is to be removed"),
        ({layer: [0, 1, 2, 3] for layer in range(3)}, "all heads of all layers would go"),
    ],
)
def test_nonsense_is_refused(gone: dict[int, list[int]], said: str, model: Callable[[str], Path]) -> None:
    sites = attentions(open_float(model("BertForSequenceClassification"))[0])
    with pytest.raises(InputError, match=said):
        checked(gone, sites)


def test_unknown_architectures_are_refused(model: Callable[[str], Path]) -> None:
    with torch.device("meta"):
        neox = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(num_hidden_layers=1, vocab_size=8))
        other = transformers.MPNetModel(transformers.MPNetConfig(num_hidden_layers=1, vocab_size=8))
    with pytest.raises(InputError, match="heads of model type 'gpt_neox' cannot be removed"):
        attentions(neox)
    with pytest.raises(InputError, match="'mpnet' is not in qtool's table"):
        attentions(other)


def test_protected_heads_are_not_removable(model: Callable[[str], Path]) -> None:
    full, _ = open_float(model("BertForSequenceClassification"))
    assert removable(full, [(0, 0), (2, 3)]) == [
        (layer, head) for layer in range(3) for head in range(4) if (layer, head) not in ((0, 0), (2, 3))
    ]
    with pytest.raises(InputError, match=r"no head 0\.4"):
        removable(full, [(0, 4)])
