"""Observers against brute force, and that padding never reaches one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from qtool import pipeline
from qtool.api import calibration_batches, open_job, resolve_recipe
from qtool.calibrate.observers import OBSERVERS, MinMax, Sample
from qtool.calibrate.sources import Batches
from qtool.errors import InputError

batches = st.lists(
    npst.arrays(np.float32, st.tuples(st.integers(0, 5), st.just(3)), elements=st.floats(-(2**99), 2**99, width=32)),
    min_size=1,
    max_size=6,
)


@given(batches.filter(lambda found: any(len(batch) for batch in found)), st.data())
def test_minmax_is_brute_force_and_streams_equal_the_whole(found: list[Any], data: st.DataObject) -> None:
    whole = np.concatenate(found)
    expected = (whole.min(), whole.max(), len(whole))
    streamed, at_once, cut = MinMax(), MinMax(), MinMax()
    for batch in found:
        streamed.update(torch.from_numpy(batch))
    at_once.update(torch.from_numpy(whole))
    edge = data.draw(st.integers(0, len(whole)))
    for part in (whole[:edge], whole[edge:]):
        cut.update(torch.from_numpy(part))
    for observer in (streamed, at_once, cut):
        state = observer.state()
        assert (state["min"].item(), state["max"].item(), state["tokens"].item()) == expected
        assert state["min"].dtype == state["max"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_minmax_of_other_float_types(dtype: torch.dtype) -> None:
    observer = MinMax()
    observer.update(torch.tensor([[-2.5, 0.25], [7.0, 1.0]], dtype=dtype))
    state = observer.state()
    assert (state["min"].item(), state["max"].item(), state["tokens"].item()) == (-2.5, 7.0, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    observer = MinMax()
    observer.update(torch.ones(2, 2))
    with pytest.raises(InputError, match="NaN or infinity on the calibration data"):
        observer.update(torch.tensor([[1.0, value]]))


def test_an_observer_that_saw_nothing_says_so() -> None:
    observer = MinMax()
    observer.update(torch.empty(0, 4))
    with pytest.raises(InputError, match="saw no token"):
        observer.state()


def test_states_do_not_grow_with_the_data() -> None:
    for make in OBSERVERS.values():
        small, large = make(), make()
        for observer, batches in ((small, 10), (large, 50)):
            for _ in range(batches):
                observer.update(torch.randn(64, 8))
        sizes = [sum(value.numel() for value in observer.state().values()) for observer in (small, large)]
        assert sizes[1] <= max(sizes[0], 8 * Sample.SIZE + 1)


def extreme_padding(model: Any) -> None:
    """Padded positions, and only they, get the largest value that a LayerNorm can put out: sqrt(hidden − 1)."""
    table = model.base_model.embeddings.word_embeddings.weight
    table[0] = 0
    table[0, 0] = 1e4


def inputs_of(folder: Path, found: Batches, paths: list[str]) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
    """What hooks on the whole float model see at the inputs of `paths`: (values, mask of real tokens) a batch."""
    architecture = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, architecture).from_pretrained(folder).eval()
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {path: [] for path in paths}
    for batch in found.batches:
        mask = batch["attention_mask"].bool()
        hooks = [
            model.get_submodule(path).register_forward_pre_hook(
                lambda module, args, path=path, mask=mask: seen[path].append((args[0], mask))
            )
            for path in paths
        ]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_padding_is_never_observed(architecture: str, zoo: Any) -> None:
    folder = zoo.make("padded", architecture, change=extreme_padding)
    texts = zoo.folder / "texts.txt"
    texts.write_text("\n".join(zoo.sentences(21)))
    sets = [f"calibration.source={texts}", "calibration.batch_size=4"]
    job = open_job(str(folder), resolve_recipe(config="zeroquant-w8a8-static", sets=sets))
    found = calibration_batches(job)
    assert any((batch["attention_mask"] == 0).any() for batch in found.batches)
    statistics = drained(pipeline.calibrate(job, found))
    seen = inputs_of(folder, found, [path for path, _ in statistics.states])
    extreme = 0
    for (path, observer), state in statistics.states.items():
        assert observer == "minmax"
        real = torch.cat([values[mask] for values, mask in seen[path]])
        everything = torch.cat([values.flatten(0, 1) for values, _ in seen[path]])
        torch.testing.assert_close(state["min"], real.min(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state["max"], real.max(), rtol=1e-5, atol=1e-6)
        assert state["tokens"].item() == len(real) == found.num_tokens
        extreme += int(everything.abs().max() > 1.2 * real.abs().max())
    assert extreme, "no activation at padding was extreme, so nothing was shown"
    assert len(statistics.states) == 12


def drained(events: Any) -> Any:
    """The result of a generator of events."""
    while True:
        try:
            next(events)
        except StopIteration as done:
            return done.value


def test_calibration_does_not_depend_on_the_batches(zoo: Any) -> None:
    folder = zoo.make("model")
    texts = zoo.folder / "texts.txt"
    texts.write_text("\n".join(zoo.sentences(17)))
    states = []
    for size in (1, 5, 32):
        sets = [f"calibration.source={texts}", f"calibration.batch_size={size}"]
        job = open_job(str(folder), resolve_recipe(config="zeroquant-w8a8-static", sets=sets))
        states.append(drained(pipeline.calibrate(job, calibration_batches(job))).states)
    for key, state in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[key]["min"], state["min"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(other[key]["max"], state["max"], rtol=1e-5, atol=1e-6)
            assert other[key]["tokens"] == state["tokens"]


def test_a_model_that_computes_nan_is_refused(zoo: Any) -> None:
    def explode(model: Any) -> None:
        model.base_model.encoder.layer[0].output.LayerNorm.weight.fill_(3e38)

    folder = zoo.make("exploding", change=explode)
    job = open_job(str(folder), resolve_recipe(config="zeroquant-w8a8-static", sets=["calibration.source=random"]))
    with pytest.raises(InputError, match="NaN or infinity on the calibration data"):
        drained(pipeline.calibrate(job, calibration_batches(job)))
