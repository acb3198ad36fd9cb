"""The model card: README.md of an artifact, from its report.

A card is made to be published: it names no folder and no file of the machine it was made on.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from qtool import artifact
from qtool.nn import parts_of
from qtool.recipe import Recipe
from qtool.rows import READERS


def write(folder: Path) -> None:
    """Make the card of the artifact in `folder` again, from its `qtool.json`: with the scores that it holds by now."""
    report = artifact.report(folder)
    recipe = Recipe.model_validate(report["recipe"]).without_paths().to_yaml()
    card = folder / artifact.CARD
    artifact.write_text(card, render(report, artifact.size_on_disk(folder), recipe, known=header_of(card)))


def render(report: Mapping[str, Any], size_bytes: int, recipe: str, known: Mapping[str, Any] | None = None) -> str:
    """Markdown with the hub's header.

    `report` is the content of qtool.json, `size_bytes` the size of the weight files, `recipe` YAML without local paths.
    `known` is the header of an earlier card: what it says of the source counts when the source itself is gone.
    """
    source = report["source"]
    methods = ", ".join(method["name"] for method in report["recipe"]["methods"])
    name = source["name"] if _on_hub(source) else source["name"].rstrip("/").rsplit("/", 1)[-1]
    kinds = _counts(report["modules"])
    return _TEMPLATE.format(
        header=_header(report, f"{name.rsplit('/', 1)[-1]}-{methods.replace(', ', '-')}", known or {}),
        name=name,
        methods=methods,
        cls=_HEADS[report["head"]][0],
        size=size_bytes / 1e6,
        percent=100 * size_bytes / source["bytes"],
        quantized="\n".join(f"- {count} × {what}" for what, count in kinds.items()),
        kept="\n".join(_kept(report["kept_float"])) or "- nothing",
        scores=_score_table(report.get("scores") or []),
        calibration=report["calibration"] or "none needed; scales of activations are computed at run time",
        arithmetic=_arithmetic(report),
        recipe=recipe.strip(),
    )


_HEADS = {
    "sequence-classification": ("AutoModelForSequenceClassification", "text-classification"),
    "token-classification": ("AutoModelForTokenClassification", "token-classification"),
    "question-answering": ("AutoModelForQuestionAnswering", "question-answering"),
    "masked-lm": ("AutoModelForMaskedLM", "fill-mask"),
    "causal-lm": ("AutoModelForCausalLM", "text-generation"),
    "encoder": ("AutoModel", "feature-extraction"),
}
"""Head → the class that loads it, and the hub's word for what it does."""

_TEMPLATE = """\
---
{header}
---

# {name}, quantized with qtool ({methods})

```python
import qtool  # teaches transformers to read this model
from transformers import {cls}

model = {cls}.from_pretrained("path/to/this/folder")
```

Weights take {size:.1f} MB, {percent:.1f} % of the float model. {arithmetic} Without `import qtool`, loading stops
with an error.
{scores}
## What is quantized

{quantized}

In float:

{kept}

Calibration data: {calibration}.

## The recipe, which makes this model again

```yaml
{recipe}
```
"""


# --- the header

_COPIED: dict[str, type | tuple[type, ...]] = {
    "license": str, "license_name": str, "license_link": str, "language": (str, list), "pipeline_tag": str,
    "base_model": (str, list),
}  # fmt: skip
"""What a card says of its source that is as true of the quantized model."""


def header_of(card: Path) -> dict[str, Any]:
    """What the header of a card says, as far as it is passed on; nothing for a card that is missing or malformed."""
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(card) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return {key: found[key] for key, kind in _COPIED.items() if key in found and _plain(found[key], kind)}


