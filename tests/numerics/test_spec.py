"""QuantSpec: spellings, words of compressed-tensors, and what is refused."""

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qtool.numerics
from qtool.errors import InputError
from qtool.numerics import QuantSpec

EXTENT = st.none() | st.integers(1, 5000)
SIGNS = st.sampled_from([(True, False), (False, False), (False, True)])
SPECS = st.builds(
    lambda bits, sign, dynamic, block: QuantSpec(bits, sign[0], dynamic, block, minimum=sign[1]),
    st.integers(2, 32), SIGNS, st.booleans(), st.tuples(EXTENT, EXTENT),
)  # fmt: skip
SMALL = st.sampled_from([None, 1, 2])
"""Extents around the borders between strategies, where two spellings could mean one spec."""


@settings(deadline=None)
@given(SPECS | st.builds(QuantSpec, dynamic=st.booleans(), block=st.tuples(SMALL, SMALL)))
def test_every_spec_survives_both_spellings(spec: QuantSpec) -> None:
    assert QuantSpec.parse(str(spec)) == spec
    assert QuantSpec.parse(spec.words()) == spec
    assert json.loads(json.dumps(spec.words())) == spec.words()
    assert QuantSpec.parse(spec) is spec


@pytest.mark.parametrize(
    ("spelling", "spec", "canonical"),
    [
        ("int8:channel:sym", QuantSpec(8, block=(1, None)), None),
        ("int8:channel", QuantSpec(8, block=(1, None)), "int8:channel:sym"),
        ("int8:token", QuantSpec(8, dynamic=True, block=(1, None)), "int8:token:sym"),
        ("int8:token:sym:dynamic", QuantSpec(8, dynamic=True, block=(1, None)), "int8:token:sym"),
        ("int8:channel:sym:dynamic", QuantSpec(8, dynamic=True, block=(1, None)), "int8:token:sym"),
        ("int8:token:static", QuantSpec(8, block=(1, None)), "int8:channel:sym"),
        ("int4:group:64:sym", QuantSpec(4, block=(1, 64)), None),
        ("int8:rows:48:sym", QuantSpec(8, block=(48, None)), None),
        ("int8:rows:1", QuantSpec(8, block=(1, None)), "int8:channel:sym"),
        ("int8:block:16x64:asym", QuantSpec(8, symmetric=False, block=(16, 64)), None),
        ("int8:block:1x64", QuantSpec(8, block=(1, 64)), "int8:group:64:sym"),
        ("int8:block:*x64:sym", QuantSpec(8, block=(None, 64)), None),
        ("int8:tensor:sym:dynamic", QuantSpec(8, dynamic=True), None),
        ("int16:tensor:static", QuantSpec(16), "int16:tensor:sym"),
        ("int4:group:32:min", QuantSpec(4, symmetric=False, block=(1, 32), minimum=True), None),
        ("int8:tensor:min:dynamic", QuantSpec(8, symmetric=False, dynamic=True, minimum=True), None),
    ],
)
def test_short_spelling(spelling: str, spec: QuantSpec, canonical: str | None) -> None:
    assert QuantSpec.parse(spelling) == spec
    assert str(spec) == (canonical or spelling)


