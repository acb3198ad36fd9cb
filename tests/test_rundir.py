"""The run directory: one writer, no lost output, and a way on from every step at which a process can be killed."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtool import rundir
from qtool.artifact import write_json
from qtool.errors import InputError, UnavailableError
from qtool.rundir import RunDirectory, beside, check_output, keep_apart, published, recorded

FINGERPRINT = {"model": "m", "data": "d", "threads": 2}


class Killed(BaseException):
    """What a simulated kill raises: nothing may catch it."""


def artifact_at(folder: Path, fingerprint: dict[str, Any], content: str) -> None:
    """As much of an artifact as the run directory looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "content").write_text(content)
    report = {"source": {}, "recipe": {}, "golden": {}, "files": {}, "fingerprint": fingerprint}
    write_json(folder / "qtool.json", report)


def attempt(out: Path, content: str = "new", *, resume: bool = False, overwrite: bool = False) -> None:
    """What `qtool quantize` does with its run directory."""
    check_output(out, resume=resume, overwrite=overwrite)
    run = RunDirectory(out, FINGERPRINT, resume=resume, overwrite=overwrite)
    try:
        if not run.already_published():
            if not run.shard("unit").exists():
                run.shard("unit").write_text(content)
            artifact_at(run.fresh_staging(), FINGERPRINT, run.shard("unit").read_text())
            run.publish()
        run.finish()
    finally:
        run.close()


