"""INT8 products in attention: which modules get them, and what a value code is worth in each head."""

from typing import Any

import torch

from qtool.anatomy import Anatomy, Part, Unit
from qtool.calibrate.ranges import peak
from qtool.calibrate.statistics import Statistics
from qtool.errors import InputError
from qtool.hf import attention_sites
from qtool.methods.base import Plan
from qtool.nn.attention import CHILD, attention_description
from qtool.pruning import is_headless

ATTENTION = ("attention", "coded_attention")
"""Types of modules with INT8 products: with probabilities, and with what logattn makes of them."""
_QMAX = 127
_OBSERVER = "channels"


def plan_attention(anatomy: Anatomy, model: Any) -> dict[str, dict[str, Any]]:
    """Descriptions of the attention of every block, by path.

    Raises InputError naming the architecture where attention or its value projection are not what is known.
    """
    planned: dict[str, dict[str, Any]] = {}
    sites = attention_sites(model)
    for unit in anatomy.blocks:
        own = [site for site in sites if unit.owns(site.path)]
        value = _value(unit)
        if is_headless(model, unit):
            continue
        if len(own) != 1 or value is None or _width(model, value) != own[0].groups * own[0].size:
            raise InputError(
                f"{anatomy.architecture}: {unit.name} has no attention whose values are known to be the output of one "
                "projection; set methods.zeroquant.attention to float"
            )
        planned[f"{own[0].path}.{CHILD}"] = attention_description(own[0].heads, own[0].groups, own[0].size)
    return planned


def value_sites(unit: Unit, plan: Plan) -> dict[str, str]:
    """Where the values of a unit's quantized attention are observed: site → observer."""
    value = _value(unit)
    wanted = any(unit.owns(path) and module["type"] in ATTENTION for path, module in plan.modules.items())
    return {f"{value.path}:output": _OBSERVER} if wanted and value is not None else {}


def value_scale(unit: Unit, groups: int, statistics: Statistics) -> torch.Tensor:
    """max|v| / 127 of each head over the calibration data, float32 `[groups]`; 1 where it was always zero."""
    value = _value(unit)
    assert value is not None  # planned
    channels = peak(statistics.state(f"{value.path}:output", _OBSERVER))
    own = channels if value.rows is None else torch.cat([channels[rows] for rows in value.rows])
    largest = own.view(groups, -1).amax(-1)
    return torch.where(largest > 0, largest / _QMAX, torch.ones_like(largest)).float()


def _value(unit: Unit) -> Part | None:
    return next((part for part in unit.parts if part.name == "attention.value"), None)


def _width(model: Any, part: Part) -> int:
    """How many channels the part gives."""
    if part.rows is not None:
        return sum(rows.stop - rows.start for rows in part.rows)
    return int(model.get_submodule(part.path).weight.shape[1 if part.transposed else 0])
