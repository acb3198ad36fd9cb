"""Do two engines compute the same? A fast engine that does not is not fast."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qtool.bench.batches import FAR_BELOW, Outputs

Values = NDArray[np.float32]

WRONG = 1.0
"""Relative L2 error from which outputs on texts are no better than zeros would be."""

_WRONG_ON_RANDOM = (
    10.0  # random tokens may leave a model undecided: logits near zero, and any error is large beside them
)


@dataclass(frozen=True)
class Agreement:
    """How outputs compare with float32's.

    `max_abs` is the largest difference, `relative` the L2 norm of all differences over that of the reference,
    `top1` the percent of rows with the same largest logit (None where an output has no classes), `finite` whether
    there was no NaN or infinity; `texts` whether the inputs were texts.
    """

    max_abs: float
    relative: float
    top1: float | None
    finite: bool
    texts: bool = True

    @property
    def wrong(self) -> bool:
        """Whether speed would mean nothing."""
        return not (self.finite and self.relative < (WRONG if self.texts else _WRONG_ON_RANDOM))


def compare(reference: Sequence[Outputs], found: Sequence[Outputs], texts: bool = True) -> Agreement | None:
    """Outputs of the same batches; None where the two have no output of one name and shape in common."""
    pairs = [
        (name, want, mine[name])
        for wanted, mine in zip(reference, found, strict=True)
        for name, want in wanted.items()
        if name in mine and mine[name].shape == want.shape
    ]
    if not pairs:
        return None
    errors = [np.abs(have.astype(np.float64) - want) for _, want, have in pairs]
    size = np.sqrt(sum(float((_unmarked(want) ** 2).sum()) for _, want, _ in pairs))
    off = np.sqrt(sum(float((error**2).sum()) for error in errors))
    same = [_same_top(want, have) for name, want, have in pairs if name != "last_hidden_state" and want.shape[-1] > 1]
    return Agreement(
        max_abs=float(max(error.max() for error in errors)),
        relative=float(off / max(size, np.finfo(np.float32).tiny)),
        top1=100 * float(np.concatenate(same).mean()) if same else None,
        finite=all(bool(np.isfinite(have).all()) for *_, have in pairs),
        texts=texts,
    )


def _unmarked(values: Values) -> NDArray[np.float64]:
    """Zero where `comparable` marked padding."""
    return np.where(values < FAR_BELOW / 10, 0, values).astype(np.float64)


def _same_top(want: Values, have: Values) -> NDArray[np.bool_]:
    """For each row whether the largest logit is the same; never where there is a NaN."""
    same: NDArray[np.bool_] = (want.argmax(-1) == have.argmax(-1)) & ~np.isnan(have).any(-1)
    return same
