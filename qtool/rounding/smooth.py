"""Migration of activation ranges into weights (SmoothQuant, Xiao et al. 2023, eq. 4)."""

from collections.abc import Callable, Sequence

import torch

_LEAST = 1e-5


def smoothing(peaks: torch.Tensor, weights: Sequence[torch.Tensor], alpha: float) -> torch.Tensor:
    """What each input channel is divided by, and its weights multiplied: `peak^α / max|W|^(1-α)`, float64 `[in]`.

    `peaks` are the channels' largest magnitudes, `weights` `[out, in]` all matrices that read them.
    """
    matrix = torch.stack([weight.double().abs().amax(0) for weight in weights]).amax(0)
    return peaks.clamp_min(_LEAST).pow(alpha) / matrix.clamp_min(_LEAST).pow(1 - alpha)


def tuned_smoothing(
    sample: torch.Tensor,
    weights: Sequence[torch.Tensor],
    start: torch.Tensor,
    *,
    steps: int = 100,
    rate: float = 0.03,
    levels: tuple[int | None, int] = (127, 127),
    share: Callable[[torch.Tensor], torch.Tensor] = lambda logs: logs,
) -> torch.Tensor:
    """`start` moved by gradient descent to where rounding costs the outputs least, float64 `[in]`.

    `sample` holds rows `[tokens, in]` as they will be divided. The expected squared error of all outputs, for INT8
    codes token by token and weights channel by channel, is a sum over tokens t and outputs c of

        (max_j |x_tj / s_j|)² Σ_j (s_j W_cj)²  +  (max_j |s_j W_cj|)² Σ_j (x_tj / s_j)²

    (each rounding has variance step²/12). `levels` are the largest codes of activations (None: they stay float) and
    weights, to which either term is in proportion. `share` says which inputs move together: it maps logarithms `[in]`
    to such. Deterministic for a number of threads.
    """
    act_levels, weight_levels = levels
    with torch.inference_mode(False), torch.enable_grad():
        rows, matrix = sample.float().clone(), torch.cat([weight.float().clone() for weight in weights])
        columns = matrix.square().sum(0)
        logs = start.float().log().clone().requires_grad_()
        optimizer = torch.optim.Adam([logs], lr=rate)
        for _ in range(steps):
            s = share(logs).exp()
            divided, scaled = rows / s, matrix * s
            loss = scaled.abs().amax(1).square().sum() * divided.square().sum()
            if act_levels:
                act = divided.abs().amax(1).square().sum() * (columns * s.square()).sum()
                loss = act + loss * (act_levels / weight_levels) ** 2
            optimizer.zero_grad()
            loss.log().backward()
            optimizer.step()
    return share(logs.detach()).double().exp()
