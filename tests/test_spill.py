"""Hidden states on disk: the same values, mapped, and gone with their list."""

from pathlib import Path

import pytest
import torch
from limits import largest_file

from qtool.errors import UnavailableError
from qtool.spill import SpilledStates, State
from qtool.stream import Call


def state(seed: int, rows: int = 64) -> State:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, rows, 96, generator=draw)
    mask = torch.rand(4, 1, 256, 256, generator=draw) > 0.5
    angles = (torch.randn(1, 512, 64, generator=draw), torch.randn(1, 512, 64, generator=draw).double())
    shared = {"attention_mask": mask, "position_embeddings": angles, "layer": 3, "cache": None}
    return hidden, tuple(Call((mask, "word"), dict(shared), "hidden_states") for _ in range(3))


def equal(one: State, other: State) -> bool:
    def same(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, tuple | list) and isinstance(b, tuple | list):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
        return a == b

    return same([one[0], *map(vars, one[1])], [other[0], *map(vars, other[1])])


def anonymous_parts(tensor: torch.Tensor) -> bool:
    """Whether a tensor's first byte is in memory of no file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        words = line.split()
        first, last = (int(end, 16) for end in words[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return len(words) < 6 or not words[5].startswith("/")
    raise AssertionError("nowhere")


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    kept, plain = SpilledStates(tmp_path), [state(seed) for seed in range(4)]
    for each in plain:
        kept.append(each)
    assert len(kept) == 4 and all(map(equal, kept, plain))
    assert not any(anonymous_parts(hidden) for hidden, _ in kept)
    assert not anonymous_parts(kept[0][1][0].kwargs["attention_mask"])
    assert kept[0][1][0].kwargs["attention_mask"] is kept[0][1][2].args[0], "shared masks are written once"


def test_the_next_blocks_states_replace_the_last_ones(tmp_path: Path) -> None:
    """Calls that were read from the list are not written again; others are."""
    kept = SpilledStates(tmp_path)
    kept.append(state(0))
    calls = kept[0][1]
    kept[0] = (state(1)[0], calls)
    assert equal(kept[0], (state(1)[0], state(0)[1])) and kept[0][1] is calls
    kept[0] = state(2)
    assert equal(kept[0], state(2))
    del kept[0]
    assert len(kept) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.int64])
def test_any_dtype_stride_and_size(tmp_path: Path, dtype: torch.dtype) -> None:
    for shape in ((300, 500), (3, 2), (0, 5)):
        value = torch.arange(shape[0] * shape[1]).view(shape).to(dtype).t()
        kept = SpilledStates(tmp_path)
        kept.append((value, ()))
        assert torch.equal(kept[0][0], value) and kept[0][0].dtype == dtype


def test_what_is_computed_in_inference_mode_can_be_kept(tmp_path: Path) -> None:
    kept = SpilledStates(tmp_path)
    with torch.inference_mode():
        kept.append((torch.ones(100, 1000) * 2, ()))
    assert float(kept[0][0].sum()) == 200_000


def test_files_have_no_names_that_could_be_left_behind(tmp_path: Path) -> None:
    kept = SpilledStates(tmp_path)
    kept.append(state(0))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    kept = SpilledStates(tmp_path)
    with largest_file(4096), pytest.raises(UnavailableError, match=r"cannot write .*: File too large; free some space"):
        kept.append(state(0))
    assert len(kept) == 0 and list(tmp_path.iterdir()) == []
