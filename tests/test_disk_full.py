"""A disk that fills up while a model is written: exit 4, one line, nothing half-written, and `--resume` finishes it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from limits import largest_file

Command = Callable[..., Any]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def arguments(tiny: Any, out: str) -> tuple[str, ...]:
    data = ("--task", "sst2", "--data", str(tiny.data))
    return ("quantize", str(tiny.model), "-c", "zeroquant-w8a8-static", *data, "-o", out, "-q")


@pytest.fixture
def whole(tiny: Any, desk: Path, qtool_command: Command) -> dict[str, bytes]:
    """What an undisturbed run leaves."""
    ended = qtool_command(*arguments(tiny, "whole"))
    assert ended.code == 0, ended.err
    return files(Path("whole"))


def fails_then_resumes(tiny: Any, command: Command, out: Path, limit: int, whole: dict[str, bytes]) -> None:
    with largest_file(limit):
        ended = command(*arguments(tiny, str(out)))
    assert (ended.code, len(ended.err.splitlines())) == (4, 1), (limit, ended.err)
    assert "File too large" in ended.errors[0] and "free" in ended.errors[0], limit
    assert not out.exists(), limit
    assert not list(Path().rglob("*.part")), limit
    ended = command(*arguments(tiny, str(out)), "--resume")
    assert ended.code == 0, (limit, ended.err)
    assert files(out) == whole, limit
    assert not Path(f"{out}.qtool-run").exists()


@pytest.mark.parametrize("what", ["nothing", "shard", "model.safetensors"])
def test_a_write_that_fails(what: str, tiny: Any, desk: Path, whole: dict[str, bytes], qtool_command: Command) -> None:
    limit = {"nothing": 0, "shard": 5000, "model.safetensors": len(whole["model.safetensors"]) - 1}[what]
    fails_then_resumes(tiny, qtool_command, Path("out"), limit, whole)


@pytest.mark.slow
def test_every_write_may_be_the_one_that_fails(
    tiny: Any, desk: Path, whole: dict[str, bytes], qtool_command: Command
) -> None:
    """Limits from nothing up to a byte below the largest file."""
    sizes = {len(content) - 1 for content in whole.values() if content}
    for limit in sorted({0, 100, 1000, 5000, 10000, 15000, *sizes}):
        fails_then_resumes(tiny, qtool_command, Path(f"out{limit}"), limit, whole)


def test_the_old_output_outlives_a_failed_overwrite(
    tiny: Any, desk: Path, whole: dict[str, bytes], qtool_command: Command
) -> None:
    with largest_file(len(whole["model.safetensors"]) - 1):
        ended = qtool_command(*arguments(tiny, "whole"), "--overwrite", "--seed", "3")
    assert (ended.code, len(ended.errors)) == (4, 1)
    assert files(Path("whole")) == whole


def test_other_files_appear_whole_or_not_at_all(
    tiny: Any, desk: Path, whole: dict[str, bytes], qtool_command: Command
) -> None:
    """Statistics, predictions and JSON; what is at their place stays."""
    Path("p.jsonl").write_text("old")
    data = ("--task", "sst2", "--data", tiny.data)
    commands = {
        "s": ("calibrate", tiny.model, "-c", "zeroquant-w8a8-static", *data, "-o", "s"),
        "p.jsonl": ("eval", "whole", *data, "--predictions", "p.jsonl"),
        "j.json": ("inspect", "whole", "--json", "j.json"),
    }
    before = files(Path())
    for name, command in commands.items():
        with largest_file(100):
            ended = qtool_command(*command)
        assert (ended.code, len(ended.errors)) == (4, 1), (name, ended.err)
        assert name in ended.errors[0]
        assert files(Path()) == before, name


SCRIPT = """
set -u
mount -t tmpfs -o size=$SIZE tmpfs "$PLACE" && touch "$PLACE/mounted" || exit 77
cd "$PLACE"
"$@" -o out >/dev/null; echo $? >"$RESULT/code"
ls >"$RESULT/left"
mount -o remount,size=100m "$PLACE" || exit 77
"$@" -o out --resume >/dev/null || exit 1
cp -r out "$RESULT/out"
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", ["48k", "80k"])
def test_a_small_file_system(size: str, tiny: Any, tmp_path: Path, whole: dict[str, bytes]) -> None:
    """A tmpfs in a mount namespace of its own, and qtool as users start it; then the disk grows."""
    place, result = tmp_path / "place", tmp_path / "result"
    place.mkdir()
    result.mkdir()
    command = [sys.executable, "-m", "qtool", *arguments(tiny, "out")]
    at = command.index("-o")
    del command[at : at + 2]
    environment = {**os.environ, "SIZE": size, "PLACE": str(place), "RESULT": str(result)}
    unshare = shutil.which("unshare") or pytest.skip("no unshare on this machine")
    shell = [unshare, "-rm", "sh", "-c", SCRIPT, "sh", *command]
    ended = subprocess.run(shell, env=environment, capture_output=True, text=True, check=False)
    if not (result / "code").exists():
        pytest.skip(f"this machine lets nobody mount a tmpfs: {ended.stderr.strip()}")
    assert ended.returncode == 0, ended.stderr
    assert (result / "code").read_text() == "4\n", ended.stderr
    (said,) = ended.stderr.splitlines()
    assert said.startswith("qtool: ") and "No space left on device" in said
    assert set((result / "left").read_text().split()) <= {"mounted", "out.qtool-run"}
    assert files(result / "out") == whole
