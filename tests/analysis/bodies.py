"""A study that nobody measured: JSON with numbers that can be found again on the page."""

from typing import Any

import numpy as np

from qtool.analysis.attention import edges

LIMITS = [1e-4, 1e-3, 1e-2]


def summary(draw: np.random.Generator) -> dict[str, Any]:
    counts = draw.integers(10, 1000, len(edges()) - 1).tolist()
    sparsity = sorted(draw.random(len(LIMITS)).round(6).tolist())
    return {
        "rows": 100, "pairs": sum(counts) + 7, "counts": counts, "beneath": 7, "sparsity": sparsity,
        "lost": sorted((draw.random(len(LIMITS)) / 10).round(6).tolist()), "half_mean": float(draw.random() * 9 + 1),
        "half_median": 3.0, "entropy": float(draw.random() * 3), "dispersion": float(draw.random()),
    }  # fmt: skip


def point(draw: np.random.Generator, threshold: float | None, bits: int | None, mapping: str | None) -> dict[str, Any]:
    drop = float(draw.random() * 4 - 1)
    return {
        "threshold": threshold, "bits": bits, "mapping": mapping, "zeros": float(draw.random()), "pairs": 1000,
        "score": 88.99 - drop, "metrics": {}, "drop": drop, "interval": [drop - 0.7, drop + 0.9],
        "agreement": float(90 + 10 * draw.random()), "kl": float(draw.random() / 10), "seconds": 1.0,
    }  # fmt: skip


def body(layers: int = 2, heads: int = 3, *, metric: str = "accuracy", **changes: Any) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    points = [point(draw, limit, None, None) for limit in LIMITS]
    points += [
        point(draw, cut, bits, mapping)
        for cut in (1e-3, None)
        for mapping in ("log", "linear")
        for bits in (2, 3, 8)
    ]  # fmt: skip
    parts = [
        {"module": f"encoder.{layer}", "all": summary(draw), "heads": [summary(draw) for _ in range(heads)]}
        for layer in range(layers)
    ]
    made = {
        "schema_version": 1, "study": "attention", "complete": True, "model": "models/some-model", "task": "sst2",
        "split": "validation", "data": "data/validation.jsonl", "n": 872, "unit": "examples", "metric": metric,
        "settings": {"batch_size": 32, "max_length": 128, "dtype": "float32", "threads": 2, "versions": {"qtool": "1"}},
        "architecture": "SomeModel", "planned": len(points), "float": {"score": 88.99, "metrics": {}, "seconds": 1.0},
        "distribution": {
            "thresholds": LIMITS, "edges": edges().tolist(), "sequences": 872, "mean_length": 24.6, "rows": 100,
            "pairs": 1000, "mean_keys": 29.4, "all": summary(draw), "layers": parts,
            "check": {"drop": 0.0, "agreement": 100.0, "kl": 1e-13},
        },
        "points": points, "artifacts": [], "fingerprint": {},
    }  # fmt: skip
    return {**made, **changes}
