"""Processes that work together: what they exchange, and how they end when one of them does."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

from qtool import ranks
from qtool.cli import together
from qtool.errors import JOBS_PARENT, InputError, UsageError
from qtool.ranks import life, values

CODE = """
import os, signal, sys, time
from pathlib import Path
import torch
from qtool import aside, errors, ranks
def farewell(message, code):
    Path("farewell").write_text(str(code) + " " + message)
{before}
def main():
    with ranks.joined(farewell) as group:
        {body}
code = 0
try:
    main()
except (errors.QtoolError, AssertionError) as error:
    print(error, file=sys.stderr)
    code = getattr(error, "exit_code", 1)
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)  # as the command line does
"""


class Crew:
    """Python processes that meet in a store of this one."""

    def __init__(self, body: str, count: int, folder: Path, *, alone: bool = False, before: str = "") -> None:
        """`alone` they meet in the first of them. What comes `before` they do before they meet."""
        self.store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        body = textwrap.indent(textwrap.dedent(body), " " * 8).strip()
        code = CODE.format(body=body, before=textwrap.dedent(before))
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": str(not alone), "OMP_NUM_THREADS": "1"}
        if alone:
            del self.store  # its port is free now
        self.children = [
            subprocess.Popen(
                [sys.executable, "-c", code], cwd=folder, env={**os.environ, **shared, "RANK": str(rank)},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(count)
        ]  # fmt: skip

    def ends(self) -> list[tuple[int, str, str]]:
        """Of each its exit code, stdout and stderr."""
        return [(child.wait(120), *child.communicate()) for child in self.children]


@pytest.fixture
def crews() -> Iterator[list[Crew]]:
    made: list[Crew] = []
    yield made
    for child in (child for crew in made for child in crew.children):
        child.kill()
        child.wait()


def crew(crews: list[Crew], body: str, count: int, folder: Path) -> Crew:
    crews.append(Crew(body, count, folder))
    return crews[-1]


def test_one_process_is_all_ranks() -> None:
    alone = ranks.current()
    assert (alone.rank, alone.size, alone.first) == (0, 1, True)
    assert list(alone.share(3)) == [0, 1, 2]
    assert [part["x"].tolist() for part in alone.exchange("ones", {"x": torch.ones(2)})] == [[1.0, 1.0]]
    assert alone.told("a list", [1, "a"]) == [1, "a"]
    alone.agree("anything", {"anything": object()})
    alone.check()


def test_shares_are_all_pieces_once() -> None:
    for size in (1, 2, 3, 8):
        for count in (0, 1, 7, 8):
            shares = []
            for rank in range(size):
                one = ranks.Ranks()
                one.rank, one.size = rank, size
                shares.append(list(one.share(count)))
                assert all(one.owner(piece) == rank for piece in shares[-1])
            assert sorted(piece for share in shares for piece in share) == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("size", [2, 3])
def test_what_ranks_exchange(crews: list[Crew], tmp_path: Path, size: int) -> None:
    for folder in ("there", "here"):
        (tmp_path / folder).mkdir()
    (tmp_path / "there" / "file").write_bytes(bytes(range(256)) * 300)
    body = """
    mine = {"a": torch.arange(group.rank + 1), f"only {group.rank}": torch.tensor([0.5 + group.rank])}
    for _ in range(3):
        parts = group.exchange("numbers", mine)
    ranks.group._CHUNK = 1000
    last = group.size - 1
    group.fetch(Path("there" if group.rank == last else "here", "file"), last)
    found = [[part["a"].tolist(), part[f"only {rank}"].item()] for rank, part in enumerate(parts)]
    print(found, group.told("who", group.rank))
    """
    ends = crew(crews, body, size, tmp_path).ends()
    wanted = [[list(range(rank + 1)), 0.5 + rank] for rank in range(size)]
    assert [(code, out.strip(), error) for code, out, error in ends] == [(0, f"{wanted} 0", "")] * size
    assert (tmp_path / "here" / "file").read_bytes() == bytes(range(256)) * 300
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["file"]


def test_ranks_that_go_different_ways_say_so(crews: list[Crew], tmp_path: Path) -> None:
    """Whatever calls they make; nothing is mixed up, and who leaves while another goes on is told apart too."""
    (tmp_path / "shard").write_bytes(b"bytes")
    calls = {"sums": "group.exchange('sums', {'x': torch.ones(3)})", "facts": "group.agree('facts', {'a': 1})"}
    calls |= {"scores": "ranks.gathered('scores', {group.rank: 1.5})", "result": "group.told('result', 5)"}
    calls |= {"file shard": "group.fetch(Path('shard'), 1)"}
    body = f"""
    calls = {calls!r}
    for one in calls:
        for other in calls:
            try:
                eval(calls[one if group.first else other])
            except AssertionError as error:
                print(error)
    assert group.told("end", group.rank) == 0
    if group.first:
        group.exchange("sums", {{}})
    """
    ends = crew(crews, body, 2, tmp_path).ends()
    ways = [(one, other) for one in calls for other in calls if one != other]
    said = [f"ranks went different ways: rank 0 is at '{one}', rank 1 at '{other}'" for one, other in ways]
    assert [(code, out.splitlines()) for code, out, _ in ends] == [(1, said)] * 2
    assert {error for _, _, error in ends} == {"ranks went different ways: rank 0 is at 'sums', rank 1 at 'goodbye'\n"}


def test_nothing_travels_but_what_ranks_give(crews: list[Crew], tmp_path: Path) -> None:
    """One large part, whosever it is, costs its own size; of `told`, only what the first rank says."""
    body = """
    import torch.distributed as dist
    moved = []
    def counted(name, function):
        def call(tensors, *rest):
            each = tensors if isinstance(tensors, list) else [tensors]
            moved.append(sum(one.nbytes for one in each))
            return function(tensors, *rest)
        setattr(dist, name, call)
    for name in ("all_gather", "broadcast"):
        counted(name, getattr(dist, name))
    for large in range(3):
        mine = {"x": torch.full((250_000,), float(large))} if group.rank == large else {}
        parts = group.exchange("one part", mine)
        assert [len(part) for part in parts] == [rank == large for rank in range(3)], parts
        assert torch.equal(parts[large]["x"], torch.full((250_000,), float(large)))
    print(sum(moved))
    moved.clear()
    assert group.told("letters", "a" * 100_000 if group.first else "b" * 1_000_000) == "a" * 100_000
    print(sum(moved))
    """
    for code, out, error in crew(crews, body, 3, tmp_path).ends():
        assert (code, error) == (0, "")
        exchanged, told = map(int, out.split())
        assert 3_000_000 <= exchanged < 3_005_000, "three parts of 250,000 float32 numbers"
        assert 100_000 <= told < 102_000


@pytest.mark.parametrize("waits", ["group.exchange('nothing', {})", "time.sleep(60)"])
@pytest.mark.parametrize("culprit", [0, 1])
def test_an_error_ends_all_ranks_with_its_message(crews: list[Crew], tmp_path: Path, culprit: int, waits: str) -> None:
    """Whether the others wait for each other or compute."""
    body = f"""
    if group.rank == {culprit}:
        raise errors.InputError("no such file")
    {waits}
    """
    started = time.monotonic()
    ends = crew(crews, body, 2, tmp_path).ends()
    assert time.monotonic() - started < 45
    assert [code for code, _, _ in ends] == [3, 3]
    assert ends[culprit][2] == "no such file\n"
    line = f"rank {culprit}: no such file\n"
    if culprit and "sleep" in waits:  # no exception reaches the first rank
        assert (tmp_path / "farewell").read_text() == f"3 {line.strip()}"
    if culprit:
        assert ends[0][2].endswith(line)
    elif "sleep" in waits:  # where it waits, it is the code above that prints what ends it
        assert ends[1][2] == "", "the first rank has said so itself"


@pytest.mark.parametrize(
    ("victim", "waits"), [(1, "group.exchange('nothing', {})"), (1, "time.sleep(90)"), (0, "time.sleep(90)")]
)
def test_a_killed_rank_is_noticed(crews: list[Crew], tmp_path: Path, victim: int, waits: str) -> None:
    """Also the first one, which alone speaks while it lives."""
    body = f"""
    if not group.first:
        sys.stderr = open(os.devnull, "w")
    group.exchange("nothing", {{}})
    ranks.life.LOST = 4.0
    if group.rank == {victim}:
        os.kill(os.getpid(), signal.SIGKILL)
    {waits}
    """
    started = time.monotonic()
    ends = crew(crews, body, 2, tmp_path).ends()
    (code, _, said), (killed, _, _) = ends[1 - victim], ends[victim]
    assert time.monotonic() - started < 60
    assert killed == -signal.SIGKILL and code == 4
    assert "ended without a word" in said or f"rank {victim}: it is gone" in said
    assert "--resume" in said


DYING = """
ranks.life.LOST = 4.0
wait = ranks.life.Life.await_all
def dies(life):
    wait(life)
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.{how})
ranks.life.Life.await_all = dies
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_rank_that_is_gone_while_all_meet(crews: list[Crew], tmp_path: Path, how: str) -> None:
    """torch itself would wait for it without end."""
    crews.append(Crew("pass", 2, tmp_path, before=DYING.format(how=how)))
    first, second = crews[-1].children
    _, said = first.communicate(timeout=60)
    second.kill()
    second.communicate()
    assert first.returncode == 4 and "--resume" in said
    assert (tmp_path / "farewell").read_text().startswith("4 rank 1: it is gone")


