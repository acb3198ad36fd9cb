"""What the compiler made of csrc/: integer kernels without float arithmetic, nothing shared by instruction sets."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = [tool for tool in ("cmake", "c++", "objdump", "nm") if not shutil.which(tool)]
FLOAT = re.compile(
    r"^(v?(add|sub|mul|div|sqrt|rcp|rsqrt|min|max|round|rndscale|cmp|comi|ucomi|hadd|dp|cvt|fn?m(add|sub)\w*?)\w*?(ss|sd|ps|pd)"
    r"(2\w+)?|v?cvt\w+|f(ld|st|add|sub|mul|div|sqrt|ild|ist|xch|com)\w*)$"
)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Object files by the name of their source."""
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}")
    build = tmp_path_factory.mktemp("build")
    for command in (["cmake", "-S", ROOT, "-B", build], ["cmake", "--build", build, "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning:" not in done.stdout + done.stderr
    return {path.name.removesuffix(".cc.o"): path for path in build.rglob("*.cc.o")}


def instructions(path: Path) -> set[str]:
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    ).stdout
    return {match[1] for match in re.finditer(r"^\s+[0-9a-f]+:\s+(\S+)", text, re.M)}


@pytest.mark.slow
def test_integer_kernels_hold_no_float_arithmetic(objects: dict[str, Path]) -> None:
    kinds = [name.partition("_")[2] for name in objects if name.startswith("integer_")]
    assert "portable" in kinds
    for kind in kinds:
        found = {name for name in instructions(objects[f"integer_{kind}"]) if FLOAT.match(name)}
        assert not found, kind
        assert any(FLOAT.match(name) for name in instructions(objects[f"float_{kind}"])), kind  # or nothing would be


@pytest.mark.slow
def test_instruction_sets_share_no_code(objects: dict[str, Path]) -> None:
    """Of a function that several objects define the linker keeps one, which another CPU may not be able to run."""
    for name, path in objects.items():
        text = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        weak = [line for line in text.splitlines() if re.match(r"^[0-9a-f]+ [Wu] ", line)]
        if "_" in name:
            assert not weak, name
    assert any(
        re.search(r"^[0-9a-f]+ [Wu] ", subprocess.run(["nm", "-C", path], capture_output=True, text=True).stdout, re.M)
        for name, path in objects.items()
        if "_" not in name
    )  # the others do have such code


@pytest.mark.parametrize(
    ("name", "is_float"),
    [
        *[(name, True) for name in ("vaddps", "mulsd", "vfmadd231ps", "vcvtdq2ps", "cvttss2si", "vrndscaleps", "fldt")],
        *[(name, False) for name in ("vpmuldq", "vmovups", "vpdpbusd", "movss", "vpmaxsd", "vbroadcastss", "vpaddd")],
    ],
)
def test_what_counts_as_float_arithmetic(name: str, is_float: bool) -> None:
    assert bool(FLOAT.match(name)) == is_float
