"""Methods of other packages: a real one that is installed and used, and broken ones that harm nothing."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from qtool import methods, plugins
from qtool.evaluation import tasks
from qtool.nn import QLinear

Command = Callable[..., Any]
PACKAGE = Path(__file__).parent / "thirdparty"


@pytest.fixture(autouse=True)
def forget_plugins() -> Iterator[None]:
    """What other packages offer is looked up once a process; each test here has its own."""
    for found in (methods.plugged, tasks.plugged):
        found.cache_clear()
    yield
    for found in (methods.plugged, tasks.plugged):
        found.cache_clear()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package of docs/extending.md."""
    folder = tmp_path_factory.mktemp("third-party")
    source = shutil.copytree(PACKAGE, folder / "source")  # setuptools builds in place
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "--target", target, source], check=True, capture_output=True)
    return target


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """That package on this process's path."""
    monkeypatch.syspath_prepend(site)
    yield site
    for name in ("qtool_alternate", "qtool_alternate_tasks"):
        sys.modules.pop(name, None)


def distribution(folder: Path, name: str, points: dict[str, str], code: str = "", group: str = "qtool.methods") -> None:
    """What an installer leaves behind: a module called `name` and its metadata."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = "".join(f"{point} = {target}\n" for point, target in points.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}")
    (folder / f"{name}.py").write_text(textwrap.dedent(code))


# --- a package that works


def test_an_installed_method_is_listed_with_its_origin(site: Path) -> None:
    """In a process of its own, as a user has it; qtool's own methods are there as before."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-m", "qtool", "methods", "--json", "-"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)
    assert found["broken"] == []
    assert {name: entry["origin"] for name, entry in found["methods"].items()} == {
        "ibert": "qtool", "zeroquant": "qtool", "alternate": "qtool-alternate 0.2",
    }  # fmt: skip
    assert found["methods"]["alternate"]["summary"] == "ZeroQuant W8A8 that leaves every n-th block in float"


@pytest.mark.parametrize(("options", "every"), [((), 2), (("--set", "methods.alternate.every=1"), 1)])
def test_an_installed_method_quantizes(
    options: tuple[str, ...], every: int, installed: Path, tiny: Any, desk: Path, qtool_command: Command
) -> None:
    """Of two blocks the second stays in float, or both; the rest is bit for bit what ZeroQuant makes of it."""
    ended = qtool_command("quantize", tiny.model, "--method", "alternate", *options, "-o", "out", "-q")
    assert ended.code == 0, ended.err
    assert qtool_command("quantize", tiny.model, "--method", "zeroquant", "-o", "whole", "-q").code == 0
    ours, whole = (transformers.AutoModelForSequenceClassification.from_pretrained(name) for name in ("out", "whole"))
    source = transformers.AutoModelForSequenceClassification.from_pretrained(tiny.model).state_dict()
    for index, block in enumerate(ours.bert.encoder.layer):
        spared = (index + 1) % every == 0
        assert any(isinstance(module, QLinear) for module in block.modules()) is not spared
        other = source if spared else whole.state_dict()
        for name, value in block.state_dict().items():
            assert torch.equal(value, other[f"bert.encoder.layer.{index}.{name}"]), name
    kept = json.loads(Path("out/qtool.json").read_text())["kept_float"]
    assert [reason for reason in kept.values()].count("in a spared block") == 6 * (2 // every)


def test_a_recipe_with_an_installed_method(installed: Path, tiny: Any, desk: Path, qtool_command: Command) -> None:
    """Its preset counts, its options are checked, and unknown words get the nearest ones."""
    cases = [
        ({"name": "alternate", "every": 3}, 0, ""),
        ({"name": "alternate", "evry": 3}, 3, "methods.alternate.unknown option 'evry'; did you mean every?"),
        ({"name": "alternate", "every": 0}, 3, "methods.alternate.every: input should be greater than or equal to 1"),
        ({"name": "alternat"}, 3, "r.yaml: unknown method 'alternat'; did you mean alternate?"),
    ]
    for method, code, message in cases:
        Path("r.yaml").write_text(json.dumps({"methods": [method]}))
        ended = qtool_command("quantize", tiny.model, "-c", "r.yaml", "--dry-run")
        assert (ended.code, ended.errors) == (code, [message] if message else []), ended.err
    ended = qtool_command("quantize", tiny.model, "--method", "alternat", "--dry-run")
    assert (ended.code, ended.errors) == (2, ["unknown method 'alternat'; did you mean alternate?"])


def test_a_method_may_bring_a_preset_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any, desk: Path, qtool_command: Command
) -> None:
    code = """
        from qtool.methods.zeroquant import ZeroQuant
        class Coarse(ZeroQuant):
            name, summary, execution, preset = "coarse", "s", "e", {"weights": "int8:group:16:sym"}
    """
    distribution(tmp_path / "site", "coarse", {"coarse": "coarse:Coarse"}, code)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "coarse  " in qtool_command("methods").out
    for arguments, weights in (((), "int8:group:16:sym"), (("--set", "weights.group_size=8"), "int8:group:8:sym")):
        ended = qtool_command("quantize", tiny.model, "--method", "coarse", *arguments, "--dry-run", "--json", "-")
        modules = json.loads(ended.out)["quantized"].values()
        assert {module["weights"] for module in modules if module["type"] == "linear"} == {weights}


