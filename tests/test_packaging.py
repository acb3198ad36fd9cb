"""The package as it is installed: its version, its pins, the files it carries, and both ways of building it."""

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from importlib import resources
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import qtool

ROOT = Path(__file__).resolve().parents[1]


def constraints() -> dict[str, Version]:
    """Package name → pinned version, for the pins that apply to this Python."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("=="))
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def requirements() -> list[Requirement]:
    """What qtool asks for, extras included, but for the extras that name qtool itself."""
    asked = [Requirement(line) for line in importlib.metadata.requires("qtool") or []]
    return [requirement for requirement in asked if requirement.name != "qtool"]


def test_one_version() -> None:
    assert importlib.metadata.version("qtool") == qtool.__version__


def test_changelog_starts_with_this_version() -> None:
    first = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert first is not None
    assert first[1] == qtool.__version__


def test_constraints_pin_exactly_and_name_no_place() -> None:
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        assert re.fullmatch(
            r'#.*|[a-z0-9-]+==[0-9.]+( ; python_version >= "3\.\d+"| ; sys_platform == "linux")?', line
        ), line


def test_constraints_satisfy_what_qtool_asks_for() -> None:
    pins = constraints()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        if sys.version_info >= (3, 11) or name in pins:
            assert requirement.specifier.contains(pins[name]), requirement


@pytest.mark.parametrize(
    "path",
    ["py.typed", "demo/sentences.jsonl", "demo/language.txt", "demo/adapter.safetensors", "calibrate/sentences.txt"],
)
def test_data_files_are_installed(path: str) -> None:
    assert resources.files("qtool").joinpath(*path.split("/")).is_file()


def test_ci_script_parses() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_network_is_guarded() -> None:
    with pytest.raises(pytest.fail.Exception, match="no network"):
        socket.create_connection(("192.0.2.1", 443), timeout=1)
    with pytest.raises(pytest.fail.Exception, match="no network"):
        socket.getaddrinfo("example.com", 443)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a build reads, so that nothing is written into the real checkout."""
    copy = tmp_path / "checkout"
    for name in ("qtool", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    return copy


def built_wheel(checkout: Path, **environment: str) -> Path:
    out = checkout.parent / "wheels"
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", str(out), str(checkout)], check=True, env=os.environ | environment, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def carried_files(wheel: Path) -> set[str]:
    """The files of a wheel, but for its metadata folder."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def expected_files(checkout: Path) -> set[str]:
    """Every file of qtool/ but the C++ sources, and the presets under their place in the package."""
    sources = {str(path.relative_to(checkout)) for path in (checkout / "qtool").rglob("*") if path.is_file()}
    presets = {f"qtool/configs/{path.name}" for path in (checkout / "configs").iterdir()}
    return {path for path in sources if not path.startswith("qtool/kernels/csrc/")} | presets


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
def test_wheel_without_a_compiler_is_pure_python(checkout: Path) -> None:
    wheel = built_wheel(checkout, CXX=str(checkout / "no-such-compiler"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert carried_files(wheel) == expected_files(checkout)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="cmake or a C++ compiler is missing")
def test_wheel_with_a_compiler_carries_the_native_library(checkout: Path) -> None:
    wheel = built_wheel(checkout)
    assert re.fullmatch(r"qtool-.+-py3-none-(?!any).+\.whl", wheel.name)
    (native,) = carried_files(wheel) - expected_files(checkout)
    assert re.fullmatch(r"qtool/kernels/_native\.(so|dll)", native)
