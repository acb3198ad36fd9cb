"""The kernels under the sanitizers of the compiler: no access outside an array, nothing undefined, no race.

`native/main.cc` calls all of them; `native/redzones.h` keeps apart the arrays that a call cuts its memory into.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent / "native"
COMMON = "-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all"
SANITIZERS = {"address": "-fsanitize=address,undefined", "thread": "-fsanitize=thread"}
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: object, check: bool = False) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env={**os.environ, **OPTIONS})
    assert done.returncode == 0 or not check, (done.stdout + done.stderr)[-6000:]
    return done


@pytest.fixture(scope="module")
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """main.cc with the library's objects, as CMakeLists.txt builds them, and the sanitizer that is asked for."""
    missing = [tool for tool in ("cmake", "c++") if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    folder = tmp_path_factory.mktemp(request.param)
    flags = f"{SANITIZERS[request.param]} {COMMON}".split()
    (folder / "probe.cc").write_text("int main() { return 0; }\n")
    probe = run("c++", *flags, folder / "probe.cc", "-o", folder / "probe")
    if probe.returncode or run(folder / "probe").returncode:
        pytest.skip(f"the compiler has no {flags[0]}: {probe.stderr[-200:]}")

    sources = folder / "qtool" / "kernels" / "csrc"
    shutil.copytree(ROOT / "qtool" / "kernels" / "csrc", sources)
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    if request.param == "address":
        schedule, redzones = sources / "schedule.h", (HERE / "redzones.h").read_text("utf-8")
        changed, count = re.subn(
            r"^class Cutter \{.*?^\};$",
            lambda match: redzones[redzones.index("class Cutter") :],
            schedule.read_text("utf-8"),
            flags=re.M | re.S,
        )
        assert count == 1
        schedule.write_text("#include <sanitizer/asan_interface.h>\n" + changed, "utf-8")
    build = folder / "build"
    run(
        "cmake",
        "-S",
        folder,
        "-B",
        build,
        "-DCMAKE_BUILD_TYPE=None",
        f"-DCMAKE_CXX_FLAGS={' '.join(flags)}",
        check=True,
    )
    run("cmake", "--build", build, "--parallel", "2", check=True)
    objects = [path for path in sorted(build.rglob("*.cc.o")) if path.name != "interface.cc.o"]
    main = ["c++", "-std=c++17", *flags, f"-I{sources}", HERE / "main.cc", *objects, "-o", folder / "main"]
    run(*main, "-pthread", "-ldl", check=True)
    return folder / "main"


@pytest.mark.parametrize("program", ["address", pytest.param("thread", marks=pytest.mark.exhaustive)], indirect=True)
def test_every_kernel_on_every_instruction_set(program: Path) -> None:
    done = run(program)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "checks of" in done.stdout


def seen(program: Path, mistake: str, message: str) -> bool:
    """Whether the sanitizer ends the program that makes a mistake, on every instruction set."""
    isas = run(program, "isas", check=True).stdout.split()
    ends = [run(program, mistake, isa) for isa in isas]
    return isas[0] == "portable" and all(done.returncode != 0 and message in done.stderr for done in ends)


@pytest.mark.parametrize("program", ["address"], indirect=True)
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("short-input", "AddressSanitizer"),
        ("short-output", "AddressSanitizer"),
        ("short-weight", "AddressSanitizer"),
        ("short-table", "AddressSanitizer"),
        ("neighbour", "use-after-poison"),
        ("overflow", "signed integer overflow"),
    ],
)
def test_a_mistake_would_be_seen(program: Path, mistake: str, message: str) -> None:
    assert seen(program, mistake, message)


@pytest.mark.exhaustive
@pytest.mark.parametrize("program", ["thread"], indirect=True)
def test_a_race_would_be_seen(program: Path) -> None:
    assert seen(program, "race", "data race")
