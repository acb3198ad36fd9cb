"""Commands on two ranks: the same bytes and the same scores as on one, and one clear end when a rank fails or dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from qtool import cli, console
from qtool.api.scores import kept_results
from qtool.cli import together
from qtool.errors import JOBS_PARENT, RESUMABLE, InputError, InterruptedRun, UsageError, tells_failure
from qtool.evaluation.result import check_predictions_path
from qtool.ranks import Ranks
from qtool.rundir import beside

Command = Callable[..., Any]
LEARNING = ("-c", "zeroquant-w8a8", "--set", "methods.zeroquant.lkd=true")


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(x) for key, x in value.items() if key not in ("seconds", "speed_ratio")}
    return [without_times(x) for x in value] if isinstance(value, list) else value


def read(file: str) -> Any:
    return without_times(json.loads(Path(file).read_text("utf-8")))


def made(folder: str) -> tuple[bytes, bytes]:
    return tuple((Path(folder) / name).read_bytes() for name in ("model.safetensors", "config.json"))  # type: ignore[return-value]


def data_of(tiny: Any) -> tuple[str, ...]:
    return ("--task", "sst2", "--data", str(tiny.data), "--batch-size", "8", "--threads", "1")


def learned(tiny: Any, out: str, *more: str, steps: int = 4) -> tuple[str, ...]:
    count = ("--set", f"methods.zeroquant.lkd.steps={steps}", "--num-samples", "60")
    return ("quantize", str(tiny.model), *LEARNING, *count, *data_of(tiny), "-o", out, *more)


class Agents:
    """Two torchrun agents, each as it runs on a host of its own, that meet on the loopback."""

    def __init__(self, arguments: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{free.getsockname()[1]}"
        launch = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", place)
        command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "qtool", *arguments]
        self.hosts = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
        ]

    def ends(self) -> list[tuple[int, str, str]]:
        """Of each its exit code, stdout and stderr."""
        try:
            return [(host.wait(200), *host.communicate()) for host in self.hosts]
        finally:
            for host in self.hosts:
                host.kill()


def test_two_hosts_teach_the_blocks_of_a_model(tiny: Any, desk: Path, qtool_command: Command) -> None:
    assert qtool_command(*learned(tiny, "one")).code == 0
    ends = Agents(learned(tiny, "two")).ends()
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert made("one") == made("two")
    said = [out for _, out, _ in ends if out]
    assert len(said) == 1 and "two: " in said[0]  # one rank speaks
    figures = [json.loads((Path(name) / "qtool.json").read_text("utf-8"))["figures"] for name in ("one", "two")]
    assert figures[0] == figures[1] and any("lkd_after" in found for found in figures[0].values())


def test_two_ranks_score_together(tiny: Any, desk: Path, qtool_command: Command) -> None:
    asked = ("eval", tiny.model, *data_of(tiny), "--baseline", tiny.model, "--allow-weak-baseline")
    for name, more in (("one", ()), ("two", ("--jobs", "2"))):
        ended = qtool_command(*asked, "--json", f"{name}.json", "--predictions", f"{name}.jsonl", *more)
        assert ended.code == 0, ended.err
    assert read("one.json") == read("two.json")
    assert Path("one.jsonl").read_bytes() == Path("two.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--max-memory", "1GB")])
def test_two_ranks_calibrate_together(tiny: Any, desk: Path, qtool_command: Command, options: tuple[str, ...]) -> None:
    for name, more in (("one", ()), ("two", ("--jobs", "2"))):
        asked = ("calibrate", tiny.model, "--method", "ibert", *data_of(tiny), "-o", name, *options)
        assert qtool_command(*asked, *more).code == 0
    assert Path("one").read_bytes() == Path("two").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [("--method", "ibert"), ("-c", "zeroquant-w8a8-static")])
def test_every_kind_of_recipe(tiny: Any, desk: Path, qtool_command: Command, recipe: tuple[str, ...]) -> None:
    """Blocks that build on each other, and blocks that are lowered by statistics alone."""
    for name, more in (("one", ()), ("two", ("--jobs", "2"))):
        ended = qtool_command("quantize", tiny.model, *recipe, *data_of(tiny), "-o", name, *more)
        assert ended.code == 0, ended.err
    assert made("one") == made("two")


@pytest.mark.slow
def test_two_ranks_study_together(tiny: Any, desk: Path, qtool_command: Command) -> None:
    for name, more in (("one", ()), ("two", ("--jobs", "2"))):
        attention = ("--thresholds", "0.01,0.1", "--bits", "3", "--allow-weak-baseline", "-o", name)
        ended = qtool_command("analyze", "attention", tiny.model, *data_of(tiny), *attention, *more)
        assert ended.code == 0, ended.err
        heads = ("--metric", "agreement", "--max-evaluations", "6", "-o", f"{name}-heads")
        ended = qtool_command("analyze", "heads", tiny.model, *data_of(tiny), *heads, *more)
        assert ended.code == 0, ended.err
    assert read("one/attention.json") == read("two/attention.json")
    assert read("one-heads/heads.json") == read("two-heads/heads.json")


@pytest.mark.slow
def test_a_recipe_with_its_gate(tiny: Any, desk: Path, qtool_command: Command) -> None:
    Path("recipe.yaml").write_text(
        f"model: {{name: {tiny.model}}}\nmethods: [zeroquant]\nthreads: 1\n"
        f"evaluate: {{task: sst2, data: {tiny.data}, allow_weak_baseline: true}}\ngate: {{min_score: 99.9}}\n"
    )
    for name, more in (("one", ()), ("two", ("--jobs", "2"))):
        ended = qtool_command("run", "recipe.yaml", "-o", name, "--json", f"{name}.json", *more)
        assert ended.code == 5, ended.err
    assert made("one") == made("two")
    one, two = (json.loads(Path(f"{name}.json").read_text("utf-8")) for name in ("one", "two"))
    assert without_times(one["evaluate"]) != {} and one["gate"] == two["gate"] and not one["gate"]["passed"]


def test_an_error_is_said_once_with_its_code(desk: Path) -> None:
    arguments = ["eval", str(desk / "nowhere"), "--task", "sst2", "--json", "result.json", "--jobs", "2"]
    command = [sys.executable, "-m", "qtool", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 3 and ended.stdout == "", ended.stderr
    assert ended.stderr.count("no model at") == 1 and "Traceback" not in ended.stderr
    assert json.loads(Path("result.json").read_text("utf-8"))["exit_code"] == 3


def test_an_error_of_the_first_rank_alone_is_said_once(tiny: Any, desk: Path) -> None:
    """It alone looks at where the output goes."""
    Path("occupied").mkdir()
    Path("occupied", "file").write_text("mine")
    command = [sys.executable, "-m", "qtool", *learned(tiny, "occupied", "--jobs", "2", "-q")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr
    assert ended.stderr.count("qtool: ") == 1 and "occupied is not empty" in ended.stderr


@pytest.mark.parametrize("more", [(), ("--jobs", "two"), ("--nothing",)])
def test_a_wrong_command_line_is_said_once(desk: Path, more: tuple[str, ...]) -> None:
    arguments = ["eval", "nowhere", *more, "--jobs", "2", "--json", "result.json"]
    command = [sys.executable, "-m", "qtool", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr.count("Error: ") == 1
    result = json.loads(Path("result.json").read_text("utf-8"))
    assert result["exit_code"] == 2 and result["error"] in ended.stderr


def test_stdout_that_cannot_be_written(desk: Path) -> None:
    arguments = ["eval", str(desk / "nowhere"), "--task", "sst2", "--json", "-", "--jobs", "2", "-q"]
    command = [sys.executable, "-m", "qtool", *arguments]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 3 and ended.stderr.count("\n") == 1, ended.stderr


def test_who_writes_nothing_needs_no_folder_for_it(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError):
        console.check_json_target("nowhere/a.json")
    with pytest.raises(InputError):
        check_predictions_path(Path("nowhere/a.csv"))
    monkeypatch.setattr(Ranks, "rank", 1)
    console.check_json_target("nowhere/a.json")
    check_predictions_path(Path("nowhere/a.csv"))


def test_a_signal_that_was_swallowed_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers send one to all and again, which must not cut the way out short; a library may lose the first."""
    now = [100.0]
    monkeypatch.setattr(cli, "_heard", [])
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    for at, heard in ((100.0, True), (100.1, False), (104.0, False), (106.0, True), (107.0, False)):
        now[0] = at
        try:
            cli._on_signal(signal.SIGTERM, None)
            assert not heard
        except InterruptedRun as error:
            assert heard and error.exit_code == 143


