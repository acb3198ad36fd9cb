"""qtool from Python: what the commands do, without their printing.

`quantize` and `evaluate` take the names of the command-line flags. The command line calls the same functions and
renders their events.
"""

from qtool.api.attention import AttentionRequest, analyze_attention
from qtool.api.bench import bench, random_models
from qtool.api.data import calibration_batches, calibration_events, calibration_texts, golden_inputs, planned_batches
from qtool.api.heads import HeadsRequest, analyze_heads
from qtool.api.jobs import (
    DEFAULT_FOLDER,
    LATEST,
    Quantized,
    calibrate_events,
    default_output,
    divided_batches,
    latest,
    note_latest,
    open_job,
    quantize,
    quantize_events,
    read_statistics,
    set_threads,
)
from qtool.api.recipes import FLAG_KEYS, recipe_list, recipe_task, resolve_recipe
from qtool.api.scores import (
    baseline_for,
    evaluate,
    evaluate_recipe,
    evaluations,
    kept_results,
    record_scores,
    recorded_source,
)

__all__ = [
    "DEFAULT_FOLDER",
    "FLAG_KEYS",
    "LATEST",
    "AttentionRequest",
    "HeadsRequest",
    "Quantized",
    "analyze_attention",
    "analyze_heads",
    "baseline_for",
    "bench",
    "calibrate_events",
    "calibration_batches",
    "calibration_events",
    "calibration_texts",
    "default_output",
    "divided_batches",
    "evaluate",
    "evaluate_recipe",
    "evaluations",
    "golden_inputs",
    "kept_results",
    "latest",
    "note_latest",
    "open_job",
    "planned_batches",
    "quantize",
    "quantize_events",
    "random_models",
    "read_statistics",
    "recipe_list",
    "recipe_task",
    "record_scores",
    "recorded_source",
    "resolve_recipe",
    "set_threads",
]  # fmt: skip
