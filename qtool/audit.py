"""The overflow audit: what every accumulator of an integer model can reach at most, against what its type holds.

Bounds come from the weights as stored and from the widths of what flows in (docs/math.md, 10), never from data.
"""

from collections.abc import Iterator, Mapping

from qtool.errors import InputError
from qtool.nn import IntModule, QModule
from qtool.nn.integer.module import Bound


def bounds(path: str, module: QModule) -> Iterator[tuple[str, Bound]]:
    """Every bound of a module and of what it contains, with the path."""
    for inside, part in module.named_modules():
        if isinstance(part, IntModule):
            for bound in part.bounds():
                yield f"{path}.{inside}".rstrip("."), bound


def check(lowered: Mapping[str, QModule]) -> dict[str, dict[str, float]]:
    """By path, the fewest bits left in an accumulator. Raises InputError naming a module that could overflow."""
    found: dict[str, dict[str, float]] = {}
    for path, module in lowered.items():
        for where, bound in bounds(path, module):
            if bound.reaches > bound.limit:
                raise InputError(
                    f"{where}: the {bound.what} can reach {bound.reaches:,}, and its type holds {bound.limit:,}; "
                    "use fewer bits (residual_bits, gelu_bits, scores_grid, weights) for this model"
                )
            spare = bound.limit.bit_length() - bound.reaches.bit_length()
            figures = found.setdefault(where, {"spare_bits": spare})
            figures["spare_bits"] = min(figures["spare_bits"], spare)
    return found
