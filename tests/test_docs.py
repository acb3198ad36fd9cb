"""Commands and recipes in the documentation work as printed."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from qtool import cli, recipe
from qtool.evaluation.tasks import TASKS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """Every qtool command line in a block of shell or workflow text."""
    lines = [re.sub(r"^\s*(- run: |- )?", "", line).split("  #")[0] for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("qtool ")]


def printed() -> list[list[str]]:
    found = [command for page in PAGES for block in blocks(page, "(?:sh|yaml)") for command in commands(block)]
    assert len(found) > 6
    return found


@pytest.mark.parametrize("command", printed(), ids=" ".join)
def test_printed_commands_parse(command: list[str]) -> None:
    parent = click.Context(cli.cli, **cli.CONTEXT)  # click keeps the help option of a command's first context
    found: click.Command = cli.cli
    while isinstance(found, click.Group):  # `analyze attention`
        found, command = found.commands[command[0]], command[1:]
    found.make_context(found.name, command, parent)


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_recipe_key_is_documented() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    for name in recipe.Recipe.model_fields:
        assert f"`{name}`" in text, name
    for section in (recipe.Model, recipe.Calibration, recipe.Evaluate, recipe.GateSection):
        for name in section.model_fields:
            assert f"`{name}`" in text, f"{section.__name__}.{name}"


def test_every_task_is_documented() -> None:
    text = (ROOT / "docs" / "tasks.md").read_text("utf-8")
    for task in TASKS.values():
        assert f"`{task.name}`" in text, task.name
        assert all(metric in text for metric in task.metrics), task.name


def test_the_ci_page_runs(zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe and every qtool command of docs/ci.md, in order, on a tiny model in a folder called `model`."""
    zoo.make("model", labels=("bad", "good"))
    texts = zoo.sentences(40)
    given = zoo.plain(tmp_path / "model", texts).argmax(-1).tolist()
    for split in ("train", "validation"):
        zoo.write(f"data/{split}.jsonl", texts, [("bad", "good")[label] for label in given])
    page = ROOT / "docs" / "ci.md"
    text = next(block for block in blocks(page, "yaml") if "gate:" in block)
    assert yaml.safe_load(text)["gate"]
    (tmp_path / "recipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "(?:yaml|sh)"):
        for command in commands(block):
            monkeypatch.setattr(sys, "argv", ["qtool", *command])
            status, expected = cli._status(), 0
            if "--json" in command:
                verdict = json.loads(Path(command[command.index("--json") + 1]).read_text())["gate"]
                assert verdict["max_drop"] == 0.5 and verdict["min_agreement"] == 98
                expected = 0 if verdict["passed"] else 5
            assert status == expected, command