def test_an_installed_task_scores(installed: Path, tiny: Any, desk: Path, qtool_command: Command, zoo: Any) -> None:
    """F1 of its positive class as scikit-learn has it, from plain transformers' predictions."""
    from sklearn.metrics import f1_score

    texts = zoo.sentences(50, seed=9)
    labels = [index % 2 for index in range(len(texts))]
    rows = [{"review": text, "stars": label} for text, label in zip(texts, labels, strict=True)]
    Path("reviews.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ("eval", tiny.model, "--data", "reviews.jsonl", "--allow-weak-baseline", "--json", "-")
    ended = qtool_command(*arguments, "--task", "reviews")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    given = zoo.plain(tiny.model, texts).argmax(1).tolist()
    assert found["metric"] == "f1" and found["n"] == 50
    assert found["candidate"]["score"] == pytest.approx(100 * f1_score(labels, given), abs=1e-9)
    ended = qtool_command(*arguments, "--task", "review")
    assert (ended.code, ended.errors) == (2, ["unknown task 'review'; did you mean reviews?"])


def test_a_broken_task_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any, desk: Path, qtool_command: Command
) -> None:
    distribution(tmp_path / "site", "badtask", {"mine": "badtask:T"}, "T = 3", group="qtool.tasks")
    monkeypatch.syspath_prepend(tmp_path / "site")
    ended = qtool_command("eval", tiny.model, "--task", "mine", "--data", tiny.data)
    assert (ended.code, len(ended.errors)) == (4, 1)
    assert "task 'mine' of badtask 1.0 cannot be used" in ended.errors[0]
    assert qtool_command("eval", tiny.model, "--task", "sst2", "--data", tiny.data).code == 0


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.*")), ids=lambda path: path.name)
def test_the_documentation_shows_this_package(file: Path) -> None:
    text = (PACKAGE.parents[1] / "docs" / "extending.md").read_text("utf-8")
    language = {".toml": "toml", ".py": "python"}[file.suffix]
    assert f"```{language}\n{file.read_text('utf-8')}```\n" in text, "docs/extending.md shows it otherwise"


# --- packages that do not work

