"""Scores against threshold and against bits: a model whose attention probabilities are pruned, or cut into codes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256 as sha256_of
from typing import Any

import torch

from qtool.analysis.attending import Attending
from qtool.analysis.coding import Coding
from qtool.artifact import REPORT, checked_quantization, quantization_config, report
from qtool.checkpoint import load_config, locate, sha256, weight_files
from qtool.errors import InputError
from qtool.evaluation.exams.base import Batch
from qtool.evaluation.result import Evaluation
from qtool.evaluation.variants import Variants
from qtool.nn import parts_of
from qtool.numerics.codebook import Codebook, Spacing, prune

THRESHOLDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BITS = (2, 3, 4, 5, 6, 7, 8)
MAPPINGS: tuple[Spacing, ...] = ("log", "linear")
_SHAPE = (
    "architectures", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size",
    "intermediate_size", "vocab_size",
)  # fmt: skip
"""What a config says of a model that is the same in every artifact of it."""


@dataclass(frozen=True)
class Setting:
    """What is done to probabilities: pruned at `threshold` (None: not), and with `bits` also cut into codes, `mapping`
    log or linear, that stand for the middle of their bin (the paper's plain form, rows are not renormalised)."""

    threshold: float | None
    bits: int | None = None
    mapping: Spacing | None = None

    @property
    def key(self) -> str:
        """What tells it apart, in words."""
        pruned = "not pruned" if self.threshold is None else f"pruned at {self.threshold!r}"
        return pruned if self.bits is None else f"{self.mapping}, {self.bits} bits, {pruned}"

    def codebook(self) -> Codebook | None:
        """The codes; None where there is only pruning."""
        if self.bits is None or self.mapping is None:
            return None
        return Codebook.even(self.mapping, self.bits, self.threshold)

    def to_json(self) -> dict[str, Any]:
        """By the names of the fields."""
        return dict(vars(self))


def settings(thresholds: Sequence[float], bits: Sequence[int], bits_thresholds: Sequence[float]) -> list[Setting]:
    """Pruning alone at each threshold; each width and mapping, pruned at each of `bits_thresholds`, then not pruned."""
    pruning = [Setting(threshold) for threshold in thresholds]
    forms = [(mapping, threshold) for threshold in (*bits_thresholds, None) for mapping in MAPPINGS]
    return pruning + [Setting(threshold, width, mapping) for mapping, threshold in forms for width in bits]


class _Changed:
    """Counts zeros among the pairs that exist, while it prunes or codes."""

    def __init__(self, setting: Setting, attending: Attending) -> None:
        self._attending, self._threshold, book = attending, setting.threshold, setting.codebook()
        self._coding = Coding(book) if book else None
        self.pairs = self.zeros = 0

    def __call__(self, batch: Batch) -> AbstractContextManager[None]:
        return self._attending.changed(self._change, batch["attention_mask"])

    def _change(self, path: str, probabilities: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        changed = self._changed(probabilities)
        every = exists.expand(len(changed), 1, *changed.shape[2:])
        self.pairs += int(every.sum()) * changed.shape[1]
        self.zeros += int(((changed == 0) & every).sum())
        return changed

    def _changed(self, probabilities: torch.Tensor) -> torch.Tensor:
        if self._coding is not None:
            return self._coding(probabilities)
        return probabilities if self._threshold is None else prune(probabilities, self._threshold)


def measure(setting: Setting, variants: Variants, attending: Attending) -> dict[str, Any]:
    """One point: scores, and `zeros`, the share of pairs that became zero, of `pairs` in all heads."""
    changed = _Changed(setting, attending)
    found = variants.evaluate(changed, setting.key)
    return {**setting.to_json(), "zeros": changed.zeros / changed.pairs, "pairs": changed.pairs, **scores(found)}


def measure_artifact(artifact: str, variants: Variants) -> dict[str, Any]:
    """A point for an artifact: scores, and `bits` of its attention codes (None: several widths, or no codes)."""
    bits = coded_bits(artifact)
    found = variants.evaluate_artifact(artifact, f"artifact {artifact}")
    return {"artifact": artifact, "bits": bits, "digest": artifact_digest(artifact), **scores(found)}


def check_artifact(artifact: str, variants: Variants, digest: str) -> None:
    """Raises InputError for a folder that is no artifact, or one that was made of another model than is studied.

    Where the source was does not matter, for it may have moved: its digest does (`digest` is the studied model's), and
    without a record, which a re-save drops, what the config says of its shape.
    """
    coded_bits(artifact)
    folder, name = locate(artifact), variants.about()["model"]
    own, studied = load_config(folder), variants.model.config
    for fact in _SHAPE:
        found, wanted = getattr(own, fact, None), getattr(studied, fact, None)
        if found != wanted:
            raise InputError(f"{artifact} was not made of {name}: {fact} is {found} there, and {wanted} here")
    source = report(folder)["source"] if (folder / REPORT).exists() else {}
    if source.get("sha256", digest) != digest:
        raise InputError(
            f"{artifact} was made of other weights, or another config, than {name} has now (its source was "
            f"{source.get('name', 'not recorded')}); study that, or quantize {name}"
        )


_WIDTHS = {"attention_codes": "bits", "coded_attention": "code_bits", "int_coded_attention": "code_bits"}
"""Types of modules that attend on codes, and how they call the width of one."""


def coded_bits(artifact: str) -> int | None:
    """Bits of the attention codes of an artifact. Raises InputError for a folder that holds something else."""
    found = quantization_config(locate(artifact))
    try:
        modules = checked_quantization(found)["modules"].values()
    except InputError as error:
        raise InputError(f"{artifact}: {error}") from error
    parts = [part for module in modules for _, part in parts_of("", module)]
    widths = {part[_WIDTHS[part["type"]]] for part in parts if part.get("type") in _WIDTHS}
    return widths.pop() if len(widths) == 1 else None


def artifact_digest(artifact: str) -> str:
    """SHA-256 over what it computes with: its weight files, and its config.json, which says how codes are used."""
    folder = locate(artifact)
    files = [folder / "config.json", *weight_files(folder)]
    return sha256_of("".join(sha256(file) for file in files).encode()).hexdigest()


def scores(found: Evaluation) -> dict[str, Any]:
    """What a point keeps of an evaluation against the float model; NaN and infinity are None."""
    body = found.to_json()
    own, interval = body["candidate"], body["interval"]
    return {
        "score": own["score"],
        "metrics": own["metrics"],
        "drop": body["drop"],
        "interval": interval and [interval["low"], interval["high"]],
        "agreement": body["agreement"],
        "kl": body["kl"],
        "seconds": own["seconds"],
    }
