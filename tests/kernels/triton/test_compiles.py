"""What the compiler makes of the kernels, which needs no GPU: they compile, run on tensor cores, and hold no float.

Interpreting proves the arithmetic; that a kernel also is a program for a GPU, and which one, shows its PTX.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PRODUCTS = {"linear_kernel", "attention_kernel"}
INTEGER = PRODUCTS | {"embed_kernel", "norm_kernel", "quantize_kernel", "tanh_kernel", "gelu_kernel"}
BITS = {"tokens_kernel", "sums_kernel", "int8_kernel"}
ROUNDED = {"add.rn.f32", "mul.rn.f32", "div.rn.f32", "add.rn.f32x2", "mul.rn.f32x2"}
FLOAT_PRODUCTS = {"int8_kernel", "many_rows_kernel"}

EXACT = (
    "mul.rn.f32", "add.rn.f32", "sub.rn.f32", "div.rn.f32", "cvt.rn.f32.", "max.f32", "selp.f32", "setp.",
    "cvt.rmi.ftz.f32.f32", "cvt.rzi.s32.f32", "mov.f32",
)  # fmt: skip
"""One IEEE operation each. The floor flushes denormal numbers, which `attention.exp2` gives it none of."""


def first(capability: int) -> list[Any]:
    """All that are compiled for; the others than the first take minutes, and find the same but for rare defects."""
    others = [other for other in (80, 90, 100) if other != capability]
    return [capability, *(pytest.param(other, marks=pytest.mark.exhaustive) for other in others)]


def compiled(calls: str, capability: int, cache: Path) -> dict[str, Any]:
    """In a process of its own: here Triton may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], *sys.path))),
        "TRITON_CACHE_DIR": str(cache),
    }
    command = [sys.executable, str(HERE / "compiling.py"), calls, str(capability)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return {name: forms[str(capability)] for name, forms in json.loads(result.stdout).items()}


@pytest.mark.parametrize("capability", first(90))
def test_integer_kernels(capability: int, tmp_path: Path) -> None:
    found = compiled("integer_calls", capability, tmp_path)
    assert found.keys() == INTEGER
    for name, forms in found.items():
        assert all(form["tensor_cores"] == (name in PRODUCTS) for form in forms), name
        assert [form["floats"] for form in forms] == [[]] * len(forms), name


@pytest.mark.parametrize("capability", first(100))
def test_tables(capability: int, tmp_path: Path) -> None:
    """A product of many rows runs on tensor cores in bfloat16, where neither its codes nor its rows are rounded."""
    found = compiled("table_calls", capability, tmp_path)
    assert found.keys() == {"split_floats_kernel", "table_vector_kernel", "table_product_kernel"}
    for name, forms in found.items():
        assert all(form["tensor_cores"] == (name == "table_product_kernel") for form in forms), name
    words = {word for form in found["table_product_kernel"] for word in form["floats"] if "mma" in word}
    assert all(".bf16.bf16" in word for word in words) and (words or capability == 100), words


@pytest.mark.parametrize("capability", first(80))
def test_attention_with_float_scores(capability: int, tmp_path: Path) -> None:
    """Each product and sum of floats is rounded by itself, to nearest; none is approximate or in another precision."""
    found = compiled("attention_calls", capability, tmp_path)
    assert found.keys() == {"float_attention_kernel", "tokens_kernel"}  # the second: test_float_linear_kernels
    for form in found["float_attention_kernel"]:
        assert form["tensor_cores"]
        assert {"mul.rn.f32", "add.rn.f32", "sub.rn.f32"} <= set(form["floats"])
        inexact = [name for name in form["floats"] if not name.startswith(EXACT)]
        assert not inexact


@pytest.mark.parametrize("capability", first(80))
def test_float_linear_kernels(capability: int, tmp_path: Path) -> None:
    """What has to give the reference's bits rounds every operation by itself, to the nearest, subnormal or not."""
    found = compiled("float_linear_calls", capability, tmp_path)
    assert found.keys() == BITS | {"few_rows_kernel", "many_rows_kernel", "splits_kernel"}
    for name, forms in found.items():
        assert all(form["tensor_cores"] == (name in FLOAT_PRODUCTS) for form in forms), name
    for name in BITS:
        floats = {instruction for form in found[name] for instruction in form["floats"]}
        assert not [instruction for instruction in floats if re.match("fma|.*approx|div.full", instruction)], name
        assert {instruction for instruction in floats if instruction.startswith(("add", "mul", "div"))} <= ROUNDED
        assert {instruction for instruction in floats if "ftz" in instruction} <= {"cvt.rmi.ftz.f32.f32"}  # floor
    assert all({"div.rn.f32", "add.rn.f32"} <= {*form["floats"]} for form in found["tokens_kernel"])
    assert all(any(one.startswith("mul.rn") for one in form["floats"]) for form in found["int8_kernel"])


@pytest.mark.parametrize("capability", first(100))
def test_steps(capability: int, tmp_path: Path) -> None:
    """Attention is float64 from the loads to the last rounding."""
    found = compiled("step_calls", capability, tmp_path)
    wide = {"sweep_kernel", "join_kernel"}
    assert found.keys() == wide | {"products_kernel", "norm_kernel", "turn_kernel", "gate_kernel", "splits_kernel"}
    assert not any(form["tensor_cores"] for forms in found.values() for form in forms)
    for name in wide:
        for form in found[name]:
            assert not [one for one in form["floats"] if one.startswith(("ex2", "mul.f32", "add.f32", "fma.rn.f32"))]
            assert any(one.startswith("fma.rn.f64") for one in form["floats"]), name


def test_a_float_instruction_would_be_seen(tmp_path: Path) -> None:
    """The same script on a kernel that computes with floats."""
    (tmp_path / "float_calls.py").write_text(
        "import torch, triton, triton.language as tl\n"
        "@triton.jit\n"
        "def scaled(x, y):\n"
        "    tl.store(y, tl.load(x).to(tl.float32) * 0.5 + 1.0)\n"
        "def calls():\n"
        "    scaled[(1,)](torch.zeros(1, dtype=torch.int32), torch.zeros(1))\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        (form,) = compiled("float_calls", 90, tmp_path)["scaled"]
    finally:
        sys.path.remove(str(tmp_path))
    assert any(name.startswith("fma") for name in form["floats"]) and not form["tensor_cores"]
