"""I-BERT (Kim et al., ICML 2021) as post-training quantization: the whole encoder, ids to logits, in integers.

Linears are int8 × int8 → int32 with dyadic rescaling; LayerNorm, softmax, GELU and tanh are the integer functions of
docs/math.md. The residual stream stays wide (the paper's 8 bits only survive retraining), INT8 codes are made token by
token, and what else docs/ibert.md measures is chosen by options.

`layout` says from shapes alone which modules there will be, `lower` fills them; the lifecycle is here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from qtool.anatomy import Anatomy, Unit
from qtool.calibrate.statistics import Statistics
from qtool.errors import InputError
from qtool.lesson import Lesson
from qtool.methods.base import Method, Plan
from qtool.methods.ibert.layout import IBertOptions, Layout
from qtool.methods.ibert.lower import Lowering
from qtool.nn import QModule
from qtool.numerics.grid import Grid
from qtool.stream import Reader

_STAGES = (("query", "key", "value"), ("output",), ("down",))
"""Roles whose mean error is corrected, in order. Not `up`: its grid leaves out what the activation turns to zero."""

__all__ = ["IBert", "IBertOptions"]


class IBert(Method):
    """See the module."""

    name = "ibert"
    phase = "lower"
    arithmetic = "integers only, from token ids to logits"
    options_class = IBertOptions
    options: IBertOptions

    def plan(self, anatomy: Anatomy, model: Any) -> Plan:
        """Raises InputError for a model, an option or a rule that integers cannot serve."""
        self._layout = Layout(anatomy, model, self.recipe, self.options, self.other_paths)
        changes = {"tie_word_embeddings": False} if anatomy.tied_head else {}
        return Plan(self._layout.modules(), {}, changes)

    def observers(self, unit: Unit, plan: Plan) -> dict[str, str]:
        """Ranges of a block's inputs and outputs, and of what goes into a head's activation."""
        return self._layout.observers(unit)

    def resolve(self, plan: Plan, statistics: Statistics | None) -> None:
        """The grid of the residual stream, which all blocks share."""
        if statistics is None:
            raise InputError("ibert calibrates: it needs data or statistics")
        self._lowering = Lowering(self._layout, self.recipe, self.options, statistics)

    @property
    def follows(self) -> bool:
        """Always: errors and saturation are measured where they arise."""
        return True

    def grids(self) -> Mapping[str, Grid]:
        """Of linears and norms."""
        return self._lowering.grids

    def stages(self, unit: Unit) -> Sequence[Sequence[str]]:
        """The linears of a block in the order of its computation."""
        if self.options.bias_correction != "quantized" or unit.kind != "block":
            return ()
        paths = self._layout.block_paths(unit)
        return [[paths[role] for role in stage] for stage in _STAGES]

    def correct(self, module: Any, path: str, error: torch.Tensor) -> None:
        """Bias correction (Nagel et al. 2019), with the inputs of the quantized path."""
        module.add_to_bias(error, self._lowering.grids[path])

    def lower(
        self, unit: Unit, plan: Plan, weights: Reader, statistics: Statistics | None, lesson: Lesson | None = None
    ) -> dict[str, QModule]:
        """Round the matrices of the unit and fill its modules."""
        lowered = self._lowering.unit(unit, plan.modules, weights)
        self._report |= self._lowering.figures
        return lowered
