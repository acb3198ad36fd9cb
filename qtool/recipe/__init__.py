"""Recipes: what to do, as one YAML file with one level of nesting for each concern.

Precedence, weakest first: built-in defaults, preset, file, `--set`, command-line flags. Unknown keys are refused with
the nearest known one. A resolved recipe is written into the artifact, so it can be run again.
"""

from qtool.recipe.files import parse_yaml, preset, preset_folder, presets, read, read_list
from qtool.recipe.layers import assignments, build, check_keys, first_problem, merge, method_list, nested
from qtool.recipe.sections import (
    ActivationSpec,
    Calibration,
    Count,
    Evaluate,
    GateSection,
    MethodChoice,
    Model,
    Recipe,
    Rule,
    Spec,
)

__all__ = [
    "ActivationSpec", "Calibration", "Count", "Evaluate", "GateSection", "MethodChoice", "Model", "Recipe", "Rule",
    "Spec",
    "assignments", "build", "check_keys", "first_problem", "merge", "method_list", "nested", "parse_yaml", "preset",
    "preset_folder", "presets", "read", "read_list",
]  # fmt: skip
