"""Calls as CUDA graphs; without a GPU, as tapes of their operations."""

import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from taped_graph import Tape, tape

from qtool.kernels.triton import graphs
from qtool.kernels.triton.graphs import Graphs


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    return tape(monkeypatch)


def test_a_shape_is_recorded_the_second_time(made: list[Tape]) -> None:
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


def test_a_call_that_fails_is_not_recorded(made: list[Tape]) -> None:
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


def test_one_that_waits_for_the_device_is_called(made: list[Tape]) -> None:
    known = Graphs()

    def waits(x: torch.Tensor) -> torch.Tensor:
        return x * int(x.max())

    assert known.call(waits, {"x": torch.tensor([1, 2])}).tolist() == [2, 4]
    with pytest.warns(UserWarning, match="runs kernel by kernel: CUDA error: operation not permitted"):
        assert known.call(waits, {"x": torch.tensor([1, 3])}).tolist() == [3, 9]
    for size in (2, 3, 3, 3):
        assert known.call(waits, {"x": torch.full((size,), 4)}).tolist() == [16] * size
    assert not made and len(known) == 0


def test_a_shape_that_memory_is_too_small_for_is_called(made: list[Tape]) -> None:
    """And others are recorded all the same."""
    known, tried = Graphs(), []

    def needs(x: torch.Tensor) -> torch.Tensor:
        if Tape.capturing() and len(x) > 2:
            tried.append(len(x))
            raise torch.cuda.OutOfMemoryError("no memory left")
        return x + 1

    for size in (3, 3, 3, 2, 2, 3, 2):
        assert known.call(needs, {"x": torch.zeros(size)}).tolist() == [1] * size
    assert tried == [3]
    assert [one.plays for one in made] == [2]


@pytest.mark.parametrize("hidden", [False, True])
def test_memory_of_a_failed_recording_is_given_back(made: list[Tape], hidden: bool) -> None:
    """It stays in a place while another recording of that place lives. What ends a recording may hide why it failed."""
    known, kept = Graphs(), []

    class Held:
        pass

    def needs(x: torch.Tensor) -> torch.Tensor:
        held = Held()
        kept.append(weakref.ref(held))
        if Tape.capturing() and len(x) > 2:
            try:
                raise torch.cuda.OutOfMemoryError("no memory left")
            finally:
                if hidden:
                    raise RuntimeError("the graph cannot be ended")
        return x + 1

    for size in (2, 2, 3, 3, 2, 2):
        assert known.call(needs, {"x": torch.zeros(size)}).tolist() == [1] * size
    first, second = made
    assert first.place is not second.place and len(known) == 1
    assert not any(held() for held in kept)


def test_recordings_share_a_place_and_are_made_one_at_a_time(made: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process: torch records one graph at a time, and each begins by waiting for the GPU."""
    present, most = [0], [0]

    class Slow(Tape):
        def __init__(self, *given: Any) -> None:
            present[0] += 1
            most[0] = max(most[0], present[0])
            time.sleep(0.1)
            super().__init__(*given)
            present[0] -= 1

    monkeypatch.setattr(graphs, "Recording", Slow)
    models = [Graphs() for _ in range(3)]

    def calls(known: Graphs) -> None:
        for size in (1, 2):
            for _ in range(2):
                known.call(torch.neg, {"input": torch.zeros(size)})

    with ThreadPoolExecutor() as pool:
        list(pool.map(calls, models))
    assert len(made) == 6 and most == [1]
    assert len({id(one.place) for one in made}) == 3


def test_calls_that_are_not_recorded_wait_for_nobody(made: list[Tape]) -> None:
    known, meeting = Graphs(), threading.Barrier(2, timeout=20)

    def meets(x: torch.Tensor) -> torch.Tensor:
        meeting.wait()
        return x + 1

    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda size: known.call(meets, {"x": torch.zeros(size)}).tolist(), (1, 2))
        assert [*found] == [[1], [1, 1]]


HERE = torch.cuda.is_available()


@pytest.mark.skipif(not HERE, reason="no GPU: tapes take their place above")
def test_real_memory_that_is_too_small() -> None:
    """A product needs a workspace of cuBLAS, too, which must not be another graph's."""
    known, weight = Graphs(), torch.randn(256, 256, device="cuda")
    free = torch.cuda.mem_get_info()[0]

    def needs(x: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing() and len(x) > 64:
            x = x + torch.empty(free * 2, dtype=torch.uint8, device="cuda")[:1]
        return x @ weight

    for size in (8, 8, 8, 128, 128, 128, 8, 8, 8):
        x = torch.randn(size, 256, device="cuda")
        torch.testing.assert_close(known.call(needs, {"x": x}), x @ weight)
    assert len(known) == 1
    torch.cuda.empty_cache()


@pytest.mark.skipif(not HERE, reason="no GPU: tapes take their place above")
def test_a_real_device_that_is_waited_for() -> None:
    """And what is random or allocated afterwards is as it was."""
    known = Graphs()

    def waits(x: torch.Tensor) -> torch.Tensor:
        return x * int(x.max())

    assert known.call(waits, {"x": torch.tensor([1, 2], device="cuda")}).tolist() == [2, 4]
    with pytest.warns(UserWarning, match="runs kernel by kernel"):
        assert known.call(waits, {"x": torch.tensor([1, 3], device="cuda")}).tolist() == [3, 9]
    torch.cuda.empty_cache()
    assert torch.randn(8, device="cuda").isfinite().all()


@pytest.mark.skipif(not HERE, reason="no GPU: tapes take their place above")
def test_real_graphs_of_several_threads() -> None:
    weights = [torch.randn(128, 128, device="cuda") for _ in range(4)]

    def calls(weight: torch.Tensor) -> None:
        known = Graphs()
        for size in (4, 4, 4, 8, 8, 8, 4):
            x = torch.randn(size, 128, device="cuda")
            found = known.call(lambda x: x @ weight, {"x": x})
            torch.testing.assert_close(found, x @ weight)
        assert len(known) == 2

    with ThreadPoolExecutor() as pool:
        list(pool.map(calls, weights))


def test_what_is_written_is_written_once_a_call(made: list[Tape]) -> None:
    known, total = Graphs(), torch.zeros(2)

    def adds(x: torch.Tensor) -> torch.Tensor:
        return total.add_(x) * 2

    for count in range(1, 5):
        assert known.call(adds, {"x": torch.ones(2)}).tolist() == [2 * count] * 2
        assert total.tolist() == [count] * 2
    assert made[0].plays == 3


def test_more_shapes_than_graphs_do_not_push_one_another_out(made: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "STALE", 100)
    known = Graphs()
    for _ in range(4):
        for size in range(2 * graphs.KEPT):
            assert len(known.call(torch.neg, {"input": torch.ones(size)})) == size
    assert len(made) == graphs.KEPT == len(known)
    for _ in range(101):  # until nobody has asked for the others in a while
        known.call(torch.neg, {"input": torch.ones(5)})
    known.call(torch.neg, {"input": torch.ones(graphs.KEPT + 1)})
    assert len(made) == graphs.KEPT + 1 and len(known) == graphs.KEPT
    assert made[-1].plays == 1
