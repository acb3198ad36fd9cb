"""Codebooks of attention probabilities: the paper's vectors, and brute force over edges in Python floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qtool.errors import InputError
from qtool.numerics.codebook import Codebook, prune

ROW = [0.62, 0.25, 0.08, 0.03, 0.0125, 0.005, 0.0015, 0.0009, 0.0001]
KINDS = {
    "log": Codebook.log,
    "log unpruned": Codebook.log_unpruned,
    "linear": Codebook.linear,
    "linear unpruned": Codebook.linear_unpruned,
}
LOG = {
    2: ([0.001, 0.01, 0.1], [0.0031622776601683794, 0.031622776601683791, 0.31622776601683794]),
    3: (
        [0.001, 0.002682695795, 0.00719685673, 0.01930697729, 0.05179474679, 0.1389495494, 0.372759372],
        [0.001637893707, 0.004393970561, 0.01178768635, 0.0316227766, 0.08483428982, 0.2275845926, 0.6105402297],
    ),
}
LOG_UNPRUNED = {
    2: ([3.16227766e-08, 1e-05, 0.00316227766], [5.623413252e-07, 0.000177827941, 0.05623413252]),
    3: (
        [1.77827941e-09, 3.16227766e-08, 5.623413252e-07, 1e-05, 0.000177827941, 0.00316227766, 0.05623413252],
        [7.498942e-09, 1.33352143e-07, 2.3713737e-06, 4.21696503e-05, 0.00074989421, 0.01333521432, 0.2371373706],
    ),
}
LINEAR = {
    2: ([0.001, 0.334, 0.667], [0.1675, 0.5005, 0.8335]),
    3: (
        [0.001, 0.143714, 0.286429, 0.429143, 0.571857, 0.714571, 0.857286],
        [0.0723571, 0.215071, 0.357786, 0.5005, 0.643214, 0.785929, 0.928643],
    ),
}
LINEAR_UNPRUNED = {
    2: ([0.25, 0.5, 0.75], [0.375, 0.625, 0.875]),
    3: ([i / 8 for i in range(1, 8)], [0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375]),
}
CODES = [
    ("log", 2, [3, 3, 2, 2, 2, 1, 1, 0, 0], 0.7336484),
    ("log", 3, [7, 6, 5, 4, 3, 2, 1, 0, 0], 0.9724014),
    ("log unpruned", 2, [3, 3, 3, 3, 3, 3, 2, 2, 2], 0.3379383),
    ("log unpruned", 3, [7, 7, 7, 6, 6, 6, 5, 5, 4], 0.7529597),
]
TOPS = [
    ("log", 2, 0.316227766),
    ("log", 3, 0.6105402296585326),
    ("log unpruned", 2, 0.05623413251903487),
    ("log unpruned", 3, 0.23713737056616543),
]


def float64(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [("log", LOG), ("log unpruned", LOG_UNPRUNED), ("linear", LINEAR), ("linear unpruned", LINEAR_UNPRUNED)],
)
def test_edges_and_levels_are_the_papers(kind: str, bits: int, expected: dict[int, tuple[list[float], ...]]) -> None:
    mapping, threshold = kind.removesuffix(" unpruned"), None if kind.endswith("unpruned") else 1e-3
    even = Codebook.even(mapping, bits, threshold)  # type: ignore[arg-type]
    codebook = KINDS[kind](bits)
    assert even.edges.equal(codebook.edges) and even.levels.equal(codebook.levels)
    edges, levels = expected[bits]
    assert codebook.edges.tolist() == pytest.approx(edges, rel=2e-6, abs=0)
    assert codebook.levels.tolist() == [0, *(pytest.approx(level, rel=2e-6, abs=0) for level in levels)]


@pytest.mark.parametrize(("kind", "bits", "codes", "total"), CODES)
def test_the_papers_row(kind: str, bits: int, codes: list[int], total: float) -> None:
    codebook = KINDS[kind](bits)
    found = codebook.codes(float64(ROW))
    assert (found.dtype, found.tolist()) == (torch.uint8, codes)
    values = codebook.values(found)
    assert values.tolist() == [codebook.levels[code].item() for code in codes]
    assert values.sum().item() == pytest.approx(total, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "bits", "top"), TOPS)
def test_one_and_what_rounding_puts_beyond_it_get_the_top_code(
    kind: str, bits: int, top: float, dtype: torch.dtype
) -> None:
    codebook = KINDS[kind](bits)
    codes = codebook.codes(torch.tensor([1.0, 1.0000001, 0.0, math.nan], dtype=dtype))
    assert codes.tolist() == [2**bits - 1, 2**bits - 1, 0, 0]
    assert codebook.values(codes)[0].item() == pytest.approx(top, rel=1e-9)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", ["log", "linear"])
@pytest.mark.parametrize("threshold", [1e-3, 0.02, 2**-20])
def test_the_threshold_itself_is_kept_and_what_is_below_is_not(kind: str, bits: int, threshold: float) -> None:
    codebook = KINDS[kind](bits, threshold)
    below = math.nextafter(threshold, 0)
    assert codebook.codes(float64([threshold, below, 0.0])).tolist() == [1, 0, 0]
    assert codebook.levels.numel() == 2**bits


@given(
    arrays.arrays("float64", (3, 7), elements=st.floats(0, 1) | st.sampled_from(ROW)),
    st.sampled_from(sorted(KINDS)),
    st.integers(2, 8),
)
def test_codes_are_those_of_brute_force(rows: object, kind: str, bits: int) -> None:
    codebook = KINDS[kind](bits)
    probabilities = torch.as_tensor(rows)
    edges, levels = codebook.edges.tolist(), codebook.levels.tolist()
    expected = [[sum(edge <= a for edge in edges) for a in row] for row in probabilities.tolist()]
    codes = codebook.codes(probabilities)
    assert codes.tolist() == expected
    assert codebook.values(codes).tolist() == [[levels[code] for code in row] for row in expected]


@given(st.floats(1e-3, 1), st.integers(2, 8))
def test_a_log_code_is_off_by_half_a_bin_at_most(probability: float, bits: int) -> None:
    codebook = Codebook.log(bits)
    value = codebook.values(codebook.codes(float64([probability]))).item()
    width = math.log2(1e3) / (2**bits - 1)
    assert abs(math.log2(value / probability)) <= width / 2 * (1 + 1e-9)


def test_every_head_has_its_own_bins() -> None:
    heads = [Codebook.log(3, threshold) for threshold in (1e-3, 1e-2)]
    both = Codebook(torch.stack([h.edges for h in heads]), torch.stack([h.levels for h in heads]))
    probabilities = torch.rand(2, 2, 5, 6, generator=torch.Generator().manual_seed(1)).pow(6)
    codes = both.codes(probabilities)
    values = both.values(codes)
    for head, codebook in enumerate(heads):
        alone = codebook.codes(probabilities[:, head])
        assert codes[:, head].equal(alone)
        assert values[:, head].equal(codebook.values(alone))
    assert not codes[:, 0].equal(heads[1].codes(probabilities[:, 0]))


@pytest.mark.parametrize(
    ("edges", "levels", "said"),
    [
        (float64([0.1, 0.2]), float64([0, 1]), "one more level"),
        (float64([]), float64([0]), "1 to 255"),
        (float64([0.2, 0.1]), float64([0, 1, 1]), "rise"),
        (float64([0.1, 0.1]), float64([0, 1, 1]), "rise"),
        (float64([0.0, 0.1]), float64([0, 1, 1]), "positive"),
        (float64([math.nan, 0.1]), float64([0, 1, 1]), "positive"),
        (float64([0.1]), float64([0.1, 1]), "level 0"),
        (float64([0.1]), float64([0, -1]), "not negative"),
        (float64([0.1]), float64([0, math.inf]), "finite"),
        (float64([0.1]).float(), float64([0, 1]), "float64"),
    ],
)
def test_what_is_no_codebook_is_refused(edges: torch.Tensor, levels: torch.Tensor, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Codebook(edges, levels)


@pytest.mark.parametrize("bits", [1, 9])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_other_widths_are_refused(kind: str, bits: int) -> None:
    with pytest.raises(InputError, match=f"2 to 8 bits, not {bits}"):
        KINDS[kind](bits)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1e-3, math.nan])
@pytest.mark.parametrize("kind", ["log", "log unpruned", "linear"])
def test_other_thresholds_are_refused(kind: str, threshold: float) -> None:
    with pytest.raises(InputError, match="between 0 and 1"):
        KINDS[kind](3, threshold)


@given(arrays.arrays("float64", (2, 5), elements=st.floats(0, 1)), st.floats(1e-6, 0.9), st.booleans())
def test_pruning_keeps_what_is_above(rows: object, threshold: float, relative: bool) -> None:
    found = prune(torch.as_tensor(rows), threshold, relative=relative)
    for row, pruned in zip(torch.as_tensor(rows).tolist(), found.tolist(), strict=True):
        limit = threshold * max(row) if relative else threshold
        assert pruned == [a if a > limit else 0 for a in row]


def test_pruning_is_strict_and_knows_heads() -> None:
    row = float64([[[0.5, 0.25, 0.25]], [[0.5, 0.3, 0.2]]])
    assert prune(row, 0.25).tolist() == [[[0.5, 0, 0]], [[0.5, 0.3, 0]]]
    assert prune(row, float64([0.2, 0.3])[:, None, None]).tolist() == [[[0.5, 0.25, 0.25]], [[0.5, 0, 0]]]
    assert prune(row, 0.5, relative=True).tolist() == [[[0.5, 0, 0]], [[0.5, 0.3, 0]]]
    assert prune(float64([math.nan, 0.1]), 0.2).isnan().tolist() == [True, False]
