import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import InputError, UnavailableError, UsageError
from qtool.evaluation.result import Evaluation, Prediction, ProbeInfo, Score, write_predictions

ROWS: list[Prediction] = [
    {"index": 0, "label": "positive", "baseline": "positive", "candidate": None},
    {"index": 1, "label": 'odd, "name" – é', "baseline": "a\nb", "candidate": "positive"},
]


def evaluation(**changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "task": "sst2",
        "split": "validation",
        "data": "somewhere",
        "n": 2,
        "metric": "accuracy",
        "candidate": Score("out", math.nan, 0.5, 25, True),
        "baseline": Score("float", 50.0, 1.0, 100),
        "drop": math.nan,
        "interval": (math.nan, math.nan),
        "agreement": math.nan,
        "kl": math.nan,
        "speed_ratio": 2.0,
        "probe": None,
        "settings": {"batch_size": 32, "versions": {"qtool": None}},
        "predictions": ROWS,
    }
    return Evaluation(**{**values, **changes})


def test_json_is_plain_and_nan_is_null() -> None:
    body = evaluation().to_json()
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    assert body["schema_version"] == 1
    assert body["candidate"] == {
        "model": "out", "score": None, "metrics": {}, "seconds": 0.5, "size_bytes": 25, "quantized": True,
    }  # fmt: skip
    assert body["baseline"]["quantized"] is False
    assert (body["drop"], body["agreement"], body["kl"]) == (None, None, None)
    assert body["interval"] == {"level": 0.95, "low": None, "high": None}
    assert "predictions" not in body


def test_json_without_a_baseline() -> None:
    alone = {"baseline": None, "drop": None, "interval": None, "agreement": None, "speed_ratio": None, "kl": None}
    body = evaluation(**alone).to_json()
    assert {key: body[key] for key in alone} == alone


def test_json_of_a_probe() -> None:
    body = evaluation(probe=ProbeInfo("train.jsonl", 4096, 384, 0.01, 87.5, True)).to_json()
    assert body["probe"] == {
        "source": "train.jsonl",
        "rows": 4096,
        "features": 384,
        "c": 0.01,
        "accuracy": 87.5,
        "converged": True,
    }


def test_predictions_as_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(evaluation(), path)
    assert [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]] == ROWS


def test_predictions_as_csv(tmp_path: Path) -> None:
    path = tmp_path / "predictions.CSV"
    path.write_text("old")
    write_predictions(evaluation(), path)
    with path.open(encoding="utf-8", newline="") as stream:
        back = list(csv.DictReader(stream))
    assert back == [{key: "" if value is None else str(value) for key, value in row.items()} for row in ROWS]
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_predictions_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"\.jsonl or \.csv"):
        write_predictions(evaluation(), tmp_path / "predictions.txt")
    with pytest.raises(InputError, match="does not exist"):
        write_predictions(evaluation(), tmp_path / "none" / "predictions.csv")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "predictions.csv"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UnavailableError, match="No space left"):
        write_predictions(evaluation(), path)
    assert path.read_text() == "old" and [item.name for item in tmp_path.iterdir()] == [path.name]
