import math
from typing import Any

import pytest

from qtool.evaluation.gate import Gate
from qtool.evaluation.result import Evaluation, Score


def evaluation(
    score: float = 88.0, drop: float | None = 0.5, agreement: float | None = 99.0, kl: float | None = 0.01
) -> Evaluation:
    baseline = None if drop is None else Score("b", score + drop, 1.0, 10)
    values: dict[str, Any] = {"task": "t", "split": "s", "data": "d", "n": 200, "metric": "accuracy", "settings": {}}
    return Evaluation(
        **values,
        candidate=Score("c", score, 1.0, 5),
        baseline=baseline,
        drop=drop,
        interval=None if drop is None else (drop - 5, drop + 5),
        agreement=agreement,
        speed_ratio=1.0,
        probe=None,
        predictions=[],
        kl=kl,
    )


@pytest.mark.parametrize(
    ("gate", "result", "holds"),
    [
        (Gate(), evaluation(math.nan, None, None), True),
        (Gate(max_drop=0.5), evaluation(drop=0.5), True),
        (Gate(max_drop=0.5), evaluation(drop=0.500000001), False),
        (Gate(max_drop=0.0), evaluation(drop=-3.0), True),
        (Gate(max_drop=0.5), evaluation(drop=math.nan), False),
        (Gate(max_drop=0.5), evaluation(drop=None), False),
        (Gate(max_drop=math.nan), evaluation(drop=0.0), False),
        (Gate(min_score=88.0), evaluation(88.0), True),
        (Gate(min_score=88.0), evaluation(87.99), False),
        (Gate(min_score=0.0), evaluation(math.nan), False),
        (Gate(min_score=88.0), evaluation(drop=None, agreement=None), True),
        (Gate(min_agreement=99.0), evaluation(agreement=99.0), True),
        (Gate(min_agreement=99.0), evaluation(agreement=98.9), False),
        (Gate(min_agreement=0.0), evaluation(agreement=math.nan), False),
        (Gate(min_agreement=0.0), evaluation(agreement=None), False),
        (Gate(max_kl=0.01), evaluation(kl=0.01), True),
        (Gate(max_kl=0.01), evaluation(kl=0.0100001), False),
        (Gate(max_kl=0.0), evaluation(kl=0.0), True),
        (Gate(max_kl=1e300), evaluation(kl=math.inf), False),
        (Gate(max_kl=1e300), evaluation(kl=math.nan), False),
        (Gate(max_kl=1e300), evaluation(kl=None), False),
        (Gate(max_kl=1e300), evaluation(drop=None, kl=None), False),
        (Gate(max_kl=math.nan), evaluation(kl=0.0), False),
    ],
)
def test_what_holds(gate: Gate, result: Evaluation, holds: bool) -> None:
    assert (gate.failures(result) == []) is holds


def test_lines_name_gate_value_and_limit() -> None:
    lines = Gate(max_drop=0.5, min_score=90, min_agreement=99.5).failures(evaluation(drop=1.375, agreement=98.25))
    assert lines == [
        "max-drop: drop is 1.38, limit 0.5 points",
        "min-score: accuracy is 88.00, limit 90 points",
        "min-agreement: agreement is 98.25, limit 99.5 %",
    ]
    assert Gate(max_kl=0.001).failures(evaluation(kl=0.0123456)) == [
        "max-kl: KL divergence is 0.0123, limit 0.001 nats"
    ]
    assert Gate(max_kl=0.001).failures(evaluation(drop=None, kl=None)) == [
        "max-kl: KL divergence was not measured (no baseline), limit 0.001 nats"
    ]
    assert Gate(max_drop=0.5).failures(evaluation(drop=None)) == [
        "max-drop: drop was not measured (no baseline), limit 0.5 points"
    ]
    assert Gate(max_drop=0.5).failures(evaluation(drop=math.nan)) == ["max-drop: drop is NaN, limit 0.5 points"]


def test_rounding_never_hides_a_failure() -> None:
    (line,) = Gate(max_drop=0.5).failures(evaluation(drop=0.501))
    assert "0.501" in line
    (line,) = Gate(max_kl=0.00123).failures(evaluation(kl=0.0012301))
    assert "0.0012301" in line


def test_which_gates_need_a_baseline() -> None:
    assert Gate(max_drop=1).needs_baseline("f1") and Gate(min_agreement=1).needs_baseline("f1")
    assert Gate(max_kl=0).needs_baseline("perplexity")
    assert not Gate(min_score=1).needs_baseline("f1")
    assert Gate(min_score=1).needs_baseline("perplexity")  # percent of the baseline's
    assert not Gate().needs_baseline("perplexity")
