"""Statistics on disk: what is written is read, and never used for something else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qtool.artifact import write_tensors
from qtool.calibrate.statistics import Statistics
from qtool.errors import InputError

Command = Callable[..., Any]

names = st.text("abc._0", min_size=1, max_size=8)
states = st.dictionaries(
    st.tuples(names, st.sampled_from(["minmax", "histogram"])),
    st.dictionaries(names, st.floats(width=32, allow_nan=False).map(torch.tensor), min_size=1, max_size=3),
    max_size=5,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(states, st.dictionaries(st.text(min_size=1, max_size=5), json_values, max_size=4))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, states: dict[Any, Any], fingerprint: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    write_tensors(path, Statistics(states, fingerprint).tensors())
    found = Statistics.read(path)
    assert found.fingerprint == fingerprint
    assert found.states == states


def test_a_state_that_is_not_there() -> None:
    found = Statistics({("a", "minmax"): {"max": torch.tensor(1.0)}}, {})
    assert found.state("a", "minmax")["max"].item() == 1.0
    with pytest.raises(InputError, match="no 'minmax' values of b; calibrate again"):
        found.state("b", "minmax")


def test_files_that_are_no_statistics(tmp_path: Path, tiny: Any) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(InputError, match=r"s\.safetensors cannot be read"):
        Statistics.read(path)
    path.write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match=r"s\.safetensors cannot be read"):
        Statistics.read(path)
    with pytest.raises(InputError, match="is not a statistics file of qtool"):
        Statistics.read(tiny.model / "model.safetensors")
    for name, fingerprint in (("a|b", b"{}"), ("a", b"{}"), ("a|b|c|d", b"{}"), ("a|b|c", b"{"), ("a|b|c", b"[]")):
        data = torch.frombuffer(bytearray(fingerprint), dtype=torch.uint8)
        save_file({name: torch.zeros(1), "fingerprint": data}, path)
        with pytest.raises(InputError, match="is not a statistics file of qtool"):
            Statistics.read(path)


def test_require_names_everything_that_differs() -> None:
    found = Statistics({}, {"model": "m", "data": "d", "observers": "o"})
    found.require({"model": "m", "data": "d", "observers": "o"}, "file")
    with pytest.raises(InputError, match="file was made with a different data, model; calibrate again"):
        found.require({"model": "x", "data": "x", "observers": "o"}, "file")


STATIC = ("-c", "zeroquant-w8a8-static")
DECIDING = ("model.safetensors", "config.json")


def made(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in DECIDING}


@pytest.fixture
def calibrated(desk: Path, tiny: Any, qtool_command: Command) -> Path:
    """A statistics file for the tiny model, the training split of its data and the static preset."""
    task = ("--task", "sst2", "--data", tiny.data)
    ended = qtool_command("calibrate", tiny.model, *STATIC, *task, "-o", "s.safetensors")
    assert ended.code == 0, ended.err
    assert "s.safetensors: statistics of 12 activations" in ended.out
    return desk / "s.safetensors"


def test_statistics_give_the_same_bytes_as_a_pass_over_the_data(
    calibrated: Path, tiny: Any, qtool_command: Command
) -> None:
    common = ("quantize", tiny.model, *STATIC, "--task", "sst2", "--data", tiny.data)
    assert qtool_command(*common, "-o", "alone").code == 0
    ended = qtool_command(*common, "-o", "with", "--statistics", calibrated)
    assert ended.code == 0, ended.err
    assert "calibrate" not in ended.err
    assert made(Path("alone")) == made(Path("with"))


def test_the_numbers_of_the_file_are_used(calibrated: Path, tiny: Any, qtool_command: Command) -> None:
    tensors = load_file(calibrated)
    doubled = {name: value * 2 if name.endswith(("min", "max")) else value for name, value in tensors.items()}
    save_file(doubled, "doubled.safetensors")
    common = ("quantize", tiny.model, *STATIC, "--task", "sst2", "--data", tiny.data)
    assert qtool_command(*common, "-o", "one", "--statistics", calibrated).code == 0
    assert qtool_command(*common, "-o", "two", "--statistics", "doubled.safetensors").code == 0
    one, two = (load_file(Path(name) / "model.safetensors") for name in ("one", "two"))
    scales = [name for name in one if name.endswith("act_scale")]
    assert len(scales) == 12
    for name in scales:
        torch.testing.assert_close(two[name], 2 * one[name])


def test_one_file_serves_recipes_that_differ_in_rounding_only(
    calibrated: Path, tiny: Any, qtool_command: Command
) -> None:
    common = ("quantize", tiny.model, *STATIC, "--task", "sst2", "--data", tiny.data, "--statistics", calibrated)
    assert qtool_command(*common, "-o", "a", "--set", "weights.group_size=16").code == 0
    assert qtool_command(*common, "-o", "b", "--set", "weights.num_bits=6").code == 0


def test_statistics_of_something_else_are_refused(
    calibrated: Path, tiny: Any, shelf: Any, tmp_path: Path, qtool_command: Command
) -> None:
    def refused(model: Path, data: Path, *more: str) -> str:
        common = ("--task", "sst2", "--data", data, "-o", "out", "--statistics", calibrated)
        ended = qtool_command("quantize", model, *STATIC, *common, *more)
        assert ended.code == 3
        assert not Path("out").exists()
        assert not Path("out.qtool-run").exists()
        (line,) = ended.errors
        return str(line)

    other = shelf.make("another", seed=9, labels=("negative", "positive"))
    assert "was made with a different model;" in refused(other, tiny.data)
    shelf.write("other-data/train.jsonl", shelf.sentences(60, seed=8), [0] * 60)
    assert "was made with a different data;" in refused(tiny.model, shelf.folder / "other-data")
    assert "was made with a different data, model;" in refused(other, shelf.folder / "other-data")
    assert "was made with a different observers;" in refused(tiny.model, tiny.data, "--set", "rules={'*.query': float}")


def test_calibrate_refuses_what_it_cannot_do(calibrated: Path, tiny: Any, qtool_command: Command) -> None:
    before = calibrated.read_bytes()
    ended = qtool_command("calibrate", tiny.model, *STATIC, "-o", calibrated)
    assert (ended.code, len(ended.errors)) == (3, 1)
    assert "exists; choose another -o or pass --overwrite" in ended.errors[0]
    assert calibrated.read_bytes() == before
    ended = qtool_command("calibrate", tiny.model, *STATIC, "-o", calibrated, "--overwrite")
    assert ended.code == 0
    assert calibrated.read_bytes() != before
    ended = qtool_command("calibrate", tiny.model, "--method", "zeroquant", "-o", "t.safetensors")
    assert ended.code == 3
    assert "needs no statistics with this recipe" in ended.errors[0]
    ended = qtool_command("calibrate", tiny.model, *STATIC, "-o", "absent/t.safetensors")
    assert ended.code == 3
    assert "absent does not exist" in ended.errors[0]


def test_the_fingerprint_is_readable(calibrated: Path) -> None:
    data = load_file(calibrated)["fingerprint"]
    assert set(json.loads(bytes(data.tolist()))) == {"model", "data", "observers"}
