"""The study of a model's attention: what its probabilities are like, and what scores do when they are pruned or coded.

Everything found lies in one JSON value, which is handed to `write` after each part: a study that is killed goes on from
what was written last.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from qtool import ranks
from qtool.analysis.attending import Attending
from qtool.analysis.attention import HeadTally, edges, summarise
from qtool.analysis.sweep import (
    BITS,
    THRESHOLDS,
    Setting,
    artifact_digest,
    check_artifact,
    measure,
    measure_artifact,
    scores,
    settings,
)
from qtool.errors import InputError, UsageError
from qtool.evaluation.exams.base import Batch
from qtool.evaluation.variants import Variants

SCHEMA_VERSION = 1
MARK = 1e-3
"""The paper's threshold: where codes begin unless asked otherwise."""

P = TypeVar("P")
Body = dict[str, Any]
Write = Callable[[Body], None]


@dataclass(frozen=True)
class Asked:
    """Thresholds of sparsity and of pruning alone; widths of codes and the thresholds at which they are pruned; whether
    scores are wanted at all (`sweep`), or only the distribution; artifacts that are shown beside the plain forms."""

    thresholds: Sequence[float] = THRESHOLDS
    bits: Sequence[int] = BITS
    bits_thresholds: Sequence[float] = (MARK,)
    sweep: bool = True
    artifacts: Sequence[str] = ()

    def __post_init__(self) -> None:
        for value in (*self.thresholds, *self.bits_thresholds):
            if not 0 < value < 1:
                raise UsageError(f"a threshold lies between 0 and 1, not at {value:g}")
        for value in self.bits:
            if not 2 <= value <= 8:
                raise UsageError(f"attention codes have 2 to 8 bits, not {value}")
        if not self.thresholds:
            raise UsageError("name at least one threshold")
        if self.artifacts and not self.sweep:
            raise UsageError("an artifact is shown by its scores; without a sweep there are none")

    def settings(self) -> list[Setting]:
        """The points of the sweeps, in the order in which they are measured."""
        if not self.sweep:
            return []
        return settings(sorted(set(self.thresholds)), sorted(set(self.bits)), sorted(set(self.bits_thresholds)))


def study(
    variants: Variants, asked: Asked, fingerprint: Mapping[str, Any], write: Write, known: Body | None = None
) -> Body:
    """Measure what `known` (what an earlier run wrote) does not have yet, and return all that was asked for.

    Raises InputError where `known` was measured under another fingerprint, naming what differs, for an artifact of
    another model, and for a model whose attention cannot be looked at.
    """
    if known is not None:
        require_equal(known.get("fingerprint", {}), fingerprint)
    for artifact in asked.artifacts:
        check_artifact(artifact, variants, str(fingerprint["model"]))  # said before hours of work
    attending = Attending(variants.model)
    body = _begin(variants, asked, fingerprint, known or {})
    if body["distribution"] is None:
        limits = {*asked.thresholds, *((known or {}).get("distribution") or {}).get("thresholds", ())}
        found = _float(variants), _distribution(variants, attending, sorted(limits))
        body["float"], body["distribution"] = ranks.current().told("float model", list(found))
        write(body)
    there = {_key(point) for point in body["points"]}
    settings = [setting for setting in asked.settings() if setting.key not in there]
    for points in _shared(settings, lambda setting: measure(setting, variants, attending)):
        body["points"] += points
        write(body)
    shown = {found["artifact"] for found in body["artifacts"]}
    artifacts = [artifact for artifact in asked.artifacts if artifact not in shown]
    for points in _shared(artifacts, lambda artifact: measure_artifact(artifact, variants)):
        body["artifacts"] += points
        write(body)
    return _finished(body, asked)


