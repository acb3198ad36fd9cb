"""Smoothing against its formula, that it changes nothing, and that tuning does what its docstring says."""

from typing import Any

import numpy as np
import pytest
import torch

from qtool.rounding.smooth import smoothing, tuned_smoothing


def matrices(seed: int = 0, inputs: int = 24) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A sample with outliers in channels and in tokens, and two matrices that read it."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(60, inputs, generator=draw)
    rows[:, 3] *= 30
    rows[:, 7] *= 0.01
    rows[5] *= 4
    return rows, [torch.randn(outputs, inputs, generator=draw) * 0.1 for outputs in (16, 40)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_is_the_papers_formula(alpha: float) -> None:
    rows, weights = matrices()
    found = smoothing(rows.abs().amax(0), weights, alpha)
    peaks = np.abs(rows.numpy().astype(np.float64)).max(0)
    largest = np.abs(np.concatenate([weight.numpy() for weight in weights]).astype(np.float64)).max(0)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), peaks**alpha / largest ** (1 - alpha), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels_get_a_finite_number(alpha: float) -> None:
    found = smoothing(torch.tensor([0.0, 1.0, 0.0]), [torch.tensor([[1.0, 0.0, 0.0]])], alpha)
    assert bool(found.isfinite().all()) and bool((found > 0).all())


@pytest.mark.parametrize("steps", [0, 20])
def test_dividing_inputs_and_multiplying_weights_changes_nothing(steps: int) -> None:
    rows, weights = matrices()
    s = tuned_smoothing(rows, weights, smoothing(rows.abs().amax(0), weights, 0.5), steps=steps)
    assert s.dtype == torch.float64 and not torch.allclose(s, torch.ones_like(s))
    for weight in weights:
        exact = rows.double() @ weight.double().t()
        torch.testing.assert_close((rows.double() / s) @ (weight.double() * s).t(), exact, rtol=1e-12, atol=1e-12)


def objective(rows: Any, weights: list[Any], s: Any) -> float:
    """(max_j |x_tj / s_j|)² Σ_j (s_j W_cj)² + (max_j |s_j W_cj|)² Σ_j (x_tj / s_j)², over all t and c, one by one."""
    x = rows.double().numpy() / s.numpy()
    w = np.concatenate([weight.double().numpy() for weight in weights]) * s.numpy()
    total = 0.0
    for token in x:
        for output in w:
            total += np.abs(token).max() ** 2 * (output**2).sum() + np.abs(output).max() ** 2 * (token**2).sum()
    return total


def rounded_error(rows: Any, weights: list[Any], s: Any) -> float:
    """Mean squared error of the outputs with INT8 codes token by token and weights output by output."""

    def int8(matrix: Any) -> Any:
        step = np.abs(matrix).max(1, keepdims=True) / 127
        return np.floor(matrix / step + 0.5) * step

    x, w = rows.double().numpy(), np.concatenate([weight.double().numpy() for weight in weights])
    return float(np.square(x @ w.T - int8(x / s.numpy()) @ int8(w * s.numpy()).T).mean())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
def test_tuning_lowers_the_objective_and_what_rounding_costs(alpha: float, seed: int) -> None:
    rows, weights = matrices(seed)
    start = smoothing(rows.abs().amax(0), weights, alpha)
    tuned = tuned_smoothing(rows, weights, start, steps=100)
    assert objective(rows, weights, tuned) < 0.98 * objective(rows, weights, start)
    assert rounded_error(rows, weights, tuned) < rounded_error(rows, weights, start)


def test_more_steps_do_more_and_none_nothing() -> None:
    rows, weights = matrices()
    start = torch.ones(24, dtype=torch.float64)  # far from good: an outlier channel makes all steps wide
    reached = [objective(rows, weights, tuned_smoothing(rows, weights, start, steps=n)) for n in (0, 5, 30, 120)]
    assert reached == sorted(reached, reverse=True) and reached[-1] < 0.5 * reached[0]
    torch.testing.assert_close(tuned_smoothing(rows, weights, start, steps=0), start)


def test_tuning_is_deterministic_and_runs_where_gradients_are_off() -> None:
    rows, weights = matrices()
    start = smoothing(rows.abs().amax(0), weights, 0.5)
    found = [tuned_smoothing(rows, weights, start, steps=25)]
    torch.manual_seed(99)
    with torch.inference_mode():  # as somebody's script may have it around everything
        found.append(tuned_smoothing(rows.clone(), [w.clone() for w in weights], start.clone(), steps=25))
    with torch.no_grad():
        found.append(tuned_smoothing(rows, weights, start, steps=25))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not found[0].requires_grad


def test_a_start_that_is_best_already_is_left_about_there() -> None:
    """Inputs and weights of one magnitude: equal numbers are best, and a common factor changes nothing."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 2, (64, 16), generator=draw).float() * 2 - 1
    weights = [torch.randint(0, 2, (32, 16), generator=draw).float() * 2 - 1]
    start = torch.full((16,), 0.7, dtype=torch.float64)
    tuned = tuned_smoothing(rows, weights, start, steps=100)
    assert objective(rows, weights, tuned) <= 1.02 * objective(rows, weights, start)
    spread = (tuned / tuned.log().mean().exp()).log().abs().max().item()
    assert spread < 0.1
