"""Attention heads removed from the weights, before anything else: smaller and faster, not masked.

Which heads is said by the recipe, or by the `heads.json` of `qtool analyze heads`. What the others compute stays the
same: the size of a head, the scale of its scores and the bias of the output projection do not change.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from qtool.anatomy import Anatomy, Unit
from qtool.calibrate.statistics import Statistics
from qtool.checkpoint import Checkpoint
from qtool.errors import InputError
from qtool.lesson import Lesson
from qtool.methods.base import Method, Options, Plan
from qtool.nn import QModule
from qtool.pruning import attentions, checked, cuts, heads_json, shrink
from qtool.stream import Reader

Numbers = Annotated[int, Field(strict=True, ge=0)]


class HeadPruneOptions(Options):
    """The heads to remove: either of the two. Where keys are grouped, a head is one of keys with all of its queries."""

    heads: dict[int, list[Numbers]] | None = Field(None, description="Layer → heads, both from 0: {0: [1, 5], 3: [2]}")
    file: Path | None = Field(None, description="heads.json of `qtool analyze heads`")

    @model_validator(mode="after")
    def _one(self) -> "HeadPruneOptions":
        if (self.heads is None) == (self.file is None):
            raise ValueError("heads: name the heads to remove, or a file of `qtool analyze heads` under file")
        return self


class HeadPrune(Method):
    """See the module."""

    name = "headprune"
    phase = "shape"
    arithmetic = "float32"
    options_class = HeadPruneOptions
    options: HeadPruneOptions

    def reshape(self, model: Any, checkpoint: Checkpoint) -> None:
        """Cut the heads out. Raises InputError for ones that the model does not have, or a file that names none."""
        wanted = self.options.heads
        if wanted is None:
            assert self.options.file is not None  # one of the two
            wanted = read_heads(self.options.file, checkpoint)
        try:
            self._gone = checked(wanted, attentions(model))
        except InputError as error:
            raise InputError(f"methods.headprune.{error}") from error
        checkpoint.cut(cuts(model, self._gone))
        shrink(model, self._gone)

    def settled(self) -> Mapping[str, Any]:
        """The heads themselves: a file may change, and is nobody's business elsewhere."""
        return {"heads": heads_json(self._gone)}

    def plan(self, anatomy: Anatomy, model: Any) -> Plan:
        """Nothing is quantized here. Raises InputError for rules where no other method could follow them."""
        if self.recipe.rules and len(self.recipe.methods) == 1:
            raise InputError("headprune quantizes nothing, so that no rule can apply; leave out the rules")
        return Plan({}, heads=self._gone)

    def lower(
        self, unit: Unit, plan: Plan, weights: Reader, statistics: Statistics | None, lesson: Lesson | None = None
    ) -> dict[str, QModule]:
        """Nothing is quantized here."""
        return {}


def read_heads(file: Path, checkpoint: Checkpoint | None = None) -> dict[int, list[int]]:
    """`heads` of a file that `qtool analyze heads` wrote. Raises InputError for anything else.

    With a `checkpoint`, also for a file that was made for another model; one that does not say for which is taken.
    """
    try:
        body = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"methods.headprune.file: no file {file}; `qtool analyze heads` makes one") from None
    except (OSError, ValueError) as error:
        raise InputError(f"methods.headprune.file: {file} cannot be read as JSON: {error}") from error
    heads = body.get("heads") if isinstance(body, Mapping) else None
    if not isinstance(heads, Mapping) or not all(map(_is_layer, heads, heads.values())):
        raise InputError(f"methods.headprune.file: {file} has no heads by layer; it is made by `qtool analyze heads`")
    if not heads:
        raise InputError(f"methods.headprune.file: the search in {file} found no head that could go")
    if checkpoint is not None and "fingerprint" in body:
        _check_model(file, body["fingerprint"], checkpoint)
    return {int(layer): own for layer, own in heads.items()}


def _check_model(file: Path, fingerprint: Any, checkpoint: Checkpoint) -> None:
    """Which heads can go is known of the very weights that were searched, not of all that have their shape."""
    known = fingerprint.get("model") if isinstance(fingerprint, Mapping) else None
    if known != checkpoint.digest():
        raise InputError(
            f"methods.headprune.file: {file} is not about {checkpoint.folder} as it is now; search it with "
            "`qtool analyze heads`, or name heads under methods.headprune.heads"
        )


def _is_layer(layer: Any, heads: Any) -> bool:
    """Whether this is a layer as JSON spells it, `"3"` and not `"03"`, and a list of numbers."""
    if not (isinstance(layer, str) and layer.isdecimal() and str(int(layer)) == layer):
        return False
    return isinstance(heads, list) and all(type(number) is int for number in heads)
