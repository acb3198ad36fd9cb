"""What an evaluation found, as values, JSON and a file of predictions."""

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qtool.artifact import write_text
from qtool.errors import InputError, UsageError

SCHEMA_VERSION = 1
INTERVAL_LEVEL = 0.95

Prediction = dict[str, Any]


@dataclass(frozen=True)
class Score:
    """A model's score in points (0–100; NaN when it gave NaN) or its perplexity, its forward seconds, the bytes of its
    weight files, whether it is a quantized model, and `others`: the task's further metrics."""

    model: str
    value: float
    seconds: float
    size_bytes: int
    quantized: bool = False
    others: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ProbeInfo:
    """The linear probe behind a score: where its `rows` training examples are from and how its fit went.

    `features` is how many numbers it reads of a text, `c` the inverse of its penalty (scikit-learn's C), `accuracy` its
    own on the training rows, in points; `converged` is False when its iterations ran out.
    """

    source: str
    rows: int
    features: int
    c: float
    accuracy: float
    converged: bool


@dataclass(frozen=True)
class Evaluation:
    """Scores of a candidate and its baseline on the same `n` examples (or tokens: `unit`) of `data`.

    `drop` is the baseline's score minus the candidate's, in points; for perplexity, by how many percent the candidate's
    is above the baseline's (negative: the candidate is better). `interval` is its paired 95 % confidence interval,
    `agreement` the percent of equal predictions (None where numbers are predicted), `speed_ratio` the baseline's
    seconds over the candidate's, `kl` the mean Kullback–Leibler divergence of the candidate's predictive distributions
    from the baseline's, KL(baseline ‖ candidate) in nats (also None where tokens, tags or vocabularies differ or
    numbers are predicted); all five are None without a baseline. A row of `predictions` holds `index` (position
    in the data), `label`, `baseline` and `candidate` by class name, None where there is no prediction. `fingerprint`
    tells whether an evaluation would be the same again. `split` is None for a file that was given as it is.
    """

    task: str
    split: str | None
    data: str
    n: int
    metric: str
    candidate: Score
    baseline: Score | None
    drop: float | None
    interval: tuple[float, float] | None
    agreement: float | None
    speed_ratio: float | None
    probe: ProbeInfo | None
    settings: dict[str, Any]
    predictions: list[Prediction] = field(repr=False)
    unit: str = "examples"
    fingerprint: str | None = None
    kl: float | None = None

    @property
    def relative(self) -> bool:
        """Whether the score has no 0–100 scale (perplexity), so that limits are percent of the baseline's."""
        return self.metric == "perplexity"

    @property
    def points(self) -> float | None:
        """The candidate's score on a 0–100 scale: as it is, or for perplexity `100 · baseline / candidate`."""
        if not self.relative:
            return self.candidate.value
        return None if self.baseline is None else 100.0 * self.baseline.value / self.candidate.value

    def to_json(self) -> dict[str, Any]:
        """The result without its predictions, as JSON values only: NaN and infinity become None."""
        sides = {"candidate": _side(self.candidate), "baseline": _side(self.baseline) if self.baseline else None}
        body = {
            "schema_version": SCHEMA_VERSION,
            "task": self.task,
            "split": self.split,
            "data": self.data,
            "n": self.n,
            "unit": self.unit,
            "metric": self.metric,
            **sides,
            "drop": self.drop,
            "interval": self._interval(),
            "agreement": self.agreement,
            "kl": self.kl,
            "speed_ratio": self.speed_ratio,
            "probe": vars(self.probe) if self.probe else None,
            "settings": self.settings,
            "fingerprint": self.fingerprint,
        }
        return {key: _clean(value) for key, value in body.items()}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> "Evaluation":
        """What `to_json` made, without predictions. Raises InputError for anything else."""
        try:
            values = {name: body[name] for name in _PLAIN}
            interval, probe = body["interval"], body["probe"]
            return cls(
                **values,
                drop=_number(body["drop"]) if body["baseline"] else None,
                candidate=_score(body["candidate"]),
                baseline=_score(body["baseline"]) if body["baseline"] else None,
                interval=(_number(interval["low"]), _number(interval["high"])) if interval else None,
                probe=ProbeInfo(**probe) if probe else None,
                predictions=[],
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"a recorded evaluation is damaged: {error}") from error

    def _interval(self) -> dict[str, float] | None:
        if self.interval is None:
            return None
        return {"level": INTERVAL_LEVEL, "low": self.interval[0], "high": self.interval[1]}


def _side(score: Score) -> dict[str, Any]:
    return {
        "model": score.model,
        "score": score.value,
        "metrics": score.others,
        "seconds": score.seconds,
        "size_bytes": score.size_bytes,
        "quantized": score.quantized,
    }


_PLAIN = ("task", "split", "data", "n", "unit", "metric", "agreement", "kl", "speed_ratio", "settings", "fingerprint")


def _score(side: Mapping[str, Any]) -> Score:
    others = {name: _number(value) for name, value in side["metrics"].items()}
    return Score(side["model"], _number(side["score"]), side["seconds"], side["size_bytes"], side["quantized"], others)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _clean(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value


def _jsonl(rows: list[Prediction]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: list[Prediction]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    # Cells of a csv are single values: lists (tags, several right answers) are written as JSON.
    writer.writerows({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()} for row in rows)
    return stream.getvalue()


_FORMATS: dict[str, Callable[[list[Prediction]], str]] = {".jsonl": _jsonl, ".csv": _csv}


def check_predictions_path(path: Path) -> None:
    """Refuse a path that `write_predictions` could not use: worth asking before a long evaluation.

    Raises UsageError for a suffix other than .jsonl and .csv, InputError for a folder that does not exist.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"predictions are written as {' or '.join(_FORMATS)}, not to {path.name}")
    from qtool.ranks import current  # not at the top: it imports torch

    if current().first and not path.parent.is_dir():  # others write nothing
        raise InputError(f"predictions cannot go to {path}: the folder {path.parent} does not exist")


def write_predictions(evaluation: Evaluation, path: Path) -> None:
    """Write one row an example, in the order of the data, as .jsonl or .csv by the suffix of `path`.

    The file appears whole or not at all; a missing prediction is null, or an empty cell. Raises what
    `check_predictions_path` does, and UnavailableError when the file cannot be written.
    """
    check_predictions_path(path)
    write_text(path, _FORMATS[path.suffix.lower()](evaluation.predictions))