def test_a_rank_that_does_not_come(crews: list[Crew], tmp_path: Path) -> None:
    before = "ranks.life.COMING = 2.0\nif os.environ['RANK'] == '1': os._exit(0)"
    crews.append(Crew("pass", 2, tmp_path, before=before))
    (code, _, said), _ = crews[-1].ends()
    assert code == 4 and "rank 1 has not come within 0 minutes" in said


@pytest.mark.slow
def test_ranks_that_were_all_stopped_go_on(crews: list[Crew], tmp_path: Path) -> None:
    """As Ctrl-Z does: the time in which nobody could give a sign of life is no silence."""
    body = "Path(f'ready-{group.rank}').touch()\ntime.sleep(10)"
    crews.append(Crew(body, 3, tmp_path, before="ranks.life.LOST = 3.0"))
    deadline = time.monotonic() + 60
    while len([*tmp_path.glob("ready-*")]) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    for child in crews[-1].children:
        child.send_signal(signal.SIGSTOP)
    time.sleep(6)
    for child in crews[-1].children:
        child.send_signal(signal.SIGCONT)
    assert [end[0] for end in crews[-1].ends()] == [0, 0, 0]


def test_one_that_others_took_for_dead_learns_of_it() -> None:
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    before = signal.set_wakeup_fd(-1)
    try:
        mine = life.Life(1, 2, store)
        mine._end_by_note = lambda note: None  # type: ignore[method-assign]  # which would end this process
        store.set("error", json.dumps({"rank": 1, "code": 4, "message": "it is gone", "by": 0}))
        with pytest.raises(ranks.OtherRankError, match="rank 1: it is gone"):
            mine.check()
        mine.end()
    finally:
        signal.set_wakeup_fd(before)


