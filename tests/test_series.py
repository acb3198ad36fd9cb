"""Several tasks or recipes in one command: one table, one JSON, one exit code, and nothing finished is lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qtool.evaluation import runner
from qtool.evaluation.result import Evaluation

Command = Callable[..., Any]


@pytest.fixture
def artifact(tiny: Any, desk: Path, qtool_command: Command) -> Path:
    """The tiny model, quantized."""
    assert qtool_command("quantize", tiny.model, "--method", "zeroquant", "-o", "out").code == 0
    return desk / "out"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that were really scored; `stop` in front of a name interrupts there."""
    scored: list[str] = []
    plain = runner.evaluate

    def evaluate(model: Any, task: Any, **options: Any) -> Evaluation:
        if f"stop {task.name}" in scored:
            raise KeyboardInterrupt
        scored.append(task.name)
        return plain(model, task, **options)

    monkeypatch.setattr(runner, "evaluate", evaluate)
    return scored


BOTH = ("--task", "sst2", "--task", "classification")


def scores(file: Path) -> dict[str, float]:
    return {item["task"]: item["candidate"]["score"] for item in json.loads(file.read_text())["results"]}


def test_tasks_are_scored_as_if_alone(tiny: Any, artifact: Path, desk: Path, qtool_command: Command) -> None:
    alone = qtool_command("eval", "out", "--task", "sst2", "--data", tiny.data, "--json", "one.json")
    ended = qtool_command("eval", "out", *BOTH, "--data", tiny.data, "--json", "both.json", "--predictions", "p.jsonl")
    assert (alone.code, ended.code) == (0, 0)
    one, both = (json.loads((desk / name).read_text()) for name in ("one.json", "both.json"))
    assert set(both) == {"schema_version", "complete", "results", "gate"} and both["complete"] is True
    timed = ("seconds", "speed_ratio")
    first = both["results"][0]
    for side in ("candidate", "baseline"):
        assert {k: v for k, v in first[side].items() if k not in timed} == {
            k: v for k, v in one[side].items() if k not in timed
        }
    assert first["fingerprint"] == one["fingerprint"]
    assert [line.split()[0] for line in ended.out.splitlines()[2:4]] == ["sst2", "classification"]
    rows = (tiny.data / "validation.jsonl").read_text().splitlines()
    assert len((desk / "p-sst2.jsonl").read_text().splitlines()) == len(rows)
    assert (desk / "p-classification.jsonl").is_file() and not (desk / "p.jsonl").exists()


def test_data_for_single_tasks(tiny: Any, artifact: Path, desk: Path, qtool_command: Command) -> None:
    ended = qtool_command(
        "eval", "out", *BOTH, "--data", tiny.data, "--data", f"classification={tiny.data / 'train.jsonl'}",
        "--json", "r.json", "--allow-weak-baseline",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    sources = [Path(item["data"]).name for item in json.loads((desk / "r.json").read_text())["results"]]
    assert sources == ["validation.jsonl", "train.jsonl"]
    twice = qtool_command("eval", "out", *BOTH, "--data", tiny.data, "--data", tiny.data)
    assert twice.code == 2 and "one PATH for all tasks" in twice.errors[0]
    for places, said in (
        (("cola=x",), "'cola' is not among the tasks"),
        (("sst2=x", "sst2=y"), "one TASK=PATH for single ones"),
        (("sst2=",), "names no path"),
        (("",), "names no path"),
    ):
        ended = qtool_command("eval", "out", *BOTH, *(part for place in places for part in ("--data", place)))
        assert ended.code == 2 and said in ended.errors[0]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--task", "sst2", "--task", "sst3"), 2, "unknown task 'sst3'; did you mean sst2"),
        (("--task", "sst2", "--task", "sst2"), 2, "named twice"),
        (("--task", "sst2", "--task", "squad", "--stride", "4"), 2, "--stride has no meaning for task 'sst2'"),
        (("--task", "sst2", "--task", "regression", "--min-agreement", "9"), 2, "no meaning for task 'regression'"),
        (("--task", "sst2", "--resume"), 2, "--resume keeps the results in a file"),
        (("--task", "sst2", "--resume", "--json", "-"), 2, "--resume keeps the results in a file"),
        (("--task", "sst2", "--resume", "--json", "list.json"), 3, "list.json holds no results of qtool"),
        (("--task", "sst2", "--resume", "--json", "other.json"), 3, "other.json holds no results of qtool"),
    ],
)
def test_refused_before_anything_is_scored(
    arguments: Any, code: int, said: str, tiny: Any, artifact: Path, counted: list[str], qtool_command: Command
) -> None:
    Path("list.json").write_text("[1, 2]")
    Path("other.json").write_text('{"a": 1}')
    ended = qtool_command("eval", "out", *arguments, "--data", tiny.data)
    assert (ended.code, counted) == (code, [])
    assert len(ended.errors) == 1 and said in ended.errors[0]


