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
from qtool.calibrate.observers import (
    OBSERVERS,
    AttentionHistogram,
    Channels,
    Histogram,
    MinMax,
    Observer,
    Sample,
    State,
    TokenPeaks,
)
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


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value: float, name: str) -> None:
    for before in ([], [torch.ones(2, 2)]):
        observer = OBSERVERS[name]()
        for rows in before:
            observer.update(rows)
        with pytest.raises(InputError, match="NaN or infinity on the calibration data"):
            observer.update(torch.tensor([[1.0, 2.0], [1.0, value]]))


@pytest.mark.parametrize("name", OBSERVERS)
def test_an_observer_that_saw_nothing_says_so(name: str) -> None:
    observer = OBSERVERS[name]()
    with pytest.raises(InputError, match="saw no token"):
        observer.state()
    observer.update(torch.empty(0, 4))
    with pytest.raises(InputError, match="saw no token"):
        observer.state()


def test_states_do_not_grow_with_the_data() -> None:
    for make in OBSERVERS.values():
        small, large = make(), make()
        for observer, batches in ((small, 10), (large, 50)):
            for _ in range(batches):
                observer.update(torch.randn(64, 8, 4) if issubclass(make, AttentionHistogram) else torch.randn(64, 8))
        sizes = [sum(value.numel() for value in observer.state().values()) for observer in (small, large)]
        assert sizes[1] <= max(sizes[0], 8 * Sample.SIZE + 1)


def cuts(whole: Any, data: st.DataObject) -> list[torch.Tensor]:
    """`whole` as batches, some of them empty."""
    edges = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=5)))
    return [torch.from_numpy(part) for part in np.split(whole, edges)]


def seen(observer: Observer, parts: list[torch.Tensor]) -> State:
    for part in parts:
        observer.update(part)
    return observer.state()


magnitudes = st.sampled_from([0.0, 1e-42, 1e-30, 0.1, 0.5, 1.0, 1.5, 3.0, 7.0, 500.0, 2.0**40, 3e38])
wide = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 30), st.just(3)),
    elements=st.tuples(magnitudes, st.sampled_from([-1, 1])).map(lambda pair: np.float32(pair[0] * pair[1]))
    | st.floats(-10, 10, width=32),
)


@given(wide, st.data())
def test_channels_are_brute_force_whatever_the_batches(whole: Any, data: st.DataObject) -> None:
    state = seen(Channels(), cuts(whole, data))
    np.testing.assert_array_equal(state["min"].numpy(), whole.min(0))
    np.testing.assert_array_equal(state["max"].numpy(), whole.max(0))
    exact = whole.astype(np.float64)
    np.testing.assert_allclose(state["mean"].numpy(), exact.mean(0), rtol=1e-12, atol=1e-13 * np.abs(exact).max())
    assert state["tokens"].item() == len(whole)
    assert [state[name].dtype for name in ("min", "max", "mean")] == [torch.float32, torch.float32, torch.float64]


@given(wide, st.data(), st.randoms(use_true_random=False))
def test_histograms_count_exactly_whatever_the_batches_and_their_order(
    whole: Any, data: st.DataObject, draw: Any
) -> None:
    parts = cuts(whole, data)
    draw.shuffle(parts)
    state = seen(Histogram(), parts)
    assert state["counts"].shape == (3, Histogram.BINS) and state["counts"].dtype == torch.int64
    assert state["tokens"].item() == len(whole)
    for channel, (counts, width) in enumerate(zip(state["counts"].numpy(), state["width"].numpy(), strict=True)):
        values = np.abs(whole[:, channel].astype(np.float64))
        edges = np.arange(Histogram.BINS + 1) * np.float64(width)
        # numpy takes the last edge into the last bin; no value lies there.
        assert (values < edges[-1]).all() or not values.any()
        np.testing.assert_array_equal(counts, np.histogram(values, edges)[0])
        assert np.frexp(width)[0] == 0.5, "a power of two"
        # No wider than needed: the largest value is in the upper half of the range, if it is no tiny number.
        assert values.max() >= edges[-1] / 2 or values.max() < 2.0**-125


def test_histograms_widen_by_powers_of_two_in_a_place_of_fixed_size() -> None:
    observer = Histogram()
    reached = []
    for peak in (0.75, 0.75, 0.8, 1.0, 3.0, 100.0, 0.1):
        observer.update(torch.tensor([[peak, 0.0]]))
        reached.append((observer.state()["width"] * Histogram.BINS).tolist()[0])
        assert observer.state()["counts"].shape == (2, 512)
    assert reached == [1.0, 1.0, 1.0, 2.0, 4.0, 128.0, 128.0]
    counts = observer.state()["counts"]
    assert counts[0].nonzero().flatten().tolist() == [0, 3, 4, 12, 400]  # in steps of a quarter
    assert counts[0].sum() == counts[1].sum() == 7
    assert counts[1, 0] == 7, "a channel that is always zero"


@given(wide, st.data())
def test_token_peaks_are_a_histogram_of_the_largest_of_each_token(whole: Any, data: st.DataObject) -> None:
    state = seen(TokenPeaks(), cuts(whole, data))
    largest = np.abs(whole.astype(np.float64)).max(1)
    (counts,), (width,) = state["counts"].numpy(), state["width"].numpy()
    np.testing.assert_array_equal(counts, np.histogram(largest, np.arange(513) * np.float64(width))[0])
    assert state["tokens"].item() == counts.sum() == len(whole)


@given(st.integers(1, 5000), st.data())
def test_samples_are_even_subsets_in_order(tokens: int, data: st.DataObject) -> None:
    """Every n-th token from the first on, n the least power of two that leaves no more than `SIZE`."""
    whole = np.arange(2 * tokens, dtype=np.float32).reshape(tokens, 2)
    states = [seen(Sample(), cuts(whole, data)) for _ in range(2)]
    stride = 1
    while -(-tokens // stride) > Sample.SIZE:
        stride *= 2
    for state in states:
        assert len(state["rows"]) <= Sample.SIZE
        np.testing.assert_array_equal(state["rows"].numpy(), whole[::stride])
        assert state["tokens"].item() == tokens


def test_a_sample_is_a_copy() -> None:
    rows = torch.ones(4, 2)
    observer = Sample()
    observer.update(rows)
    rows.zero_()
    assert observer.state()["rows"].tolist() == [[1.0, 1.0]] * 4


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
