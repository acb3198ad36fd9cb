"""The model card: README.md of an artifact, from its report."""

from collections.abc import Mapping
from typing import Any

import yaml


def render(report: Mapping[str, Any], size_bytes: int, recipe: str) -> str:
    """Markdown with the hub's header.

    `report` is the content of qtool.json, `size_bytes` the size of the weight file, `recipe` YAML without local paths.
    """
    source = report["source"]
    hub = not source["name"].startswith(("/", ".")) and ":" not in source["name"]
    header: dict[str, Any] = {"library_name": "transformers", "tags": ["qtool", "quantized"]}
    if hub:
        header |= {"base_model": source["name"], "base_model_relation": "quantized"}
    methods = ", ".join(method["name"] for method in report["recipe"]["methods"])
    kinds = _counts(report["modules"])
    return _TEMPLATE.format(
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        name=source["name"] if hub else source["name"].rstrip("/").rsplit("/", 1)[-1],
        methods=methods,
        cls=_AUTO[report["head"]],
        size=size_bytes / 1e6,
        percent=100 * size_bytes / source["bytes"],
        quantized="\n".join(f"- {count} × {what}" for what, count in kinds.items()),
        kept=len(report["kept_float"]),
        calibration=report["calibration"] or "none needed; scales of activations are computed at run time",
        arithmetic=_arithmetic(report),
        recipe=recipe.strip(),
    )


_AUTO = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "masked-lm": "AutoModelForMaskedLM",
    "encoder": "AutoModel",
}

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

Quantized:

{quantized}

In float: {kept} modules, listed with reasons in `qtool.json`. Calibration data: {calibration}.

The recipe, which makes this model again:

```yaml
{recipe}
```
"""


def _arithmetic(report: Mapping[str, Any]) -> str:
    if not any(module["type"] == "linear" for module in report["modules"].values()):
        return "Tables are stored as integers; products are computed in float."
    product = report["execution"]["arithmetic"].replace("x", "×").replace("->", "→")
    return f"Products are {product}, executed as such; nothing is simulated."


def _counts(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in modules.values():
        specs = [f"{key} {module[key]}" for key in ("weights", "activations") if key in module]
        what = f"{module['type'].replace('_', ' ')} ({', '.join(specs) or 'codes of the word table'})"
        counts[what] = counts.get(what, 0) + 1
    return counts