@pytest.mark.parametrize(
    ("words", "spelling"),
    [
        ({}, "int8:tensor:sym"),
        ({"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}, "int8:channel:sym"),
        ({"strategy": "token"}, "int8:token:sym"),
        ({"strategy": "token", "dynamic": False}, "int8:channel:sym"),
        ({"num_bits": 4, "group_size": 128}, "int4:group:128:sym"),
        ({"num_bits": 4, "strategy": "group", "group_size": 128, "block_structure": None}, "int4:group:128:sym"),
        ({"strategy": "rows", "group_size": 48}, "int8:rows:48:sym"),
        ({"strategy": "block", "block_structure": [16, 64]}, "int8:block:16x64:sym"),
        ({"block_structure": "16x64"}, "int8:block:16x64:sym"),
        ({"strategy": "tensor", "symmetric": False, "dynamic": True}, "int8:tensor:asym:dynamic"),
        ({"symmetric": False, "minimum": True, "num_bits": 4, "group_size": 32}, "int4:group:32:min"),
        ({"minimum": True}, "int8:tensor:min"),
        ({"minimum": False}, "int8:tensor:sym"),
    ],
)
def test_compressed_tensors_words(words: dict[str, Any], spelling: str) -> None:
    assert str(QuantSpec.parse(words)) == spelling


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("int8:chanel:sym", "write for example int8:channel:sym"),
        ("int8", "write for example"),
        ("int8\nchannel", "write for example"),
        ("int8:channel:sym:", "write for example"),
        ("int8:group:sym", "write for example"),
        ("int8:channel:64", "write for example"),
        ("int1:channel", "num_bits must be a whole number from 2 to 32, not 1"),
        ("int33:channel", "num_bits"),
        ("int4:group:0", "at least 1, not 0"),
        (8, "cannot read 8"),
        ({"num_bit": 8}, "unknown quantization key 'num_bit'; did you mean num_bits?"),
        ({"strategy": "chanel"}, "did you mean channel"),
        ({"strategy": ["tensor"]}, "unknown quantization strategy"),
        ({"type": "float"}, "type must be 'int'"),
        ({"num_bits": True}, "num_bits"),
        ({"num_bits": 8.0}, "num_bits"),
        ({"dynamic": "local"}, "dynamic must be true or false, not 'local'"),
        ({"symmetric": 1}, "symmetric must be true or false"),
        ({"minimum": "float"}, "minimum must be true or false, not 'float'"),
        ({"symmetric": True, "minimum": True}, "minimum: true is not symmetric"),
        ({"strategy": "group"}, "strategy 'group' needs group_size"),
        ({"strategy": "rows"}, "strategy 'rows' needs group_size"),
        ({"strategy": "tensor", "group_size": 64}, "strategy 'tensor' does not take group_size"),
        ({"strategy": "block", "group_size": 64}, "strategy 'block' does not take group_size"),
        ({"strategy": "block"}, "strategy 'block' needs block_structure"),
        ({"group_size": 64, "block_structure": [1, 64]}, "does not take block_structure"),
        ({"group_size": -1}, "at least 1, not -1"),
        ({"block_structure": [16]}, "block_structure must be a pair"),
        ({"block_structure": "16*64"}, "block_structure must be a pair"),
        ({"block_structure": {"rows": 1, "columns": 2}}, "block_structure must be a pair"),
        ({"block_structure": [16, "64"]}, "at least 1, not '64'"),
    ],
)
def test_refusals_are_one_clear_line(value: Any, says: str) -> None:
    with pytest.raises(InputError) as error:
        QuantSpec.parse(value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_block_is_a_pair() -> None:
    with pytest.raises(InputError, match="a block is a pair"):
        QuantSpec(block=[1, None])  # type: ignore[arg-type]  # what an untyped caller may pass


@pytest.mark.parametrize(
    ("bits", "qmax", "storage"),
    [
        (2, 1, "nibble"),
        (4, 7, "nibble"),
        (5, 15, "int8"),
        (8, 127, "int8"),
        (9, 255, "int16"),
        (16, 32767, "int16"),
        (17, 65535, "int32"),
        (32, 2147483647, "int32"),
    ],
)
def test_code_range_and_storage(bits: int, qmax: int, storage: str) -> None:
    symmetric, asymmetric = QuantSpec(bits), QuantSpec(bits, symmetric=False)
    assert (symmetric.qmin, symmetric.qmax, symmetric.storage) == (-qmax, qmax, storage)
    assert (asymmetric.qmin, asymmetric.qmax) == (-qmax - 1, qmax)


@pytest.mark.parametrize(
    ("spelling", "shape"),
    [
        ("tensor", (1, 1)),
        ("channel", (768, 1)),
        ("token", (768, 1)),
        ("group:64", (768, 6)),
        ("rows:48", (16, 1)),
        ("block:16x64", (48, 6)),
        ("block:*x64", (1, 6)),
        ("group:100", (768, 4)),
        ("group:1000", (768, 1)),
        ("block:48x7", (16, 55)),
    ],
)
def test_scale_shape(spelling: str, shape: tuple[int, int]) -> None:
    assert QuantSpec.parse(f"int8:{spelling}").scale_shape((768, 384)) == shape


@pytest.mark.parametrize(
    ("spelling", "says"),
    [
        ("rows:500", "groups of 500 rows do not divide 768 rows .*768x384.*a divisor such as 384 or 768$"),
        ("rows:1000", "a divisor such as 768$"),
        ("block:100x7", "groups of 100 rows .* such as 96 or 128$"),
    ],
)
def test_rows_that_do_not_divide_name_their_neighbours(spelling: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        QuantSpec.parse(f"int8:{spelling}").scale_shape((768, 384))


def test_specs_need_no_torch() -> None:
    code = "import sys, qtool.numerics as n; n.QuantSpec.parse('int8:token'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_torch_classes_are_exported() -> None:
    for name in qtool.numerics.__all__:
        assert getattr(qtool.numerics, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'QTensors'"):
        _ = qtool.numerics.QTensors
