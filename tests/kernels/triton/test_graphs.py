"""Forwards as CUDA graphs. Without a GPU a stand-in records: it plays by calling again what it was given."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from small_models import Artifacts, batch, load, outputs
from torch.utils._pytree import tree_leaves

from qtool import kernels, recorded
from qtool.kernels.triton import graphs
from qtool.kernels.triton.graphs import Graphs
from qtool.nn.integer.module import integer_outputs

HERE = torch.cuda.is_available()


class Again:
    """A recording as CUDA makes it: fixed places for inputs and outputs, and nothing of Python when it is played."""

    made: ClassVar[list["Again"]] = []

    def __init__(self, function: Callable[..., Any], tensors: graphs.Tensors, pool: Any) -> None:
        self.inputs = {name: tensor.clone() for name, tensor in tensors.items()}
        self.function, self.output = function, function(**self.inputs)
        self.plays = 0
        self.made.append(self)

    def play(self, tensors: graphs.Tensors) -> Any:
        self.plays += 1
        for name, tensor in tensors.items():
            self.inputs[name].copy_(tensor)
        for place, value in zip(tree_leaves(self.output), tree_leaves(self.function(**self.inputs)), strict=True):
            place.copy_(value)
        return graphs.tree_map_only(torch.Tensor, torch.Tensor.clone, self.output)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Again]:
    monkeypatch.setattr(Again, "made", [])
    monkeypatch.setattr(graphs, "Recording", Again)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(recorded, "_on_gpu", lambda tensors: True)
    return Again.made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Artifacts(tmp_path_factory.mktemp("models"), "graphs").make("BertForSequenceClassification", ("ibert",))


def test_a_shape_is_recorded_the_second_time(made: list[Again]) -> None:
    calls = []

    def twice(x: torch.Tensor) -> dict[str, torch.Tensor]:
        calls.append(x)
        return {"y": 2 * x}

    known = Graphs()
    for value in range(4):
        result = known.call(twice, {"x": torch.full((3,), value)})["y"]
        assert result.tolist() == [2 * value] * 3
    assert len(made) == 1 and made[0].plays == 3
    kept = known.call(twice, {"x": torch.full((3,), 5)})["y"]
    known.call(twice, {"x": torch.full((3,), 6)})
    assert kept.tolist() == [10] * 3  # not a view of what is written over
    known.call(twice, {"x": torch.full((2,), 5)})
    known.call(twice, {"x": torch.full((3,), 5)}, ("other",))
    assert len(made) == 1


def test_the_oldest_are_forgotten(made: list[Again]) -> None:
    known = Graphs()
    for _ in range(2):
        for size in range(graphs.KEPT):
            known.call(torch.neg, {"input": torch.ones(size)})
    assert len(made) == graphs.KEPT
    known.call(torch.neg, {"input": torch.ones(graphs.KEPT)})
    known.call(torch.neg, {"input": torch.ones(0)})
    assert len(made) == graphs.KEPT  # size 0 was the oldest, and begins again


def test_a_forward_is_recorded_whole(folder: Path, made: list[Again]) -> None:
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


@pytest.mark.parametrize("what", ["hidden states", "configured", "labels", "integers", "watched", "reference"])
def test_what_is_not_recorded(folder: Path, made: list[Again], what: str) -> None:
    model, inputs = load(folder), batch()
    asked: dict[str, Any] = {
        "hidden states": {"output_hidden_states": True},
        "labels": {"labels": torch.zeros(5).long()},
    }
    model.config.output_hidden_states = what == "configured"
    if what == "watched":
        model.bert.encoder.layer[1].register_forward_hook(lambda *_: None)
    with torch.no_grad(), kernels.using("reference" if what == "reference" else "triton"):
        for _ in range(3):
            if what == "integers":
                with integer_outputs():
                    assert model(**inputs).logits.dtype == torch.int32
            else:
                model(**inputs, **asked.get(what, {}))
    assert not made


def test_what_a_module_made_anew_ends_recordings(folder: Path, made: list[Again]) -> None:
    """A recording reads what modules made of their weights: memory that is free once they have let go of it."""
    model, inputs = load(folder), batch()
    wanted = outputs(load(folder), inputs)
    with kernels.using("triton"):
        for part in (model.bert, model.bert.embeddings, model.classifier):
            for _ in range(3):
                assert torch.equal(outputs(model, inputs), wanted)
            plays = [one.plays for one in made]
            part.float()  # changes no tensor, but what was made of them is gone
            assert torch.equal(outputs(model, inputs), wanted)
            assert [one.plays for one in made] == plays


def test_a_call_that_fails_is_not_recorded(made: list[Again]) -> None:
    known, calls = Graphs(), []

    def fails_once(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return x + 1

    with pytest.raises(RuntimeError, match="out of memory"):
        known.call(fails_once, {"x": torch.zeros(1)})
    assert [known.call(fails_once, {"x": torch.zeros(1)}).item() for _ in range(2)] == [1, 1]
    assert len(made) == 1


@pytest.mark.skipif(not HERE, reason="no GPU: the stand-in above is what was recorded")
@pytest.mark.parametrize("part", ["whole", "base"])
def test_a_real_graph(folder: Path, part: str) -> None:
    model, exact = (load(folder) if part == "whole" else load(folder).bert for _ in range(2))
    model.to("cuda")
    inputs = {name: value.to("cuda") for name, value in batch().items()}
    wanted = outputs(exact, batch())
    for _ in range(4):
        assert torch.equal(outputs(model, inputs).cpu(), wanted)
