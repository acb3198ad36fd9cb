"""What data-driven rounding needs to know of the inputs of a matrix."""

from dataclasses import dataclass, field

import torch


@dataclass
class Moments:
    """Second moments of the rows `x` that a matrix reads in the float model and `y` that it reads after lowering.

    `own` is Σ s yᵀy and `cross` Σ s yᵀx, float64 `[in, in]`, over `tokens` rows, each of which counts by its `s`; they
    lie on `device`, where the rows come from.
    """

    features: int
    own: torch.Tensor = field(init=False)
    cross: torch.Tensor = field(init=False)
    tokens: int = 0
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        self.own = torch.zeros(self.features, self.features, dtype=torch.float64, device=self.device)
        self.cross = torch.zeros_like(self.own)

    def update(self, exact: torch.Tensor, lowered: torch.Tensor, counts: torch.Tensor | None = None) -> None:
        """Take in float rows `[tokens, in]` of both models, which count by `counts` `[tokens]`, or all the same.

        Where a router sent other tokens to a matrix than in the float model, rows have no partners: `lowered` alone
        counts, and where there are not as many rows as `counts`, each counts 1, the mean of those. Products of a batch
        are float32, their sum is float64.
        """
        y = lowered.float()
        left = y.t() if counts is None or len(counts) != len(y) else y.t() * counts.float().to(y.device)
        own = left @ y
        self.own += own
        self.cross += left @ exact.float() if exact.shape == lowered.shape else own
        self.tokens += len(y)
