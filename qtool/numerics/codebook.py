"""Attention probabilities as codes of a few bits: pruned, and log-scaled or linear (Ji et al., Findings of ACL 2021).

A codebook cuts [0, 1] into bins. Code 0 is zero; every other code stands for one number, its level. The paper's bins
are equally wide in log2 and stand for their geometric middle. Bins are closed below (a probability on an edge belongs
to the bin above it), the top one is closed above too and takes what float rounding puts beyond 1.

Edges are written down and compared with: a floor of logarithms is unreliable near them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch

from qtool.errors import InputError

THRESHOLD = 1e-3
"""The paper's: what is smaller is pruned."""
FLOOR = 1e-10
"""Where the bins of a log codebook without pruning begin."""
MAX_BITS = 8
Spacing = Literal["log", "linear"]
"""In what bins are equally wide."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """`edges` `[..., codes - 1]`, the lower ends of codes 1 and up, and `levels` `[..., codes]`; both float64.

    Edges are positive and rise; `levels[..., 0]` is 0, all are finite and not negative; at most 256 codes. Leading
    dimensions (`[heads]`, say) are those that probabilities `[..., heads, queries, keys]` have before the last two.
    Raises InputError for anything else.
    """

    edges: torch.Tensor
    levels: torch.Tensor

    def __post_init__(self) -> None:
        edges, levels = self.edges, self.levels
        shape = (*edges.shape[:-1], edges.shape[-1] + 1) if edges.dim() else ()
        if levels.shape != shape or not 2 <= shape[-1] <= 1 << MAX_BITS:
            raise InputError(
                f"a codebook has 1 to 255 edges and one more level, not {[*edges.shape]}, {[*levels.shape]}"
            )
        if {edges.dtype, levels.dtype} != {torch.float64}:
            raise InputError(f"a codebook is float64, not {edges.dtype} and {levels.dtype}")
        if not (edges[..., :1] > 0).all() or not (edges.diff() > 0).all():
            raise InputError("the edges of a codebook are positive and rise")
        if (levels[..., 0] != 0).any() or not (levels.isfinite() & (levels >= 0)).all():
            raise InputError("level 0 of a codebook is 0, and all are finite and not negative")

    @classmethod
    def even(cls, mapping: Spacing, bits: int, threshold: float | None) -> "Codebook":
        """The form with equally wide bins, in log2 or linear: pruned at `threshold`, or (None) over the whole range."""
        if threshold is None:
            return cls.log_unpruned(bits) if mapping == "log" else cls.linear_unpruned(bits)
        return cls.log(bits, threshold) if mapping == "log" else cls.linear(bits, threshold)

    @classmethod
    def log(cls, bits: int, threshold: float = THRESHOLD) -> "Codebook":
        """The paper's pruned form: `2^bits - 1` bins from `threshold` to 1, equally wide in log2.

        Raises InputError unless `2 <= bits <= 8` and `0 < threshold < 1`.
        """
        _check(bits, threshold)
        bins = (1 << bits) - 1
        edges = [threshold ** ((bins - i) / bins) for i in range(bins)]
        return cls._of(edges, [threshold ** ((bins - i - 0.5) / bins) for i in range(bins)])

    @classmethod
    def log_unpruned(cls, bits: int, floor: float = FLOOR) -> "Codebook":
        """`2^bits` bins from `floor` to 1, equally wide in log2, the lowest of which stands for zero.

        Raises InputError unless `2 <= bits <= 8` and `0 < floor < 1`.
        """
        _check(bits, floor)
        bins = 1 << bits
        edges = [floor ** ((bins - i) / bins) for i in range(1, bins)]
        return cls._of(edges, [floor ** ((bins - i - 0.5) / bins) for i in range(1, bins)])

    @classmethod
    def linear(cls, bits: int, threshold: float = THRESHOLD) -> "Codebook":
        """`2^bits - 1` equal bins from `threshold` to 1 that stand for their middle.

        Raises InputError unless `2 <= bits <= 8` and `0 < threshold < 1`.
        """
        _check(bits, threshold)
        bins = (1 << bits) - 1
        span = 1 - threshold
        return cls._of(
            [threshold + span * (i / bins) for i in range(bins)],
            [threshold + span * ((i + 0.5) / bins) for i in range(bins)],
        )

    @classmethod
    def linear_unpruned(cls, bits: int) -> "Codebook":
        """`2^bits` equal bins from 0 to 1 that stand for their middle, but the lowest for zero.

        Raises InputError unless `2 <= bits <= 8`.
        """
        _check(bits, 0.5)
        bins = 1 << bits
        return cls._of([i / bins for i in range(1, bins)], [(i + 0.5) / bins for i in range(1, bins)])

    @classmethod
    def _of(cls, edges: list[float], levels: list[float]) -> "Codebook":
        return cls(torch.tensor(edges, dtype=torch.float64), torch.tensor([0.0, *levels], dtype=torch.float64))

    def codes(self, probabilities: torch.Tensor) -> torch.Tensor:
        """uint8 codes of float `[..., queries, keys]` (any shape, where there are no leading dimensions).

        What is beyond 1 gets the top code, NaN the code 0: it is for the caller to keep rows that are no numbers apart.
        """
        found = torch.empty(probabilities.shape, dtype=torch.uint8, device=probabilities.device)
        for at, index in self._places():
            found[at] = torch.bucketize(probabilities[at].double().contiguous(), self.edges[index], right=True).to(
                torch.uint8
            )
        return found.masked_fill_(probabilities.isnan(), 0)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes of the shape that `codes` returns stand for, float64."""
        found = torch.empty(codes.shape, dtype=torch.float64, device=codes.device)
        for at, index in self._places():
            found[at] = self.levels[index][codes[at].long()]
        return found

    def _places(self) -> Iterator[tuple[Any, tuple[int, ...]]]:
        """Where in a tensor of probabilities each of the codebook's rows applies."""
        for index in product(*map(range, self.edges.shape[:-1])):
            yield ((..., *index, slice(None), slice(None)) if index else ...), index


def check_bits(bits: int | None) -> int | None:
    """The width of a code, or None for probabilities that are only pruned. Raises InputError for another."""
    if bits is not None and not 2 <= bits <= MAX_BITS:
        raise InputError(f"attention codes have 2 to {MAX_BITS} bits, not {bits}")
    return bits


def _check(bits: int, threshold: float) -> None:
    check_bits(bits)
    if not 0 < threshold < 1:
        raise InputError(f"the threshold of a codebook lies between 0 and 1, not at {threshold}")


def prune(probabilities: torch.Tensor, threshold: float | torch.Tensor, *, relative: bool = False) -> torch.Tensor:
    """Probabilities `[..., queries, keys]`, zero where they are not above `threshold` (strictly, as the paper's code).

    With `relative` the threshold is a share of the largest probability of the row. One of `[heads, 1, 1]` is a head's
    own. NaN stays.
    """
    limit = threshold * probabilities.amax(-1, keepdim=True) if relative else threshold
    return probabilities.masked_fill(probabilities <= limit, 0)
