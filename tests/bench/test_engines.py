"""The table of engines, the machine, and what is said about packages that are missing."""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from qtool.bench import engines, machine, runtimes
from qtool.errors import UnavailableError, UsageError


def test_every_engine_has_its_runtime() -> None:
    for engine in engines.ENGINES.values():
        assert find_spec(f"qtool.bench.runtimes.{engine.runtime}") is not None
    assert all(set(names) <= set(engines.ENGINES) for names in engines.DEFAULTS.values())


def test_runtimes_have_their_functions() -> None:
    """Read, not imported: their packages are optional, and some report on being imported."""
    for path in Path(runtimes.__file__).parent.glob("*.py"):
        if path.stem in {engine.runtime for engine in engines.ENGINES.values()}:
            defined = {
                node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)
            }
            assert {"imports", "prepare", "load"} <= defined, path


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


def test_engines_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    found, missing = engines.chosen(None, "cuda")
    assert [engine.name for engine in found] == ["torch", "torch-bf16"]
    assert missing == ["engine torchao needs torchao: pip install 'qtool[bench]'"]
    with pytest.raises(UnavailableError, match="engine torchao needs torchao"):
        engines.chosen(["torchao"], "cuda")
    with pytest.raises(UsageError, match="engine torch-int8 does not run on cuda; those that do: torch, torch-compile"):
        engines.chosen(["torch", "torch-int8"], "cuda")


def test_engines_without_a_cache_do_not_decode() -> None:
    wanted = [engines.ENGINES[name] for name in ("torch", "onnxruntime", "torch-int8", "openvino")]
    found, lines = engines.with_cache(wanted, "1@8", named=False)
    assert [engine.name for engine in found] == ["torch", "torch-int8"]
    assert lines[0] == "engine onnxruntime keeps no cache, which shape 1@8 takes" and len(lines) == 2
    with pytest.raises(UsageError, match=r"engine onnxruntime keeps no cache, .* leave out the engine or the shape"):
        engines.with_cache(wanted, "1@8", named=True)
    assert engines.with_cache(found, "1@8", named=True) == (found, [])
