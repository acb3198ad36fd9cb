"""A study of attention that an earlier run wrote: read again, and seen to be whole, before anything builds on it."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from qtool.analysis.attention import Summary, edges
from qtool.errors import InputError
from qtool.numerics.codebook import Spacing

Limit = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(gt=0)]
Bits = Annotated[int, Field(ge=2, le=8)]
Divergence = Annotated[float, Field(ge=0)]


class _Float(BaseModel):
    score: float
    metrics: dict[str, Any]
    seconds: float


class _Compared(BaseModel):
    """A score against the float model's; None is what could not be told."""

    score: float | None
    metrics: dict[str, Any]
    drop: float | None
    interval: tuple[float | None, float | None] | None
    agreement: float | None
    kl: Divergence | None
    seconds: float
    bits: Bits | None


class _Point(_Compared):
    threshold: Limit | None
    mapping: Spacing | None
    zeros: float
    pairs: Count

    @model_validator(mode="after")
    def _is_a_setting(self) -> "_Point":
        if (self.mapping is None) != (self.bits is None) or (self.bits is None and self.threshold is None):
            raise ValueError("no setting has this threshold, bits and mapping together")
        return self


class _Artifact(_Compared):
    artifact: str
    digest: str


class _Layer(BaseModel):
    module: str
    all: Summary
    heads: Annotated[list[Summary], Field(min_length=1)]


class _Check(BaseModel):
    drop: float | None
    agreement: float | None
    kl: Divergence | None


class _Distribution(BaseModel):
    thresholds: Annotated[list[Limit], Field(min_length=1)]
    edges: list[float]
    sequences: Count
    mean_length: float
    rows: Count
    pairs: Count
    mean_keys: float
    all: Summary
    layers: Annotated[list[_Layer], Field(min_length=1)]
    check: _Check

    @model_validator(mode="after")
    def _fits(self) -> "_Distribution":
        if self.edges != edges().tolist():
            raise ValueError("edges are not those of this histogram")
        for one in (self.all, *(each for layer in self.layers for each in (layer.all, *layer.heads))):
            told, limits = (len(one.sparsity), len(one.lost)), len(self.thresholds)
            if told != (limits, limits) or len(one.counts) != len(self.edges) - 1 or min(one.pairs, one.rows) < 1:
                raise ValueError("a head has other numbers of counts, thresholds, rows or pairs")
        return self


class _Study(BaseModel):
    schema_version: Literal[1]
    fingerprint: dict[str, Any]
    float: _Float
    distribution: _Distribution
    points: list[_Point]
    artifacts: list[_Artifact]


def read_study(file: Path) -> dict[str, Any]:
    """The JSON of a study. Raises InputError for a file that is none, or one that is damaged."""
    again = "start again with --overwrite"
    try:
        text = file.read_text("utf-8")
        body = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error}); {again}") from error
    if not isinstance(body, dict) or body.get("study") != "attention":
        raise InputError(f"{file} is no study of attention; choose another -o")
    try:
        _Study.model_validate_json(text, strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(f"{file} is damaged ({where}: {problem['msg']}); {again}") from error
    return body
