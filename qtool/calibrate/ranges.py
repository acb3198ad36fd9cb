"""From what observers saw to the ranges that 8-bit grids cover."""

import torch

from qtool.calibrate.observers import State

_CANDIDATES = 80  # clip points that are tried, from the largest magnitude down to a fifth of it


def peak(state: State) -> torch.Tensor:
    """The largest magnitude of each channel, float64 `[features]`."""
    if "counts" in state:
        last = (state["counts"] > 0).double().mul(torch.arange(1, state["counts"].shape[1] + 1)).amax(-1)
        return last * state["width"].double()
    return torch.maximum(state["max"], -state["min"]).double().clamp_min(0)


def percentile(state: State, share: float) -> torch.Tensor:
    """The magnitude below which `share` percent of a channel's values lie, float64 `[features]`: a bin's upper edge."""
    counts = state["counts"]
    reached = counts.cumsum(-1).double() >= counts.sum(-1, keepdim=True) * (share / 100)
    return (reached.double().argmax(-1) + 1) * state["width"].double()


def least_squares(state: State, qmax: int) -> torch.Tensor:
    """The clip point of each channel with the least squared error of rounding to ±qmax, float64 `[features]`.

    Errors are computed at the middles of bins; the grid search is the one of OMSE (Choukroun et al. 2019).
    """
    counts, width = state["counts"].double(), state["width"].double()[:, None]
    values = (torch.arange(counts.shape[1]) + 0.5) * width
    top = peak(state)
    best, error = top.clone(), torch.full_like(top, torch.inf)
    for share in torch.linspace(1.0, 0.2, _CANDIDATES, dtype=torch.float64):
        clip = (top * share).clamp_min(torch.finfo(torch.float32).tiny)
        scale = (clip / qmax)[:, None]
        rounded = (values / scale + 0.5).floor().clamp(max=qmax) * scale
        loss = (counts * (values - rounded).square()).sum(-1)
        better = loss < error
        best, error = best.where(~better, clip), error.where(~better, loss)
    return best


def merged(state: State, division: torch.Tensor) -> State:
    """One histogram of all channels, each divided by its number in `division` `[features]`."""
    counts, width = state["counts"], state["width"].double() / division
    bins = counts.shape[1]
    top = (peak(state) / division).max().clamp_min(torch.finfo(torch.float32).tiny)
    place = ((torch.arange(bins) + 0.5) * width[:, None] * (bins / top)).long().clamp(max=bins - 1)
    total = torch.bincount(place.flatten(), weights=counts.flatten().double(), minlength=bins).long()
    return {"counts": total[None], "width": (top / bins).reshape(1), "tokens": state["tokens"]}
