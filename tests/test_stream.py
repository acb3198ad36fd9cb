"""A model that is run unit by unit gives what the whole model gives, bit for bit, with one unit in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qtool.anatomy import anatomy
from qtool.checkpoint import Checkpoint, load_config, skeleton
from qtool.errors import InputError
from qtool.stream import Stream

CLASSES = [
    f"{family}{head}"
    for family in ("Bert", "Roberta", "XLMRoberta", "Camembert")
    for head in ("ForSequenceClassification", "ForMaskedLM", "Model")
]

TIDY = {"bos_token_id": 1, "eos_token_id": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "DistilBertForQuestionAnswering": {},
    "ElectraForTokenClassification": {"embedding_size": 16},
    "GPT2LMHeadModel": TIDY,
    "OPTForCausalLM": {**TIDY, "word_embed_proj_dim": 16},
    "GPTNeoXForCausalLM": TIDY,
    "GPTJForCausalLM": {**TIDY, "rotary_dim": 8},  # its blocks return tuples
    "LlamaForCausalLM": {**TIDY, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "FalconForCausalLM": TIDY,
    "GPTBigCodeForCausalLM": TIDY,  # a buffer of the base model itself
    "MPNetModel": {},  # tuples of one, a position bias beside the blocks
    "DebertaV2Model": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},  # tuples that are unpacked
    "Gemma2ForCausalLM": {
        **TIDY,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 4,
    },  # a mask for each block
    "OpenAIGPTLMHeadModel": {},  # lists
}


def open_stream(folder: Path) -> Stream:
    model = skeleton(load_config(folder))
    return Stream(model, anatomy(model), Checkpoint(folder, model).tensor)


def whole(folder: Path) -> Any:
    """The model as transformers loads it, by the class that the config names."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()


def batches() -> list[dict[str, torch.Tensor]]:
    """Padded to the right, to the left, not at all, one token, and with token types."""
    ids = torch.randint(5, 65, (4, 11), generator=torch.Generator().manual_seed(0))
    lengths, places = torch.tensor([11, 7, 1, 3])[:, None], torch.arange(11)
    right, left = (places < lengths).long(), (places >= 11 - lengths).long()
    return [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": ids * right, "attention_mask": right, "token_type_ids": (places > 5).long().expand(4, -1)},
        {"input_ids": ids * left, "attention_mask": left},
        {"input_ids": ids[:1, :1], "attention_mask": torch.ones(1, 1, dtype=torch.long)},
        {"input_ids": ids[:2]},
    ]


def in_memory(model: Any) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if tensor.device.type != "meta"}


