"""The table of engines, the machine, and what is said about packages that are missing."""

from importlib import import_module
from importlib.util import find_spec

import pytest

from qtool.bench import engines, machine
from qtool.errors import UnavailableError, UsageError


def test_every_engine_has_its_runtime() -> None:
    for engine in engines.ENGINES.values():
        assert find_spec(f"qtool.bench.runtimes.{engine.runtime}") is not None
    assert set(engines.DEFAULT) <= set(engines.ENGINES)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_runtimes_have_their_functions(runtime: str) -> None:
    if find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed (extra 'bench')")
    found = import_module(f"qtool.bench.runtimes.{runtime}")
    assert all(callable(getattr(found, name)) for name in ("imports", "prepare", "load"))


def test_a_missing_package_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None if name == "nncf" else object())
    with pytest.raises(UnavailableError, match=r"engine openvino needs nncf: pip install 'qtool\[bench\]'") as caught:
        engines.chosen(["torch", "openvino"])
    assert caught.value.exit_code == 4
    found, missing = engines.chosen(None)
    assert [engine.name for engine in found] == ["torch", "torch-bf16", "torch-int8", "onnxruntime"]
    assert missing == ["engine openvino needs nncf: pip install 'qtool[bench]'"]


def test_an_unknown_engine_is_refused_with_its_neighbours() -> None:
    with pytest.raises(UsageError, match=r"did you mean .*onnxruntime"):
        engines.chosen(["onnxruntim"])


def test_cpu_facts() -> None:
    text = (
        "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 avx512_vnni sse\n\nprocessor\t: 1\nmodel name\t: B\n"
    )
    assert machine.cpu_facts(text) == ("A CPU", ["avx2", "avx512_vnni"])
    assert machine.cpu_facts("")[1] == []


def test_busy() -> None:
    assert machine.is_busy(1.5, 4) and not machine.is_busy(0.5, 4) and not machine.is_busy(None, 4)