def learners(parent: int) -> list[psutil.Process]:
    """The ranks that a process has started, by rank."""
    children = psutil.Process(parent).children(recursive=True)
    ranks = [(child.environ().get("RANK"), child) for child in children]
    return [child for rank, child in sorted(ranks, key=lambda pair: str(pair[0])) if rank is not None]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_and_one_rank_goes_on(
    tiny: Any, desk: Path, qtool_command: Command, victim: int
) -> None:
    steps = 400
    asked = learned(tiny, "two", "--jobs", "2", "--json", "result.json", steps=steps)
    command = [sys.executable, "-m", "qtool", *asked]
    place = {**os.environ, "TMPDIR": str(desk)}  # where what the killed one had aside stays
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=place)
    shard = beside(Path("two"), "run") / "embeddings.safetensors"
    deadline = time.monotonic() + 120
    while not shard.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1)  # into the first round of blocks
    learners(process.pid)[victim].send_signal(signal.SIGKILL)
    started = time.monotonic()
    _, said = process.communicate(timeout=90)
    assert time.monotonic() - started < 60
    assert process.returncode == 4
    told = [line for line in said.splitlines() if line.startswith("qtool: ")]
    assert told == [f"qtool: rank {victim} was ended by a signal (Killed); {RESUMABLE}"] and "Traceback" not in said
    assert json.loads(Path("result.json").read_text())["exit_code"] == 4
    assert not Path("two").exists()
    assert qtool_command(*learned(tiny, "two", "--resume", steps=steps)).code == 0
    assert qtool_command(*learned(tiny, "one", steps=steps)).code == 0
    assert made("one") == made("two")