def test_an_interrupted_series_keeps_what_is_finished(
    tiny: Any, artifact: Path, desk: Path, counted: list[str], qtool_command: Command
) -> None:
    command = ("eval", "out", *BOTH, "--data", tiny.data, "--json", "r.json")
    counted.append("stop classification")
    stopped = qtool_command(*command)
    assert stopped.code == 130 and "sst2" in stopped.out
    body = json.loads((desk / "r.json").read_text())
    assert (body["complete"], [item["task"] for item in body["results"]]) == (False, ["sst2"])

    counted.clear()
    assert qtool_command(*command, "--resume").code == 0
    assert counted == ["classification"]
    whole = scores(desk / "r.json")
    counted.clear()
    again = qtool_command(*command, "--resume")
    assert (again.code, counted, scores(desk / "r.json")) == (0, [], whole)
    # Predictions are not kept: a file that is asked for and not there is made again.
    assert qtool_command(*command, "--resume", "--predictions", "p.jsonl").code == 0
    assert counted == ["sst2", "classification"] and (desk / "p-sst2.jsonl").is_file()
    counted.clear()
    assert qtool_command(*command, "--resume", "--predictions", "p.jsonl").code == 0 and counted == []
    # Whatever changes a score is scored again: an option, the data, the model.
    qtool_command(*command, "--resume", "--limit", "50")
    assert counted == ["sst2", "classification"]
    counted.clear()
    qtool_command("eval", tiny.model, *BOTH, "--data", tiny.data, "--json", "r.json", "--resume")
    assert counted == ["sst2", "classification"]


def test_a_failed_gate_names_its_task(tiny: Any, artifact: Path, desk: Path, qtool_command: Command) -> None:
    ended = qtool_command("eval", "out", *BOTH, "--data", tiny.data, "--min-score", "99", "--json", "r.json")
    assert ended.code == 5
    (line,) = ended.errors
    assert "sst2: min-score" in line and "classification: min-score" in line
    gate = json.loads((desk / "r.json").read_text())["gate"]
    assert gate["passed"] is False and len(gate["failures"]) == 2


def recipe(tiny: Any, output: str, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"name": str(tiny.model)},
        "methods": ["zeroquant"],
        "output": output,
        "evaluate": {"task": "sst2", "data": str(tiny.data)},
        **changes,
    }


def write(name: str, value: Any) -> str:
    Path(name).write_text(yaml.safe_dump(value))
    return name


@pytest.mark.parametrize("in_one_file", [True, False])
def test_recipes_run_one_after_the_other(
    in_one_file: bool, tiny: Any, desk: Path, counted: list[str], qtool_command: Command
) -> None:
    wanted = [recipe(tiny, "a", gate={"min_score": 99}), recipe(tiny, "b", preset="zeroquant-w8a8-static")]
    files = [write("all.yaml", wanted)] if in_one_file else [write("a.yaml", wanted[0]), write("b.yaml", wanted[1])]
    ended = qtool_command("run", *files, "--json", "r.json")
    # The first one's gate fails, and the second runs all the same.
    assert ended.code == 5 and len(ended.errors) == 1 and files[0] in ended.errors[0]
    assert (desk / "a" / "model.safetensors").is_file() and (desk / "b" / "model.safetensors").is_file()
    body = json.loads((desk / "r.json").read_text())
    assert body["complete"] is True and len(body["runs"]) == 2 and body["gate"]["passed"] is False
    assert [run["gate"]["passed"] for run in body["runs"]] == [False, True]
    assert counted == ["sst2", "sst2"]
    rows = [line for line in ended.out.splitlines() if "sst2" in line and "accuracy" in line]
    assert len(rows) == 2


def test_an_interrupted_list_of_recipes_goes_on(
    tiny: Any, desk: Path, counted: list[str], qtool_command: Command
) -> None:
    data = {"task": ["sst2", "classification"], "data": {"sst2": str(tiny.data), "classification": str(tiny.data)}}
    file = write("all.yaml", [recipe(tiny, "a"), recipe(tiny, "b", evaluate=data)])
    counted.append("stop classification")
    stopped = qtool_command("run", file, "--json", "r.json")
    assert stopped.code == 130
    body = json.loads((desk / "r.json").read_text())
    assert body["complete"] is False and len(body["runs"]) == 1
    assert [item["task"] for item in json.loads((desk / "b" / "qtool.json").read_text())["scores"]] == ["sst2"]
    before = (desk / "a" / "model.safetensors").read_bytes()

    counted.clear()
    ended = qtool_command("run", file, "--json", "r.json", "--resume")
    assert (ended.code, counted) == (0, ["classification"]), ended.err
    assert (desk / "a" / "model.safetensors").read_bytes() == before
    body = json.loads((desk / "r.json").read_text())
    assert body["complete"] is True and len(body["runs"][1]["evaluate"]) == 2
    assert "classification" in (desk / "b" / "README.md").read_text()


def test_recipes_that_share_an_output_are_refused(tiny: Any, desk: Path, qtool_command: Command) -> None:
    ended = qtool_command("run", write("all.yaml", [recipe(tiny, "a"), recipe(tiny, "a")]))
    assert ended.code == 3 and "several recipes write to a" in ended.errors[0]
    assert not (desk / "a").exists()
    wrong = qtool_command("run", write("all.yaml", [recipe(tiny, "a"), recipe(tiny, "b", evaluate={"task": "sst3"})]))
    assert wrong.code == 3 and not (desk / "a").exists()
