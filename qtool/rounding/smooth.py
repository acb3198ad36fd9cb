"""Migration of activation ranges into weights (SmoothQuant, Xiao et al. 2023, eq. 4)."""

from collections.abc import Sequence

import torch

_LEAST = 1e-5


def smoothing(peaks: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """What each input channel is divided by, and its weights multiplied: `peak^α / max|W|^(1-α)`, float64 `[in]`.

    `peaks` are the channels' largest magnitudes, `weights` `[out, in]` all matrices that read them.
    """
    matrix = torch.stack([weight.double().abs().amax(0) for weight in weights]).amax(0)
    return peaks.clamp_min(_LEAST).pow(alpha) / matrix.clamp_min(_LEAST).pow(1 - alpha)