def _shared(pieces: Sequence[P], measured: Callable[[P], dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """What is measured of each piece, a round at a time in which every rank takes one."""
    group = ranks.current()
    for start in range(0, len(pieces), group.size):
        mine = start + group.rank
        found = {mine: measured(pieces[mine])} if mine < len(pieces) else {}
        yield list(ranks.gathered("pieces of the study", found).values())


def require_equal(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises InputError that names the facts in which two fingerprints differ."""
    different = [name for name in sorted({*known, *wanted}) if known.get(name) != wanted.get(name)]
    if different:
        raise InputError(
            f"the study was started with a different {', '.join(different)}; repeat the first command with --resume, "
            "or start again with --overwrite"
        )


def _begin(variants: Variants, asked: Asked, fingerprint: Mapping[str, Any], known: Body) -> Body:
    """All that is known, also what is not asked for any more: it was measured. What is missing is None or not there."""
    found, points = known.get("distribution"), list(known.get("points", []))
    artifacts = [one for one in known.get("artifacts", []) if one["digest"] == _digest_now(one["artifact"])]
    wanted = {*(setting.key for setting in asked.settings()), *map(_key, points)}
    shown = {*asked.artifacts, *(one["artifact"] for one in artifacts)}
    about = variants.about()
    return {
        "schema_version": SCHEMA_VERSION,
        "study": "attention",
        "complete": False,
        **about,
        "architecture": type(variants.model).__name__,
        "planned": len(wanted) + len(shown),
        "float": known.get("float"),
        "distribution": found if found and {*asked.thresholds} <= {*found["thresholds"]} else None,
        "points": points,
        "artifacts": artifacts,
        "fingerprint": dict(fingerprint),
    }


def _digest_now(artifact: str) -> str | None:
    """None where there is no such artifact any more."""
    try:
        return artifact_digest(artifact)
    except InputError:
        return None


def _key(point: Mapping[str, Any]) -> str:
    return Setting(point["threshold"], point["bits"], point["mapping"]).key


def _finished(body: Body, asked: Asked) -> Body:
    """Points and artifacts in the order in which they were asked for, whatever the order in which runs measured them.

    What only an earlier run asked for comes last.
    """
    order = {setting.key: index for index, setting in enumerate(asked.settings())}
    places = {artifact: index for index, artifact in enumerate(asked.artifacts)}
    points = sorted(body["points"], key=lambda point: order.get(_key(point), len(order)))
    artifacts = sorted(body["artifacts"], key=lambda found: places.get(found["artifact"], len(places)))
    return {**body, "points": points, "artifacts": artifacts, "complete": True}


def _float(variants: Variants) -> dict[str, Any]:
    found = scores(variants.baseline())
    return {name: found[name] for name in ("score", "metrics", "seconds")}


def _distribution(variants: Variants, attending: Attending, thresholds: Sequence[float]) -> dict[str, Any]:
    """Of every head, every layer and all together; `check` says how far the looked-at model is from the float one."""
    limits = sorted(set(thresholds))
    tallies: dict[str, HeadTally] = {}

    def look(path: str, probabilities: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        tallies.setdefault(path, HeadTally(probabilities.shape[1], limits)).update(probabilities, exists)
        return probabilities

    def altered(batch: Batch) -> Any:
        return attending.changed(look, batch["attention_mask"])

    check, every = scores(variants.evaluate(altered, "look at attention")), slice(None)
    layers = [
        {
            "module": path,
            "all": tallies[path].summary().to_json(),
            "heads": [tallies[path].summary(slice(h, h + 1)).to_json() for h in range(tallies[path].heads)],
        }
        for path in attending.modules
    ]
    total = summarise([(tally, every) for tally in tallies.values()])
    first = tallies[attending.modules[0]]
    return {
        "thresholds": limits,
        "edges": edges().tolist(),
        "sequences": len(variants.lengths),
        "mean_length": sum(variants.lengths) / len(variants.lengths),
        "rows": first.rows,
        "pairs": first.pairs,
        "mean_keys": first.pairs / first.rows,
        "all": total.to_json(),
        "layers": layers,
        "check": {name: check[name] for name in ("drop", "agreement", "kl")},
    }