@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGINT, "all"),
        pytest.param(signal.SIGTERM, "parent", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "rank 1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_is_said_once(tiny: Any, desk: Path, number: signal.Signals, to: str) -> None:
    """To the process that was started, to a rank, or to all, as a terminal sends it and some launchers do."""
    asked = learned(tiny, "two", "--jobs", "2", "-q", "--json", "result.json", steps=400)
    command = [sys.executable, "-m", "qtool", *asked]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    shard = beside(Path("two"), "run") / "embeddings.safetensors"
    deadline = time.monotonic() + 120
    while not shard.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    ranks = learners(process.pid)
    heard = [x.laddr.ip for one in (psutil.Process(process.pid), *ranks) for x in one.net_connections() if not x.raddr]
    assert {*heard} == {"127.0.0.1"}
    if to == "all":
        os.killpg(process.pid, number)
    else:
        (process if to == "parent" else ranks[1]).send_signal(number)
    _, said = process.communicate(timeout=90)
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert (process.returncode, said) == (128 + number, f"qtool: {word}; {RESUMABLE}\n")
    assert len(ranks) == 2 and not any(rank.is_running() for rank in ranks)
    assert json.loads(Path("result.json").read_text())["exit_code"] == process.returncode


def test_what_runs_in_one_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    together.alone("bench")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UsageError, match="bench runs in one process; leave out torchrun"):
        together.alone("bench")


@pytest.mark.parametrize(
    ("arguments", "target"),
    [([], None), (["--json", "a"], "a"), (["--json=b", "x"], "b"), (["--json"], None), (["-o", "--json", "-"], "-")],
)
def test_where_json_goes(arguments: list[str], target: str | None) -> None:
    assert together._value(arguments, "--json") == target


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ("eval m --task sst2 --jobs 3", 3), ("eval --jobs=2 m", 2), ("analyze heads m --jobs 4 -o x", 4), ("eval m", 1),
        ("eval m --jobs 0", 1), ("eval m --jobs many", 1), ("eval m --jobs", 1), ("bench m --jobs 2", 1),
        ("nothing --jobs 2", 1), ("", 1), ("--jobs 2", 1), ("eval m --jobs +2", 2), ("eval m --jobs 2 --help", 1),
    ],
)  # fmt: skip
def test_how_many_processes_are_asked_for(arguments: str, count: int) -> None:
    assert together.jobs_of(cli.cli, arguments.split()) == count


def test_a_failure_in_json_never_replaces_results(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    Path("kept.json").write_text("{}")
    for target in ("kept.json", "new.json", "-", "nowhere/new.json"):
        together.tell_in_json("it failed", 4, ["eval", "--json", target])
    wanted = {"schema_version": 1, "error": "it failed", "exit_code": 4}
    assert Path("kept.json").read_text() == "{}" and json.loads(Path("new.json").read_text()) == wanted
    assert json.loads(capsys.readouterr().out) == wanted
    together.tell_in_json("it failed again", 3, ["eval", "--json", "new.json"])
    assert json.loads(Path("new.json").read_text())["exit_code"] == 3
    together.tell_in_json("the gate failed", 5, ["eval", "--json", "-"])  # whose result is there already
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "1")
    together.tell_in_json("it failed", 4, ["--json", "other.json"])
    assert sorted(os.listdir()) == ["kept.json", "new.json"]


def test_the_process_that_was_asked_for_jobs_tells_what_ranks_do_not(
    desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    together.tell_in_json("interrupted", 130, ["eval", "--json", "alone.json"])
    together.tell_in_json("interrupted", 130, ["eval", "--json", "parent.json", "--jobs", "2"])
    together.tell_in_json("interrupted", 130, ["eval", "--json", "-", "--jobs=2"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(JOBS_PARENT, str(os.getppid()))
    together.tell_in_json("terminated", 143, ["eval", "--json", "rank.json", "--jobs", "2"])
    assert os.listdir() == ["parent.json"] and capsys.readouterr().out == ""
    assert kept_results("parent.json") == []  # and the same command with --resume begins anew


def test_results_are_told_from_failures() -> None:
    failure = {"schema_version": 1, "error": "it failed", "exit_code": 4}
    assert tells_failure(failure) and not tells_failure([]) and not tells_failure({**failure, "results": []})