def run(stream: Stream, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Outputs, and the hidden states that enter each block and leave the last."""
    with stream.loaded(stream.anatomy.embeddings):
        hidden, calls = stream.embed(batch)
    states = [hidden]
    for unit, call in zip(stream.anatomy.blocks, calls, strict=True):
        with stream.loaded(unit):
            states.append(stream.block(unit, states[-1], call))
    with stream.loaded(stream.anatomy.head):
        return stream.head(batch, states[-1]), states


@pytest.mark.parametrize("architecture", CLASSES)
def test_streamed_outputs_are_those_of_the_model(shelf: Any, architecture: str) -> None:
    folder = shelf.make(architecture, architecture, words=None, type_vocab_size=2, num_labels=3)
    stream, model = open_stream(folder), whole(folder)
    for batch in batches():
        found, states = run(stream, batch)
        with torch.inference_mode():
            wanted = model(**batch, output_hidden_states=True)
        assert len(states) == len(wanted.hidden_states) == 3
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, wanted.hidden_states, strict=True))
        named = {name: value for name, value in wanted.items() if isinstance(value, torch.Tensor)}
        assert sorted(found) == sorted(named) != []
        for name, value in named.items():
            assert torch.equal(found[name], value), name
    assert in_memory(stream.model) == set()


@pytest.mark.parametrize("architecture", OTHERS)
def test_streamed_outputs_of_other_classes(shelf: Any, architecture: str) -> None:
    folder = shelf.make(f"other-{architecture}", architecture, words=None, **OTHERS[architecture])
    stream, model = open_stream(folder), whole(folder)
    model.config.use_cache = False
    for batch in batches():
        inputs = {name: value for name, value in batch.items() if name != "token_type_ids"}
        found = run(stream, inputs)[0]
        with torch.inference_mode():
            wanted = {name: value for name, value in model(**inputs).items() if isinstance(value, torch.Tensor)}
        assert sorted(found) == sorted(wanted) != []
        assert all(torch.equal(found[name].nan_to_num(), value.nan_to_num()) for name, value in wanted.items())
    assert in_memory(stream.model) == set()


def test_each_block_gets_its_own_call(shelf: Any) -> None:
    folder = shelf.make("masks", "Gemma2ForCausalLM", words=None, **OTHERS["Gemma2ForCausalLM"])
    stream = open_stream(folder)
    with stream.loaded(stream.anatomy.embeddings):
        masks = [call.kwargs["attention_mask"] for call in stream.embed(batches()[0])[1]]
    sliding, full = (mask.squeeze() for mask in masks)
    assert full is None or not torch.equal(sliding[0] if sliding.dim() > 2 else sliding, full)


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "RobertaForMaskedLM", "BertForSequenceClassification"])
def test_only_one_unit_is_in_memory(zoo: Any, architecture: str) -> None:
    stream = open_stream(zoo.make("m", architecture, words=None))
    for unit in stream.anatomy.units:
        own = {name for name in stream.model.state_dict() if unit.owns(name)}
        first = {name for name in stream.model.state_dict() if stream.anatomy.embeddings.owns(name)}
        with stream.loaded(unit):  # the model's forward begins with the embeddings, also for the head's sake
            assert in_memory(stream.model) == own | (first if unit.kind == "head" else set())
        assert in_memory(stream.model) == set()


def test_batches_flow_while_a_unit_stays(zoo: Any) -> None:
    folder = zoo.make("m", words=None)
    stream, model = open_stream(folder), whole(folder)
    with stream.loaded(stream.anatomy.embeddings):
        flow = [stream.embed(batch) for batch in batches()]
    for index, unit in enumerate(stream.anatomy.blocks):
        with stream.loaded(unit):
            flow = [(stream.block(unit, hidden, calls[index]), calls) for hidden, calls in flow]
    with stream.loaded(stream.anatomy.head):
        found = [stream.head(batch, hidden)["logits"] for batch, (hidden, _) in zip(batches(), flow, strict=True)]
    with torch.inference_mode():
        wanted = [model(**batch).logits for batch in batches()]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_a_unit_is_emptied_after_an_error(zoo: Any) -> None:
    stream = open_stream(zoo.make("m", words=None))
    with pytest.raises(ZeroDivisionError), stream.loaded(stream.anatomy.blocks[0]):
        raise ZeroDivisionError
    assert in_memory(stream.model) == set()


def test_a_unit_that_fails_to_load_leaves_nothing(zoo: Any) -> None:
    folder = zoo.make("m", "BertForMaskedLM", words=None)
    model = skeleton(load_config(folder))
    good = Checkpoint(folder, model).tensor

    def broken(name: str) -> torch.Tensor:
        if name.endswith("word_embeddings.weight"):
            raise OSError("the disk is gone")
        tensor: torch.Tensor = good(name)
        return tensor

    stream = Stream(model, anatomy(model), broken)
    with pytest.raises(OSError, match="gone"), stream.loaded(stream.anatomy.head):
        pass
    assert in_memory(model) == set()


def test_the_model_is_as_before_after_a_failed_call(zoo: Any) -> None:
    folder = zoo.make("m", words=None)
    stream, batch = open_stream(folder), batches()[1]
    with stream.loaded(stream.anatomy.embeddings):
        with pytest.raises(IndexError):
            stream.embed({"input_ids": torch.full((1, 3), 10**6)})
        hidden, calls = stream.embed(batch)
    with stream.loaded(stream.anatomy.head):
        with pytest.raises((RuntimeError, TypeError)):
            stream.head(batch, hidden[..., :1])
        stream.head(batch, hidden)
    assert torch.equal(run(stream, batch)[0]["logits"], run(open_stream(folder), batch)[0]["logits"])
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in stream.model.modules())
    assert len(calls) == 2 and all(len(call.args) + len(call.kwargs) > 0 for call in calls)


@pytest.mark.parametrize("option", [{"return_dict": False}, {"output_hidden_states": True}])
def test_settings_of_the_output_change_nothing(zoo: Any, option: dict[str, bool]) -> None:
    folder = zoo.make("m", words=None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **option}))
    found = run(open_stream(folder), batches()[1])[0]
    with torch.inference_mode():
        wanted = whole(folder)(**batches()[1], return_dict=True).logits
    assert list(found) == ["logits"] and torch.equal(found["logits"], wanted)


def test_other_attention_settings_are_kept(zoo: Any) -> None:
    """What the blocks are called with is captured, not guessed: here eager attention, with an additive mask."""
    folder = zoo.make("m", words=None)
    stream, model = open_stream(folder), whole(folder)
    stream.model.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        assert torch.equal(run(stream, batches()[1])[0]["logits"], model(**batches()[1]).logits)


# Models that do not run block after block


def wired(zoo: Any, forward: Any) -> Stream:
    """The stream of a BERT whose encoder runs its blocks as `forward` says."""
    stream = open_stream(zoo.make("m", "BertModel", words=None))
    encoder = stream.model.encoder

    def run_blocks(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = forward(list(encoder.layer), hidden)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)

    encoder.forward = run_blocks
    return stream


def twice(blocks: list[Any], hidden: torch.Tensor) -> torch.Tensor:
    return blocks[1](blocks[0](blocks[0](hidden)))


def backwards(blocks: list[Any], hidden: torch.Tensor) -> torch.Tensor:
    return blocks[0](blocks[1](hidden))


def changed_between(blocks: list[Any], hidden: torch.Tensor) -> torch.Tensor:
    return blocks[1](blocks[0](hidden) + 1)


def parallel(blocks: list[Any], hidden: torch.Tensor) -> torch.Tensor:
    return blocks[0](hidden) + blocks[1](hidden)


def by_name(blocks: list[Any], hidden: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        hidden = block(hidden_states=hidden)
    return hidden


@pytest.mark.parametrize("forward", [twice, backwards, changed_between, parallel])
def test_what_does_not_run_block_after_block_is_refused(zoo: Any, forward: Any) -> None:
    stream = wired(zoo, forward)
    with (
        stream.loaded(stream.anatomy.embeddings),
        pytest.raises(InputError, match=r"BertModel (runs its blocks more than once|does not run block after block)"),
    ):
        stream.embed(batches()[0])
    assert not any("forward" in vars(module) for module in stream.model.encoder.layer)


def test_hidden_states_may_come_by_name(zoo: Any) -> None:
    stream = wired(zoo, by_name)
    with stream.loaded(stream.anatomy.embeddings):
        hidden, calls = stream.embed(batches()[0])
    assert [call.keyword for call in calls] == ["hidden_states"] * 2
    for unit, call in zip(stream.anatomy.blocks, calls, strict=True):
        with stream.loaded(unit):
            hidden = stream.block(unit, hidden, call)
    model = whole(zoo.folder / "m")
    with torch.inference_mode():
        assert torch.equal(hidden, model(**batches()[0]).last_hidden_state)


def test_a_guessed_anatomy_that_fails_is_one_line(zoo: Any) -> None:
    stream = open_stream(zoo.make("m", "MPNetModel", words=None))
    with stream.loaded(stream.anatomy.embeddings):
        hidden, calls = stream.embed(batches()[1] | {"token_type_ids": None})
        with pytest.raises(InputError, match="MPNetModel cannot be run unit by unit: ") as error:
            stream.block(stream.anatomy.blocks[0], hidden, calls[0])  # its tensors are not there
    assert "\n" not in str(error.value)