@pytest.mark.parametrize("waits", ["group.exchange('nothing', {})", "time.sleep(90)"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_the_rank_in_which_all_meet_is_gone(crews: list[Crew], tmp_path: Path, how: int, waits: str) -> None:
    """Killed, or frozen, so that no connection breaks: a call to its store never returns."""
    body = f"""
    group.exchange("nothing", {{}})
    ranks.life.LOST = 4.0
    if group.first:
        os.kill(os.getpid(), {int(how)})
    {waits}
    """
    crews.append(Crew(body, 2, tmp_path, alone=True))
    started = time.monotonic()
    first, left = crews[-1].children
    _, said = left.communicate(timeout=60)
    first.kill()
    first.communicate()
    assert time.monotonic() - started < 50
    assert left.returncode == 4 and "Traceback" not in said
    assert "gone" in said or "ended without a word" in said
    assert "--resume" in said


def test_signals_are_written_nowhere_after_an_error() -> None:
    """The number of a socket that is gone may be that of any file later."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno())
    try:
        store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        life.Life(0, 1, store).tell(InputError("no such file"))
        assert signal.set_wakeup_fd(-1) == theirs.fileno()
    finally:
        signal.set_wakeup_fd(before)
        ours.close()
        theirs.close()


def test_ranks_with_other_data_are_refused(crews: list[Crew], tmp_path: Path) -> None:
    body = """
    group.agree("facts", {"data": "a", "model": "b"})
    group.agree("facts", {"data": str(group.rank), "model": "b"})
    """
    ends = crew(crews, body, 2, tmp_path).ends()
    assert [code for code, _, _ in ends] == [3, 3]
    assert "rank 1 has a different data than rank 0" in ends[0][2]


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("write_text(folder / 'shard', 'a' * 1000)", "cannot write {place}/shard: File too large; free some space in"),
        ("raise OSError(28, 'No space left on device', str(folder))", "{place}: No space left on device; free space"),
    ],
    ids=["line", "error"],
)
def test_a_disk_that_is_full_for_one_rank(crews: list[Crew], tmp_path: Path, fails: str, said: str) -> None:
    """Every rank ends with the line and the code that one process has for it."""
    body = f"""
    import resource
    from qtool.artifact import write_text
    with aside.folder_aside() as folder:
        if group.rank == 1:
            Path("place").write_text(str(folder))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            {fails}
        group.exchange("nothing", {{}})
    """
    ends = crew(crews, body, 2, tmp_path).ends()
    place = (tmp_path / "place").read_text()
    assert ends[0][0] == 4 and ends[0][2].count("\n") == 1, ends
    assert ends[0][2].removeprefix("qtool: ").startswith(f"rank 1: {said.format(place=place)}")
    assert not Path(place).exists()


def test_nothing_is_left_of_a_file_that_did_not_arrive(crews: list[Crew], tmp_path: Path) -> None:
    body = """
    Path("here").mkdir(exist_ok=True)
    file = Path("here", "file") if group.first else Path("file")
    if not group.first:
        file.write_text("content")
        group._send = lambda file: os.kill(os.getpid(), signal.SIGKILL)
    group.fetch(file, 1)
    """
    ends = crew(crews, body, 2, tmp_path).ends()
    assert ends[0][0] == 4 and "--resume" in ends[0][2]
    assert not [*(tmp_path / "here").iterdir()]


def test_nobody_to_meet(tmp_path: Path) -> None:
    code = CODE.format(body="pass", before="")
    environment = {**os.environ, "RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 4
    assert "cannot meet the other ranks at 127.0.0.1:1" in result.stderr


def test_ranks_of_a_parent_that_is_gone_do_not_look_for_it(tmp_path: Path) -> None:
    """`--jobs` was killed while they started; torch would go on for five minutes."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", JOBS_PARENT: str(gone.pid)}
        place |= {"MASTER_PORT": str(nobody.getsockname()[1]), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        command = [sys.executable, "-c", CODE.format(body="pass", before="")]
        result = subprocess.run(command, cwd=tmp_path, env={**os.environ, **place}, check=False, timeout=60)
    assert result.returncode == 4


@pytest.mark.parametrize("waits", ["group.exchange('nothing', {})", "time.sleep(60)"])
def test_a_signal_ends_a_rank_that_waits(crews: list[Crew], tmp_path: Path, waits: str) -> None:
    """Inside torch no handler of Python's runs; folders aside go all the same."""
    body = f"""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with aside.folder_aside() as folder:
        Path(f"place-{{group.rank}}").write_text(str(folder))
        if group.rank == 1:
            {waits}
        time.sleep(60)
    """
    made = crew(crews, body, 2, tmp_path)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"place-{rank}").is_file() for rank in (0, 1)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    made.children[1].terminate()
    started = time.monotonic()
    assert [code for code, _, _ in made.ends()] == [143, 143]
    assert time.monotonic() - started < 20
    assert not any(Path((tmp_path / f"place-{rank}").read_text()).exists() for rank in (0, 1))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x, which is no number"),
        ({"RANK": "0", "WORLD_SIZE": "many"}, "WORLD_SIZE=many, which is no number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of 2; ranks are counted from 0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE=x"),
    ],
)
def test_nonsense_in_the_environment(monkeypatch: pytest.MonkeyPatch, said: dict[str, str], message: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("RANK", "WORLD_SIZE"):  # alone they say nothing
        with monkeypatch.context() as patch:
            patch.setenv(name, said[name])
            assert not together.several()
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        together.several()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not together.several()


def test_threads_of_a_host_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks.threads_for(8) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert ranks.threads_for(8) == 2
    assert ranks.threads_for(1) == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    | st.lists(st.floats(), max_size=3).map(lambda values: np.array(values, dtype=np.float64)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


def equal(a: Any, b: Any) -> bool:
    """Of one type and value; NaN equals itself."""
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=True) and np.array_equal(np.signbit(a)[a == a], np.signbit(b)[b == b])
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    return bool(a == b or (a != a and b != b))


@given(VALUES)
def test_values_travel_as_they_are(value: Any) -> None:
    sent = json.loads(json.dumps(values.packed(value)))
    assert equal(values.unpacked(sent), value)


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(TypeError, match="a set does not travel"):
        values.packed([{1}])


def test_pieces_are_put_in_order(crews: list[Crew], tmp_path: Path) -> None:
    body = """
    found = ranks.gathered("pieces", {piece: (piece, [0.1 * piece]) for piece in group.share(5)})
    assert list(found.items()) == [(piece, (piece, [0.1 * piece])) for piece in range(5)], found
    """
    assert crew(crews, body, 3, tmp_path).ends() == [(0, "", "")] * 3
    assert ranks.gathered("pieces", {2: "b", 1: (1.5, None)}) == {1: (1.5, None), 2: "b"}
