"""Whether outputs agree, by examples worked out by hand."""

import math

import numpy as np
import pytest

from qtool.bench.agreement import compare
from qtool.bench.batches import COMPARED_ROWS, comparable


def f32(rows: object) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    return np.asarray(rows, dtype=np.float32)


def test_difference_and_top_one() -> None:
    want, have = f32([[3, 4], [0, 12], [1, 0]]), f32([[3, 4], [0, 9], [0, 4]])
    found = compare([{"logits": want}], [{"logits": have}])
    assert found is not None and found.finite and not found.wrong
    assert found.max_abs == 4
    assert found.relative == pytest.approx(math.sqrt((9 + 1 + 16) / (25 + 144 + 1)))
    assert found.top1 == pytest.approx(100 * 2 / 3)


def test_several_batches_count_as_one() -> None:
    found = compare(
        [{"logits": f32([[1, 0]])}, {"logits": f32([[1, 0]])}], [{"logits": f32([[2, 0]])}, {"logits": f32([[0, 1]])}]
    )
    assert found is not None and found.top1 == 50


def test_garbage_is_wrong() -> None:
    want = f32([[2, -2], [-2, 2]])
    for bad in (-want, np.full_like(want, np.nan), f32([[np.inf, 0], [0, 1]])):
        found = compare([{"logits": want}], [{"logits": bad}])
        assert found is not None and found.wrong
    nan = compare([{"logits": want}], [{"logits": np.full_like(want, np.nan)}])
    assert nan is not None and nan.top1 == 0


def test_on_random_tokens_only_gross_errors_are_wrong() -> None:
    want = f32([[0.1, 0.0]])
    undecided = compare([{"logits": want}], [{"logits": want + f32([[0.3, 0]])}], texts=False)
    gross = compare([{"logits": want}], [{"logits": 20 * want}], texts=False)
    assert undecided is not None and not undecided.wrong
    assert gross is not None and gross.wrong


def test_a_number_or_a_hidden_state_has_no_top() -> None:
    number = compare([{"logits": f32([[1], [2]])}], [{"logits": f32([[1], [2]])}])
    state = compare([{"last_hidden_state": f32([[1, 2]])}], [{"last_hidden_state": f32([[1, 2]])}])
    assert number is not None and number.top1 is None
    assert state is not None and state.top1 is None


def test_nothing_in_common_is_no_agreement() -> None:
    assert compare([{"logits": f32([[1, 2]])}], [{"logits": f32([[1, 2, 3]])}]) is None


def test_padding_is_not_compared() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    tokens = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    found = comparable({"logits": tokens, "start_logits": tokens[..., 0]}, mask)
    assert found["logits"].tolist() == [[0, 1], [2, 3], [6, 7]]
    other = tokens.copy()
    other[mask == 0] = 99
    same = compare([found], [comparable({"logits": other, "start_logits": other[..., 0]}, mask)])
    assert same is not None and same.max_abs == 0 and same.top1 == 100


def test_few_tokens_of_many_are_kept() -> None:
    outputs = np.zeros((4, 100, 7), dtype=np.float32)
    assert comparable({"logits": outputs}, np.ones((4, 100), dtype=np.int64))["logits"].shape == (COMPARED_ROWS, 7)