def left_over(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.iterdir() if path != out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


def test_a_run_leaves_its_output_alone(out: Path) -> None:
    attempt(out)
    assert (out / "content").read_text() == "new"
    assert left_over(out) == []
    assert recorded(out) is None
    assert published(out) == FINGERPRINT


def test_overwrite_moves_the_old_output_aside_and_deletes_it_last(out: Path) -> None:
    artifact_at(out, {"model": "older"}, "old")
    run = RunDirectory(out, FINGERPRINT, resume=False, overwrite=True)
    artifact_at(run.fresh_staging(), FINGERPRINT, "new")
    assert (out / "content").read_text() == "old"
    run.publish()
    assert (out / "content").read_text() == "new"
    assert (beside(out, "old") / "content").read_text() == "old"
    run.finish()
    assert left_over(out) == []


def test_an_empty_folder_is_no_output(out: Path) -> None:
    out.mkdir(parents=True)
    attempt(out)
    assert (out / "content").read_text() == "new"
    assert left_over(out) == []


@pytest.mark.parametrize("resume", [False, True])
def test_publish_refuses_an_output_that_appeared_meanwhile(out: Path, resume: bool) -> None:
    run = RunDirectory(out, FINGERPRINT, resume=resume, overwrite=False)
    artifact_at(run.fresh_staging(), FINGERPRINT, "new")
    artifact_at(out, {"model": "of somebody else"}, "precious")
    with pytest.raises(InputError, match="not empty"):
        run.publish()
    run.close()
    assert (out / "content").read_text() == "precious"


# Steps at which a process may die: each call that changes the disk while a result is put in place and cleaned up after.
STEPS = [
    (os, "rename"),
    (os, "replace"),
    (shutil, "rmtree"),
    (Path, "unlink"),
    (Path, "rmdir"),
    (Path, "mkdir"),
    (Path, "write_text"),
]


class Steps:
    """Counts calls that change the disk, and raises `Killed` instead of (or after) the one with the number `fatal`."""

    def __init__(self, patch: pytest.MonkeyPatch, fatal: int | None, *, before: bool = True) -> None:
        self.count, self.fatal, self.before = 0, fatal, before
        for owner, name in STEPS:
            patch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            number, self.count = self.count, self.count + 1
            if number == self.fatal and self.before:
                raise Killed
            result = call(*args, **kwargs)
            if number == self.fatal:
                raise Killed
            return result

        return counted


def steps_of(out: Path, **options: bool) -> int:
    with pytest.MonkeyPatch.context() as patch:
        steps = Steps(patch, None)
        attempt(out, **options)
    return steps.count


OLD = {"no output": None, "another's": {"model": "older"}, "a damaged one of the same run": FINGERPRINT}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("old", OLD)
def test_a_kill_at_any_step_is_resumable(old: str, before: bool, out: Path) -> None:
    overwrite = OLD[old] is not None

    def prepare() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if overwrite:
            artifact_at(out, OLD[old], "old")

    prepare()
    total = steps_of(out, overwrite=overwrite)
    assert total >= 12
    for fatal in range(total):
        prepare()
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            Steps(patch, fatal, before=before)
            attempt(out, overwrite=overwrite)
        states = [folder / "content" for folder in (out, beside(out, "old"))]
        contents = [state.read_text() for state in states if state.is_file()]
        assert not overwrite or contents, f"nothing readable after a kill at step {fatal}"
        if recorded(out) is None and (not out.is_dir() or published(out) != FINGERPRINT or contents == ["old"]):
            attempt(out, resume=True, overwrite=overwrite)  # killed before anything was recorded: it just starts
        else:
            attempt(out, resume=True)
        assert (out / "content").read_text() == "new", f"after a kill at step {fatal}"
        assert left_over(out) == [], f"after a kill at step {fatal}"


@pytest.mark.parametrize("seed", range(6))
def test_kills_while_resuming_are_resumable(seed: int, out: Path) -> None:
    """Kill every attempt at a later step than the one before, each time after a resume."""
    out.parent.mkdir()
    artifact_at(out, {"model": "older"}, "old")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Steps(patch, 4 + seed)
        attempt(out, overwrite=True)
    for fatal in range(seed, 40):
        try:
            with pytest.MonkeyPatch.context() as patch:
                Steps(patch, fatal, before=fatal % 2 == 0)
                attempt(out, resume=True)
            break
        except Killed:
            continue
    assert (out / "content").read_text() == "new"
    assert left_over(out) == []


def test_a_finished_unit_is_kept_for_resume_and_thrown_away_by_overwrite(out: Path) -> None:
    run = RunDirectory(out, FINGERPRINT, resume=False, overwrite=False)
    run.shard("unit").write_text("first")
    run.close()
    attempt(out, "second", resume=True)
    assert (out / "content").read_text() == "first"
    run = RunDirectory(out, FINGERPRINT, resume=False, overwrite=True)
    run.shard("unit").write_text("third")
    run.close()
    attempt(out, "fourth", overwrite=True)
    assert (out / "content").read_text() == "fourth"


def test_resume_without_a_run_starts_one(out: Path) -> None:
    attempt(out, resume=True)
    assert (out / "content").read_text() == "new"


def test_resume_of_what_is_finished_is_fine(out: Path) -> None:
    attempt(out, "first")
    attempt(out, "second", resume=True)
    assert (out / "content").read_text() == "first"
    assert left_over(out) == []


def test_resume_does_not_touch_the_artifact_of_another_run(out: Path) -> None:
    artifact_at(out, {**FINGERPRINT, "model": "another"}, "precious")
    with pytest.raises(InputError, match="not empty"):
        attempt(out, resume=True)
    assert (out / "content").read_text() == "precious"
    assert left_over(out) == []


def test_overwrite_replaces_even_its_own_result(out: Path) -> None:
    attempt(out, "damaged")
    attempt(out, "repaired", overwrite=True)
    assert (out / "content").read_text() == "repaired"


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"model": "x"}, "model"), ({"threads": 4, "data": "x"}, "data, threads"), ({"seed": 1}, "seed")],
)
def test_resume_with_another_fingerprint_names_what_differs(out: Path, changes: dict[str, Any], named: str) -> None:
    run = RunDirectory(out, FINGERPRINT, resume=False, overwrite=False)
    run.shard("unit").write_text("first")
    run.close()
    with pytest.raises(InputError, match=f"was started with a different {named}; repeat the first command"):
        RunDirectory(out, {**FINGERPRINT, **changes}, resume=True, overwrite=False)
    assert recorded(out) == FINGERPRINT
    attempt(out, resume=True)  # the refusal has neither kept the lock nor lost a unit
    assert (out / "content").read_text() == "first"


@pytest.mark.parametrize("text", ["", "[]", "5", "{}", '{"fingerprint": 5}', '{"overwrite": true}'])
def test_a_damaged_record_is_no_record(out: Path, text: str) -> None:
    beside(out, "run").mkdir(parents=True)
    (beside(out, "run") / "run.json").write_text(text)
    assert recorded(out) is None
    attempt(out, resume=True)
    assert left_over(out) == []


HOLDER = """
import sys
from pathlib import Path
from qtool.rundir import RunDirectory
run = RunDirectory(Path(sys.argv[1]), {"model": "m", "data": "d", "threads": 2}, resume=False, overwrite=False)
run.shard("unit").write_text("theirs")
print("locked", flush=True)
sys.stdin.read()
"""


def test_two_processes_do_not_write_one_output(out: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(out)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=r"another qtool process is writing .*out\.qtool-run"):
                attempt(out, "mine", **options)
        assert (beside(out, "run") / "unit.safetensors").read_text() == "theirs"
    finally:
        holder.kill()
        holder.communicate()
    attempt(out, "mine", resume=True)  # the lock went with its process
    assert (out / "content").read_text() == "theirs"


