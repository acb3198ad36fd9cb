"""The native library against what the kernel and torch say of the same CPU."""

import ctypes.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qtool.kernels import native

needs_library = pytest.mark.skipif(not native.available(), reason=native.reason() or "")


@pytest.fixture
def fresh() -> Iterator[None]:
    """Forget what was loaded, before and after."""
    native._attempt.cache_clear()
    yield
    native._attempt.cache_clear()


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_compiler_means_a_library() -> None:
    assert native.available(), native.reason()
    assert native.reason() is None


@needs_library
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="no /proc/cpuinfo")
def test_features_are_those_of_the_kernel() -> None:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    flags = {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
    assert native.cpu_features() == tuple(name for name in native.FEATURES if name in flags)


@needs_library
@pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="ATEN_CPU_CAPABILITY overrides what torch detects")
def test_features_agree_with_torch() -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    features = native.cpu_features()
    assert ("avx2" in features) == (capability in ("AVX2", "AVX512"))
    assert {"avx512f", "avx512bw"} <= set(features) or capability != "AVX512"


def test_without_the_library_the_reason_says_what_to_do(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(native, "_find", lambda: None)
    assert not native.available()
    assert native.library() is None
    assert native.cpu_features() == ()
    assert "install a C++ compiler" in (native.reason() or "")


def test_a_broken_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "_find", lambda: broken)
    assert not native.available()
    assert str(broken) in (native.reason() or "")


def test_a_library_without_our_functions_is_refused(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    other = Path(ctypes.util.find_library("c") or "")
    monkeypatch.setattr(native, "_find", lambda: other)
    assert not native.available()
    assert "install qtool again" in (native.reason() or "")


@needs_library
def test_a_library_of_another_interface_is_refused(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert not native.available()
    assert f"interface {native.ABI_VERSION - 1}, this qtool needs {native.ABI_VERSION}" in (native.reason() or "")
