"""The linear probe: a classification score for an encoder that has no classification head.

A logistic regression on the frozen encoder's features tells how much of a task can be read from them linearly (Alain
and Bengio, 2016, "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644). It is fitted
once, on the float model; the same probe then reads the float and the quantized features, so that a difference of scores
comes from the encoder alone.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qtool.errors import InputError
from qtool.evaluation.result import ProbeInfo

MAX_ROWS = 16_384
"""Rows of the training split, from its start, that a probe is fitted on at most."""

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Values of C, the inverse of the L2 penalty, from which cross-validation on the training rows chooses."""

FOLDS = 5
"""Parts of the cross-validation. Where a class has fewer rows than that, the middle one of `STRENGTHS` is taken."""

DEAD = 1e-6
"""A feature that varies less than this times the median one is left out: standardising it would blow its rounding up to
the size of what the others say. Encoders do have such channels, where LayerNorm's γ has shrunk to 1e-9 or 1e-33."""

_ITERATIONS = 1000


def pooled(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `hidden [batch, tokens, features]` over the tokens that `mask [batch, tokens]` keeps, in float32."""
    keep = mask.unsqueeze(-1).to(torch.float32)
    # Where, not times: a padded position may hold anything, and 0 · NaN is NaN.
    kept = torch.where(keep > 0, hidden.float(), torch.zeros(()))
    return kept.sum(1) / keep.sum(1)


class Probe:
    """Standardised logistic regression (scikit-learn, L2, L-BFGS) from features to class indices.

    With hundreds of features and few thousand rows the usual C = 1 fits noise, and then reacts to any change of the
    features, so C comes from a cross-validation: the least one with the best accuracy. It sees the float model's
    training rows alone. Features that hardly vary are left out (`DEAD`).
    """

    def __init__(self, features: NDArray[np.float32], ids: Sequence[int], source: str) -> None:
        """Fit on `features [rows, features]` of the float model and class indices `ids`.

        Raises InputError when the features hold NaN or infinity, or when only one class occurs.
        """
        if not np.isfinite(features).all():
            raise InputError(f"the float model gives NaN or infinity on {source}; its checkpoint is damaged")
        if len(set(ids)) < 2:
            raise InputError(f"{source}: the first {len(ids)} rows hold one class only; shuffle the file")
        spread = features.std(axis=0, dtype=np.float64)
        self._alive = spread > DEAD * np.median(spread)
        if not self._alive.any():  # then only their mean says anything
            self._alive[:] = True
        self._model = _fitted(features[:, self._alive].astype(np.float64), np.asarray(ids))
        regression = self._model[-1]
        self.info = ProbeInfo(
            source=source,
            rows=len(ids),
            features=features.shape[1],
            c=float(regression.C),
            accuracy=100.0 * float(np.mean(self.predict(features) == np.asarray(ids))),
            converged=int(regression.n_iter_.max()) < _ITERATIONS,
        )

    def predict(self, features: NDArray[np.float32]) -> NDArray[np.int64]:
        """Class indices `[rows]` for `features [rows, features]`; −1 for a row with NaN or infinity."""
        ids = np.full(len(features), -1, dtype=np.int64)
        finite = np.isfinite(features).all(axis=1)
        if finite.any():
            ids[finite] = self._model.predict(features[np.ix_(finite, self._alive)].astype(np.float64))
        return ids

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Logits `[rows, classes]` whose softmax are the probe's probabilities; NaN for a row with NaN or infinity."""
        finite = np.isfinite(features).all(axis=1)
        found = np.full((len(features), len(self._model[-1].classes_)), np.nan)
        if finite.any():
            scores = self._model.decision_function(features[np.ix_(finite, self._alive)].astype(np.float64))
            # Of two classes there is one number, the second's log-odds.
            found[finite] = scores if scores.ndim == 2 else np.stack([np.zeros(len(scores)), scores], axis=1)
        return found


def _fitted(features: NDArray[np.float64], ids: NDArray[np.int64]) -> Any:
    """The fitted pipeline of scaler and regression."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    few = np.bincount(ids)[np.unique(ids)].min() < FOLDS
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    # One thread: the matrices are small, so that more of them are several times slower, and their sums would differ.
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings():
        # Said in the result instead, as `converged`.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if few:
            return model.set_params(logisticregression__C=STRENGTHS[len(STRENGTHS) // 2]).fit(features, ids)
        search = GridSearchCV(model, {"logisticregression__C": STRENGTHS}, cv=FOLDS, scoring="accuracy")
        return search.fit(features, ids).best_estimator_