def test_many_threads_publish_once(out: Path) -> None:
    """Lock files are made and removed under everybody's hands; who gets through finds things whole."""
    outcomes: list[str] = []

    def work(number: int) -> None:
        try:
            attempt(out, str(number), resume=True)
            outcomes.append("done")
        except InputError as error:
            outcomes.append("locked" if "another qtool process" in str(error) else str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) <= {"done", "locked"}
    assert "done" in outcomes
    assert (out / "content").is_file()
    assert left_over(out) == []


def test_a_folder_removed_while_it_is_made(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mkdir finds the owner's folder, and looks whether it is one when the owner has removed it."""
    make, calls = Path.mkdir, 0

    def late(self: Path, *args: Any, **options: Any) -> None:
        nonlocal calls
        calls += self == beside(out, "run")
        if self == beside(out, "run") and calls == 1:
            raise FileExistsError(17, "File exists", str(self))
        make(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    attempt(out, "1", resume=True)
    assert calls > 1 and (out / "content").is_file()


def test_a_lock_on_a_removed_file_is_no_lock(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner finishes, and removes file and folder, between our opening the file and our locking it."""
    flock, calls = fcntl.flock, 0

    def late(stream: Any, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            shutil.rmtree(beside(out, "run"))
        flock(stream, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    run = RunDirectory(out, FINGERPRINT, resume=False, overwrite=False)
    assert calls == 2
    with pytest.raises(InputError, match="another qtool process"):
        RunDirectory(out, FINGERPRINT, resume=True, overwrite=False)
    run.close()


def test_check_output_refuses_before_any_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out.parent.mkdir()
    check_output(out, resume=False, overwrite=False)
    check_output(out / "deep" / "er", resume=False, overwrite=False)
    out.write_text("a file")
    for options in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with pytest.raises(InputError, match="out is not a folder"):
            check_output(out, **options)
        with pytest.raises(InputError, match="out is a file, not a folder"):
            check_output(out / "below", **options)
    out.unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UnavailableError, match=r"no permission to write in .*place; choose another -o"):
        check_output(out, resume=False, overwrite=False)


def test_check_output_wants_a_choice(out: Path) -> None:
    out.mkdir(parents=True)
    check_output(out, resume=False, overwrite=False)
    (out / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match="out is not empty; choose another -o or pass --overwrite"):
            check_output(out, resume=resume, overwrite=False)
    with pytest.raises(InputError, match=r"holds something else than a model that qtool made"):
        check_output(out, resume=False, overwrite=True)
    shutil.rmtree(out)
    RunDirectory(out, FINGERPRINT, resume=False, overwrite=False).close()
    with pytest.raises(InputError, match="holds an unfinished run; continue it with --resume or start again"):
        check_output(out, resume=False, overwrite=False)
    check_output(out, resume=True, overwrite=False)
    check_output(out, resume=False, overwrite=True)


@pytest.mark.parametrize("place", ["/proc/qtool-test/out", "/dev/null/out"])
def test_a_place_where_no_folder_can_be_made(place: str) -> None:
    with pytest.raises(UnavailableError, match="choose another place with -o"):
        RunDirectory(Path(place), FINGERPRINT, resume=False, overwrite=False)


def test_a_record_is_plain_json(out: Path) -> None:
    run = RunDirectory(out, FINGERPRINT, resume=False, overwrite=True)
    record = json.loads((beside(out, "run") / "run.json").read_text())
    assert record == {"fingerprint": FINGERPRINT, "overwrite": True, "publishing": False}
    run.close()
    assert rundir.recorded(out) == FINGERPRINT


def test_inputs_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "models" / "float").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models")
    source = tmp_path / "models" / "float"
    for out in (source, source.parent, tmp_path / "link", tmp_path / "link" / "float"):
        with pytest.raises(InputError, match="which the run reads; choose another -o"):
            keep_apart(out, tmp_path / "elsewhere", source)
    keep_apart(source / "int8", source)
    keep_apart(tmp_path / "models" / "float-int8", source)


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\udcff"])
def test_names_that_no_folder_should_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no usable name for an output"):
        check_output(tmp_path / name, resume=False, overwrite=False)


def test_a_dangling_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a folder"):
        check_output(tmp_path / "out", resume=False, overwrite=False)


def test_a_run_without_a_finished_unit_is_discarded(out: Path) -> None:
    run = RunDirectory(out, FINGERPRINT, resume=False, overwrite=False)
    run.discard_if_empty()
    assert not run.path.exists()
    run = RunDirectory(out, FINGERPRINT, resume=False, overwrite=False)
    run.shard("unit").write_text("first")
    run.discard_if_empty()
    run.close()
    assert recorded(out) == FINGERPRINT