def _plain(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and all(isinstance(item, str) for item in (value if isinstance(value, list) else ()))


def _header(report: Mapping[str, Any], model_name: str, known: Mapping[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    source = report["source"]
    said = {"pipeline_tag": _HEADS[report["head"]][1], **known, **_source_header(source)}
    base = source["name"] if _on_hub(source) else _hub_names(said.pop("base_model", None))
    results = _eval_results(report)
    extra = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    if results:
        extra |= {"model_name": model_name, "eval_results": results}
    data = ModelCardData(library_name="transformers", tags=["qtool", "quantized"], **{**said, **extra})
    return str(data.to_yaml())


def _on_hub(source: Mapping[str, Any]) -> bool:
    return not source["name"].startswith(("/", ".", "~")) and ":" not in source["name"]


def _source_header(source: Mapping[str, Any]) -> dict[str, Any]:
    """From the source's own card: in its folder, or in the hub's cache, which is asked without a connection."""
    from huggingface_hub import try_to_load_from_cache

    if not _on_hub(source):
        return header_of(Path(source["name"]) / artifact.CARD)
    cached = try_to_load_from_cache(source["name"], artifact.CARD, revision=source.get("revision"))
    return header_of(Path(cached)) if isinstance(cached, str) else {}


def _hub_names(base: Any) -> Any:
    """Base models that are names on the hub: a card that was made by a trainer may hold a folder instead."""
    names = [name for name in ([base] if isinstance(base, str) else base or []) if _is_hub_name(name)]
    return names[0] if len(names) == 1 else names or None


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)) and not Path(name).exists()


def _eval_results(report: Mapping[str, Any]) -> list[Any]:
    """One result a metric of each score, where it is a number."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=_task_type(report["head"], score["task"]),
            dataset_type=_data_name(score),
            dataset_name=_data_name(score),
            dataset_split=score.get("split"),
            metric_type=metric,
            metric_name=_metric_name(metric),
            metric_value=round(value, 4),
        )
        for score in report.get("scores") or []
        for metric, value in {score["metric"]: score["candidate"]["score"], **_others(score)}.items()
        if value is not None
    ]


def _others(score: Mapping[str, Any]) -> dict[str, Any]:
    """The task's further metrics."""
    return dict(score["candidate"].get("metrics") or {})


def _task_type(head: str, task: str) -> str:
    """A model without a fitting head was scored by a linear probe, which classifies."""
    probed = head == "encoder" or (head == "masked-lm" and "mask" not in task)
    return "text-classification" if probed else _HEADS[head][1]


def _data_name(score: Mapping[str, Any]) -> str:
    """The hub's name of the data, else the task's: a path of this machine is nobody's business."""
    data = score.get("data") or ""
    on_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*){1,2}(:[\w.-]+)?", data) and Path(data).suffix not in READERS
    return data if on_hub and not Path(data).exists() else score["task"]


def _metric_name(metric: str) -> str:
    return metric if metric == "perplexity" else f"{metric}, points of 100"


# --- the body


def _score_table(scores: Sequence[Mapping[str, Any]]) -> str:
    """The scores with float's beside them, as measured on the same batches."""
    if not scores:
        return ""
    columns = [
        "task",
        "split",
        "examples",
        "metric",
        "float",
        "this model",
        "drop, 95 % interval",
        "agreement %",
        "KL, nats",
    ]
    rows = [_score_row(score) for score in scores]
    lines = ["", "## Scores", "", *map(_row, [columns, ["---"] * len(columns), *rows]), ""]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _score_row(score: Mapping[str, Any]) -> list[str]:
    baseline, interval, drop = score.get("baseline") or {}, score.get("interval") or {}, _number(score.get("drop"), "+")
    drop += " %" * (score["metric"] == "perplexity" and drop != "-")  # of float's, not points
    if interval.get("low") is not None and interval.get("high") is not None:
        drop += f" [{_number(interval['low'], '+')}, {_number(interval['high'], '+')}]"
    return [
        score["task"], score.get("split") or "-", str(score.get("n", "-")), _metric_name(score["metric"]),
        _number(baseline.get("score")), _number(score["candidate"]["score"]), drop, _number(score.get("agreement")),
        "-" if score.get("kl") is None else f"{score['kl']:.3g}",
    ]  # fmt: skip


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"


def _kept(kept_float: Mapping[str, str]) -> list[str]:
    """A line a reason; the same module of every block is named once."""
    groups: dict[str, dict[str, int]] = {}
    for path, reason in kept_float.items():
        group = groups.setdefault(reason, {})
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)
        group[pattern] = group.get(pattern, 0) + 1
    return [
        f"- {reason}: " + ", ".join(f"{f'{n} × ' * (n > 1)}`{pattern}`" for pattern, n in group.items())
        for reason, group in groups.items()
    ]


def _arithmetic(report: Mapping[str, Any]) -> str:
    if any(module["type"].startswith("int_") for module in report["modules"].values()):
        return "Every operation from token ids to logits is integer arithmetic; the logits are the same everywhere."
    kinds = {module["type"] for module in report["modules"].values()}
    if kinds == {"attention_codes"}:
        return f"Weights are float; {report['execution']['arithmetic']}. Nothing is faster for it."
    if "linear" not in kinds:
        return "Tables are stored as integers; products are computed in float."
    product = report["execution"]["arithmetic"].replace("x", "×").replace("->", "→")
    return f"Products are {product}, executed as such; nothing is simulated."


def _counts(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for _, module in (part for item in modules.items() for part in parts_of(*item)):
        specs = [f"{key} {module[key]}" for key in ("weights", "activations") if key in module]
        if not module["type"].startswith("int_"):
            specs = specs or ["codes of the word table"]
        what = module["type"].replace("_", " ") + (f" ({', '.join(specs)})" if specs else "")
        counts[what] = counts.get(what, 0) + 1
    return counts
