"""A model that is run unit by unit gives what the whole model gives, bit for bit, with one unit in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qtool.anatomy import anatomy
from qtool.checkpoint import Checkpoint, load_config, skeleton
from qtool.stream import Stream

CLASSES = [
    f"{family}{head}"
    for family in ("Bert", "Roberta", "XLMRoberta", "Camembert")
    for head in ("ForSequenceClassification", "ForMaskedLM", "Model")
]


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
        hidden, call = stream.embed(batch)
    states = [hidden]
    for unit in stream.anatomy.blocks:
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


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "RobertaForMaskedLM", "BertForSequenceClassification"])
def test_only_one_unit_is_in_memory(zoo: Any, architecture: str) -> None:
    stream = open_stream(zoo.make("m", architecture, words=None))
    for unit in stream.anatomy.units:
        own = {name for name in stream.model.state_dict() if unit.owns(name)}
        shared = {f"{stream.anatomy.word_table}.weight"} if unit.kind == "head" and stream.anatomy.tied_head else set()
        with stream.loaded(unit):
            assert in_memory(stream.model) == own | shared
        assert in_memory(stream.model) == set()


def test_batches_flow_while_a_unit_stays(zoo: Any) -> None:
    folder = zoo.make("m", words=None)
    stream, model = open_stream(folder), whole(folder)
    with stream.loaded(stream.anatomy.embeddings):
        flow = [stream.embed(batch) for batch in batches()]
    for unit in stream.anatomy.blocks:
        with stream.loaded(unit):
            flow = [(stream.block(unit, hidden, call), call) for hidden, call in flow]
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
        hidden, call = stream.embed(batch)
    with stream.loaded(stream.anatomy.head):
        with pytest.raises((RuntimeError, TypeError)):
            stream.head(batch, hidden[..., :1])
        stream.head(batch, hidden)
    assert torch.equal(run(stream, batch)[0]["logits"], run(open_stream(folder), batch)[0]["logits"])
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in stream.model.modules())
    assert len(call.args) + len(call.kwargs) > 0


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
