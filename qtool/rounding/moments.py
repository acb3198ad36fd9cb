"""What data-driven rounding needs to know of the inputs of a matrix."""

from dataclasses import dataclass, field

import torch


@dataclass
class Moments:
    """Second moments of the rows `x` that a matrix reads in the float model and `y` that it reads after lowering.

    `own` is Σ yᵀy and `cross` Σ yᵀx, float64 `[in, in]`, over `tokens` rows.
    """

    features: int
    own: torch.Tensor = field(init=False)
    cross: torch.Tensor = field(init=False)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.own = torch.zeros(self.features, self.features, dtype=torch.float64)
        self.cross = torch.zeros(self.features, self.features, dtype=torch.float64)

    def update(self, exact: torch.Tensor, lowered: torch.Tensor) -> None:
        """Take in float rows `[tokens, in]` of both models.

        Where a router sent other tokens to a matrix than in the float model, rows have no partners: `lowered` alone
        counts. Products of a batch are float32, their sum is float64.
        """
        y = lowered.float()
        own = y.t() @ y
        self.own += own
        self.cross += y.t() @ exact.float() if exact.shape == lowered.shape else own
        self.tokens += len(y)