GOOD = """
    from qtool.methods.zeroquant import ZeroQuant
    class Fine(ZeroQuant):
        name, summary, execution = "fine", "does what it says", "real"
"""
BROKEN: dict[str, tuple[dict[str, str], str, str]] = {
    "missing module": ({"bad": "bad:X"}, "import qtool_no_such_module", "No module named 'qtool_no_such_module'"),
    "missing attribute": ({"bad": "bad:X"}, "", "has no attribute 'X'"),
    "own bug": ({"bad": "bad:X"}, "1 / 0", "ZeroDivisionError: division by zero"),
    "exits": ({"bad": "bad:X"}, "raise SystemExit('bye')", "SystemExit: bye"),
    "wrong type": ({"bad": "bad:X"}, "X = 3", "3 is not a subclass of qtool.methods.base.Method"),
    "no summary": (
        {"bad": "bad:X"},
        "from qtool.methods.zeroquant import ZeroQuant\nclass X(ZeroQuant):\n    name = 'bad'",
        "X.summary is not a text",
    ),
    "abstract": (
        {"bad": "bad:X"},
        "from qtool.methods.base import Method\n"
        "class X(Method):\n    name, phase, summary, execution = 'bad', 'lower', '', ''",
        "X does not define lower, plan",
    ),
    "another name": (
        {"bad": "bad:X"},
        "from qtool.methods.zeroquant import ZeroQuant\nclass X(ZeroQuant):\n    name = 'x'; summary = execution = ''",
        "its entry point and its attribute name differ: bad and x",
    ),
    "unknown preset": (
        {"bad": "bad:X"},
        "from qtool.methods.zeroquant import ZeroQuant\n"
        "class X(ZeroQuant):\n    name, summary, execution, preset = 'bad', '', '', {'wheights': 'int8'}",
        "unknown key 'wheights'; did you mean weights?",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_method_is_reported_and_harms_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any, desk: Path, qtool_command: Command
) -> None:
    points, code, why = BROKEN[name]
    distribution(tmp_path / "site", "bad", points, f"print('noise')\n{code}")
    distribution(tmp_path / "site", "fine", {"fine": "fine:Fine"}, GOOD)
    monkeypatch.syspath_prepend(tmp_path / "site")
    for module in ("bad", "fine"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    ended = qtool_command("methods", "--json", "-")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert set(found["methods"]) == {"ibert", "zeroquant", "logattn", "fine"}
    (report,) = found["broken"]
    assert (report["name"], report["origin"]) == ("bad", "bad 1.0")
    assert why in report["why"] and "\n" not in report["why"]
    assert "bad 1.0" in qtool_command("methods").out
    ended = qtool_command("quantize", tiny.model, "--method", "bad", "--dry-run")
    assert (ended.code, len(ended.errors)) == (4, 1)
    assert "method 'bad' of bad 1.0 cannot be used" in ended.errors[0] and why in ended.errors[0]
    Path("r.yaml").write_text("methods: [bad]")
    assert qtool_command("quantize", tiny.model, "-c", "r.yaml", "--dry-run").code == 4
    for fine in ("zeroquant", "fine"):
        assert qtool_command("quantize", tiny.model, "--method", fine, "--dry-run").code == 0


def test_names_that_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qtool_command: Command) -> None:
    """A built-in method keeps its name; of two others with one name neither is used."""
    for package in ("one", "two"):
        distribution(tmp_path, package, {"fine": f"{package}:Fine"}, GOOD)
    code = GOOD.replace('"fine"', '"zeroquant"')
    distribution(tmp_path, "thief", {"zeroquant": "thief:Fine"}, code)
    monkeypatch.syspath_prepend(tmp_path)
    found = json.loads(qtool_command("methods", "--json", "-").out)
    assert list(found["methods"]) == ["ibert", "zeroquant", "logattn"] and found["methods"]["zeroquant"]["origin"] == "qtool"
    assert [tuple(report.values()) for report in found["broken"]] == [
        ("fine", "one 1.0", "two 1.0 has one of the same name"),
        ("fine", "two 1.0", "one 1.0 has one of the same name"),
        ("zeroquant", "thief 1.0", "qtool itself has one of this name"),
    ]
    assert methods.method_class("zeroquant").__module__ == "qtool.methods.zeroquant"


def test_built_in_methods_never_import_a_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any, desk: Path, qtool_command: Command
) -> None:
    distribution(tmp_path / "site", "slow", {"slow": "slow:X"}, "raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(plugins, "_load", lambda point: pytest.fail(f"{point.name} was imported"))
    assert qtool_command("quantize", tiny.model, "--method", "zeroquant", "--dry-run").code == 0


def test_methods_without_plugins_needs_no_torch() -> None:
    code = "import sys; from qtool import cli; sys.argv[1:] = ['methods']; cli._status(); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out.splitlines()[-1] == "False"


def test_any_group_and_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`found` knows nothing of methods: the group, the check and the taken names come from its caller."""

    def check(value: Any) -> None:
        if not isinstance(value, int):
            raise TypeError("no number")

    distribution(tmp_path, "numbers_", {"a": "numbers_:A", "b": "numbers_:B", "c": "numbers_:A"}, "A, B = 1, 'x'", "g")
    monkeypatch.syspath_prepend(tmp_path)
    found = plugins.found("g", check, {"c": 0})
    assert found.good == {"a": plugins.Plugin("a", 1, "numbers_ 1.0")}
    assert [(broken.name, broken.why) for broken in found.broken] == [
        ("b", "no number"), ("c", "qtool itself has one of this name"),
    ]  # fmt: skip
    assert plugins.found("qtool.nothing", check) == plugins.Found()
