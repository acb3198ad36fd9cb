"""The library in a process: what the environment chooses, Python threads, children of fork, and its constants."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qtool import kernels
from qtool.errors import UnavailableError
from qtool.kernels import integer, native, reference
from qtool.kernels.integer import Native
from qtool.numerics import Dyadic
from qtool.numerics.qtensor import tile

CSRC = Path(native.__file__).parent / "csrc"
needs_library = pytest.mark.skipif(not native.available(), reason=native.reason() or "")
Tensors = tuple[torch.Tensor, ...]
Operation = Callable[[type], Tensors]


# What the environment says


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Forgets what was chosen, before and after."""
    caches = (kernels._default, kernels._make, native.isa, native._attempt)
    for name in ("QTOOL_BACKEND", "QTOOL_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def refusal() -> str:
    """Why there is no backend: one line, the same the second time."""
    with pytest.raises(UnavailableError) as first:
        kernels.backend()
    with pytest.raises(UnavailableError) as second:
        kernels.backend()
    assert str(first.value) == str(second.value)
    assert "\n" not in str(first.value)
    return str(first.value)


@needs_library
@pytest.mark.parametrize("name", ["bogus", "AVX2", " avx2", "avx512", "native", "0"])
def test_an_unknown_instruction_set(fresh: pytest.MonkeyPatch, name: str) -> None:
    fresh.setenv("QTOOL_CPU_ISA", name)
    assert refusal().startswith(f"QTOOL_CPU_ISA={name}: unknown instruction set '{name}'")


@needs_library
@pytest.mark.parametrize("name", native.ISAS[1:])
def test_an_instruction_set_of_another_cpu(fresh: pytest.MonkeyPatch, name: str) -> None:
    fresh.setattr(native, "isas", lambda: ("portable",))
    fresh.setenv("QTOOL_CPU_ISA", name)
    assert refusal() == f"QTOOL_CPU_ISA={name}: this CPU or build has portable"


@pytest.mark.parametrize("name", ["bogus", "Native", "reference ", "cuda"])
def test_an_unknown_backend(fresh: pytest.MonkeyPatch, name: str) -> None:
    fresh.setenv("QTOOL_BACKEND", name)
    assert refusal().startswith(f"QTOOL_BACKEND={name}: unknown backend '{name}'")


def test_the_native_backend_without_its_library(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(native, "_find", lambda: None)
    assert kernels.backend().name == "reference"
    kernels._default.cache_clear()
    fresh.setenv("QTOOL_BACKEND", "native")
    assert refusal() == (
        "the native backend is not available: "
        "qtool was installed without native kernels: install a C++ compiler, then qtool again"
    )


def test_the_native_backend_with_a_broken_library(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_native.so").write_bytes(b"\x7fELF and no more")
    fresh.setattr(native, "_find", lambda: tmp_path / "_native.so")
    fresh.setenv("QTOOL_BACKEND", "native")
    assert str(tmp_path / "_native.so") in refusal()


def test_the_reference_asks_for_no_instruction_set(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("QTOOL_BACKEND", "reference")
    fresh.setenv("QTOOL_CPU_ISA", "bogus")
    assert kernels.backend().name == "reference"


@pytest.mark.slow
@needs_library
@pytest.mark.parametrize("isa", native.ISAS)
def test_an_instruction_set_by_name_in_a_fresh_process(isa: str) -> None:
    if isa not in native.isas():
        pytest.skip(f"this CPU has no {isa}")
    code = """
import torch
from qtool import kernels
from qtool.kernels import native, reference
assert kernels.backend().name == "native"
x = torch.randint(-(1 << 20), 1 << 20, (333, 77), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
for found, wanted in zip(kernels.backend().quantize_rows(x), reference.quantize_rows(x)):
    assert torch.equal(found, wanted)
print(native.isa(), native.code_offset())
"""
    environment = {name: value for name, value in os.environ.items() if name != "QTOOL_BACKEND"} | {
        "QTOOL_CPU_ISA": isa
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa, "127" if isa == "avx512vnni" else "0"]


# Threads and children


def draws(seed: int, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rows(seed: int) -> Operation:
    x = draws(seed, -(1 << 20), 1 << 20, 100 + seed % 50, 61)
    return lambda ops: ops.quantize_rows(x)


def norm(seed: int) -> Operation:
    x, ratio = draws(seed, -(1 << 20), 1 << 20, 50 + seed % 30, 65), Dyadic.from_float(torch.full((65,), 2.0**-12))
    bias = draws(seed, -999, 999, 65)
    return lambda ops: (ops.integer_norm(x, torch.tensor([7]), (ratio.multiplier, ratio.shift), bias, 22),)


def linear(seed: int) -> Operation:
    weight, codes = (draws(seed + i, -127, 127, n, 70, dtype=torch.int8) for i, n in enumerate((99, 40 + seed % 9)))
    amax, bias = draws(seed, 1, 30_000, len(codes), 1, dtype=torch.int64), draws(seed, -(1 << 20), 1 << 20, 99)
    ratio = Dyadic.from_float(torch.full((99,), 2.0**-14))

    def run(ops: type) -> Tensors:
        operand = Native().prepare(tile(weight), (99, 70)) if ops is Native else reference.operand(weight)
        given = torch.tensor([6]), bias, (ratio.multiplier, ratio.shift), 16
        return (ops.integer_linear(codes, amax, operand, None, *given),)

    return run


def attention(seed: int) -> Operation:
    query = draws(seed, -32767, 32767, 2, 19, 2, 9)
    key, value = (draws(seed + i, -127, 127, 2, 19, 2, 9) for i in (1, 2))
    real = draws(seed, 0, 2, 2, 19) > 0
    scores, context = (
        Dyadic.from_float(torch.full(shape, 2.0**places)) for shape, places in (((2, 1, 1), -18), ((2, 1, 9), -6))
    )
    ratios = (scores.multiplier, scores.shift), (context.multiplier, context.shift)
    widths = {"grid": 10, "bits": 14, "context_bits": 16}
    return lambda ops: (ops.integer_attention(query, key, value, real, torch.tensor([3]), *ratios, **widths),)


KINDS = (rows, norm, linear, attention)


@pytest.fixture
def shared_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads even for small operations."""
    monkeypatch.setattr(integer, "_ALONE", -1)
    torch.set_num_threads(2)
    assert integer.threads(0) == 2


def same(operation: Operation, wanted: Tensors | None = None) -> bool:
    wanted = operation(reference.Reference) if wanted is None else wanted
    found = operation(Native)
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) and len(found) > 0


@needs_library
def test_different_operations_at_the_same_time(shared_work: None) -> None:
    operations = [kind(seed) for seed in range(6) for kind in KINDS]
    wanted = [operation(reference.Reference) for operation in operations]
    workers = 6
    start = threading.Barrier(workers)

    def work(first: int) -> list[bool]:
        start.wait()
        torch.set_num_threads(2)
        order = [(first * 5 + i) % len(operations) for i in range(3 * len(operations))]
        return [same(operations[i], wanted[i]) for i in order]

    with ThreadPoolExecutor(workers) as pool:
        assert all(all(results) for results in pool.map(work, range(workers)))


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(operations: list[Operation], wanted: list[Tensors], generations: int = 1) -> int:
    """The exit status of a child that computes `operations` with two threads, as its children do; 0: all are equal."""
    child = os.fork()
    if child:
        return ended(child)
    status = 99
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # a child that hangs is ended
        for _ in range(3):
            status = 0 if all(map(same, operations, wanted)) else 1
        if status == 0 and generations > 1:
            status = in_child(operations, wanted, generations - 1)
    finally:
        os._exit(status)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@needs_library
@needs_fork
@forks
@pytest.mark.parametrize("generations", [1, 2])
def test_children_after_the_parent_used_threads(shared_work: None, generations: int) -> None:
    operations = [kind(seed) for seed in range(2) for kind in KINDS]
    wanted = [operation(reference.Reference) for operation in operations]
    a = torch.randn(300, 300)
    torch.mm(a, a)  # with torch's threads
    assert all(map(same, operations, wanted))
    assert in_child(operations, wanted, generations) == 0
    assert all(map(same, operations, wanted)), "the parent goes on"
    assert in_child(operations, wanted, generations) == 0


@needs_library
@needs_fork
@forks
@pytest.mark.parametrize("threads", [1, 2])
def test_children_of_a_process_that_computes_meanwhile(shared_work: None, threads: int) -> None:
    """The child has one thread of the parent's; what others held when it was made must not stop it."""
    operations = [kind(0) for kind in KINDS]
    wanted = [operation(reference.Reference) for operation in operations]
    busy, results = threading.Event(), []

    def work() -> None:
        torch.set_num_threads(threads)
        while not busy.is_set():
            results.extend(map(same, operations, wanted))

    worker = threading.Thread(target=work)
    worker.start()
    try:
        statuses = [in_child(operations, wanted) for _ in range(15)]
    finally:
        busy.set()
        worker.join()
    assert not any(statuses)
    assert results and all(results)


@pytest.mark.slow
@needs_library
@needs_fork
@pytest.mark.parametrize("first", ["called", "loaded", "imported"])
def test_children_after_torch_used_its_threads(first: str) -> None:
    """torch's OpenMP threads end with the fork, whatever the parent did with the library before."""
    code = """
import os, signal, sys, warnings
import torch
from qtool.kernels import integer, native, reference
warnings.simplefilter("ignore")
torch.set_num_threads(2)
integer._ALONE = -1
x = torch.arange(-90_000, 90_000, dtype=torch.int32).view(-1, 300)
wanted = reference.quantize_rows(x)
(torch.randn(2000, 2000) + 1).sum()
if sys.argv[1] == "loaded":
    assert native.available()
if sys.argv[1] == "called":
    integer.Native.quantize_rows(x)
child = os.fork()
if child == 0:
    signal.alarm(5)
    found = integer.Native.quantize_rows(x)
    os._exit(0 if all(a.numpy().tobytes() == b.numpy().tobytes() for a, b in zip(found, wanted)) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code, first], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


# Names and numbers on both sides


def source(name: str) -> str:
    return (CSRC / name).read_text("utf-8")


def plain(name: str) -> str:
    return name.lower().replace("_", "")


needs_sources = pytest.mark.skipif(not CSRC.is_dir(), reason="installed without sources")


@needs_sources
def test_features_are_those_of_the_library() -> None:
    bits = re.findall(r"^  k(\w+) = 1u << (\d+),", source("cpu.h"), re.M)
    assert [plain(name) for name, _ in bits] == [plain(name) for name in native.FEATURES]
    assert [int(bit) for _, bit in bits] == list(range(len(native.FEATURES)))
    added = re.findall(r"add\(.*, k(\w+)\);", source("cpu.cc"))
    assert sorted(map(plain, added)) == sorted(map(plain, native.FEATURES)), "each is detected, once"


@needs_sources
def test_instruction_sets_are_those_of_the_library() -> None:
    text = source("interface.cc")
    numbers = dict(re.findall(r"\bk(\w+) = (\d+)[,;]", re.search(r"constexpr int kPortableIsa.*?;", text, re.S)[0]))
    assert int(numbers.pop("Isas")) == len(native.ISAS)
    assert {name.removesuffix("Isa").lower(): int(number) for name, number in numbers.items()} == {
        name: index for index, name in enumerate(native.ISAS)
    }
    for kind in ("Integer", "Float"):
        for name, table in re.findall(rf"isa == k(\w+)Isa\) return k{kind}(\w+);", text):
            assert name == table
    built = {path.stem for path in CSRC.glob("*_*.cc")}
    assert built == {f"{kind}_{isa}" for kind in ("integer", "float") for isa in native.ISAS}


@needs_sources
def test_the_interface_has_one_number() -> None:
    found = re.search(r"kAbiVersion = (\d+);", source("interface.cc"))
    assert found and int(found[1]) == native.ABI_VERSION
    status = dict(re.findall(r"\bk(\w+) = (\d+)", re.search(r"enum Status .*?\{.*?\}", source("interface.cc"))[0]))
    assert (int(status["NoMemory"]), int(status["BadId"])) == (native._NO_MEMORY, native._BAD_ID)


C_TYPES = {"int32_t": "c_int", "int64_t": "c_long", "float": "c_float", "double": "c_double"}


@needs_sources
@pytest.mark.parametrize("header", ["integer.h", "float.h"])
def test_structs_have_the_fields_of_the_library(header: str) -> None:
    """Names, order and kinds, by a reader of the few forms of declarations that the headers use."""
    from qtool.kernels import structs

    checked = 0
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", source(header), re.M | re.S):
        if not hasattr(structs, name):
            assert name.endswith("Kernels")  # tables of functions stay inside
            continue
        fields = []
        for declaration in re.sub(r"//.*", "", body).split(";"):
            match = re.match(r"\s*(const )?((?:std::)?\w+)(\*?)\s+(.+?)\s*$", declaration, re.S)
            if match:
                kind = match[2].removeprefix("std::")
                for each in match[4].split(","):
                    pointer = bool(match[3]) or "*" in each
                    fields.append((re.sub(r"\[.*|\W", "", each), "pointer" if pointer else C_TYPES.get(kind, kind)))
        found = []
        for field, kind in getattr(structs, name)._fields_:
            element = kind
            while hasattr(element, "_length_"):
                element = element._type_
            label = element.__name__
            found.append((field, "pointer" if label == "c_void_p" or label.startswith("LP_") else label))
        assert found == fields, name
        checked += 1
    assert checked >= 4
