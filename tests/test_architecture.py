"""The dependency rules of docs/architecture.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qtool

ROOT = Path(qtool.__file__).parent
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "plugins", "__init__"}),
    frozenset({"numerics", "rows", "aside", "ranks"}),
    frozenset({"kernels"}),
    frozenset({"device"}),
    frozenset({"anatomy", "checkpoint", "calibrate", "rounding", "nn", "stream", "lesson", "distill", "pruning"}),
    frozenset(
        {
            "artifact",
            "methods",
            "recipe",
            "rundir",
            "golden",
            "card",
            "hf",
            "encoder",
            "decoder",
            "fused",
            "audit",
            "recorded",
        }
    ),
    frozenset(
        {
            "job",
            "lowering",
            "pipeline",
            "watch",
            "memory",
            "spill",
            "follow",
            "purity",
            "evaluation",
            "estimate",
            "inspection",
            "doctor",
            "bench",
            "analysis",
        }
    ),
    frozenset({"api", "jobs"}),
    frozenset({"cli", "console", "demo", "__main__"}),
)
"""Lowest first. A package may import its own layer and those below."""


def _home(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def _imports(path: Path) -> set[str]:
    """Names of qtool packages that a file imports anywhere but under TYPE_CHECKING."""
    found = set()
    tree = ast.parse(path.read_text("utf-8"))
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(child) for node in typed for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qtool":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                name[1] for alias in node.names if (name := alias.name.split("."))[0] == "qtool" and len(name) > 1
            }
    return found


def _layer(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


SOURCES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    home = _home(path)
    if home == "__init__":
        return  # names the API lazily
    known = {name for layer in LAYERS for name in layer}
    upwards = {name for name in _imports(path) if name in known and _layer(name) > _layer(home)}
    assert not upwards, f"{home} imports {', '.join(sorted(upwards))}"


def test_every_module_has_a_layer() -> None:
    assert {_home(path) for path in SOURCES} <= {name for layer in LAYERS for name in layer}


@pytest.mark.parametrize("package", ["kernels", "numerics", "rounding", "nn"])
def test_lower_packages_know_no_models_and_no_files(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        text = path.read_text("utf-8")
        imported = {alias.split(".")[0] for alias in _top_imports(text)}
        assert "transformers" not in imported, path
        if path.name != "native.py":  # finds the library that was built
            assert "pathlib" not in imported, path
        assert "encoder.layer" not in text and "from_pretrained" not in text, path


def _top_imports(text: str) -> set[str]:
    tree = ast.parse(text)
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def test_only_the_console_prints() -> None:
    allowed = {"console.py", "cli/__init__.py", "golden.py", "demo/generate.py"}
    for path in SOURCES:
        calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
        printing = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert path.relative_to(ROOT).as_posix() in allowed or not printing, path


def test_import_is_light() -> None:
    code = "import sys, qtool; print([m for m in ('torch', 'transformers', 'pydantic', 'rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
