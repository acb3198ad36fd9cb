"""How far a candidate's predictive distributions are from its baseline's: the Kullback–Leibler divergence, from logits.

Kullback and Leibler (1951), "On Information and Sufficiency", Annals of Mathematical Statistics 22(1), 79–86.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CELLS = 2**17
"""Logits of a model that are in float64 at a time: 1 MB, which stays in the cache (2 MB take four times longer)."""


def kl_divergence(baseline: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL(softmax(baseline) ‖ softmax(candidate)) in nats, float64 `[places]`, of logits `[places, choices]`.

    With p = softmax(z), z the baseline's logits and w the candidate's, both less their largest, it is

        Σ p_i (z_i − w_i) − log Σ exp(z_i) + log Σ exp(w_i),

    exactly 0.0 for equal logits and never below. A logit of −inf is a choice that cannot be: it adds nothing where the
    baseline excludes it, and makes the divergence infinite where only the candidate does. NaN and +inf give NaN.
    """
    theirs, own = baseline.double(), candidate.double()
    theirs, own = theirs - theirs.amax(-1, keepdim=True), own - own.amax(-1, keepdim=True)
    weights = theirs.exp()
    total = weights.sum(-1)
    found = (weights * (theirs - own)).sum(-1) / total - total.log() + own.exp().sum(-1).log()
    # The sum above has no answer for 0 · inf; rare enough to look at those places a second time.
    odd = ~found.isfinite()
    if odd.any():
        found[odd] = _with_exclusions(theirs[odd], own[odd])
    return found.clamp(min=0.0)


def _with_exclusions(theirs: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """The definition, Σ p log(p / q), with what holds in the limit for choices of probability 0."""
    ours, other = own.log_softmax(-1), theirs.log_softmax(-1)
    terms = other.exp() * (other - ours)
    # By the logarithms: a probability too small for float64 is still not 0.
    terms = torch.where(ours == -torch.inf, torch.inf, terms)
    return torch.where(other == -torch.inf, 0.0, terms).sum(-1)


def row_divergences(baseline: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor]) -> list[Floats]:
    """`kl_divergence` `[places]` of each row of a batch, from both models' logits `[places, choices]` of each row."""
    if sum(row.numel() for row in baseline) <= CELLS and len({row.shape[1] for row in baseline}) == 1:
        # Many small rows in one go: calls of torch would take longer than the arithmetic.
        found = kl_divergence(torch.cat(list(baseline)), torch.cat(list(candidate)))
        return [part.numpy() for part in found.split([len(row) for row in baseline])]
    return [_in_pieces(theirs, own) for theirs, own in zip(baseline, candidate, strict=True)]


def _in_pieces(baseline: torch.Tensor, candidate: torch.Tensor) -> Floats:
    """`kl_divergence` of one row, `CELLS` logits at a time."""
    if not baseline.numel():
        return np.empty(0)
    places = max(1, CELLS // baseline.shape[1])
    pieces = zip(baseline.split(places), candidate.split(places), strict=True)
    found: Floats = torch.cat([kl_divergence(theirs, own) for theirs, own in pieces]).numpy()
    return found
