"""Paths: their ends, their derivatives, and the velocity that follows."""

from __future__ import annotations

import pytest
import torch
from torch.func import jvp

from fastdistill.paths import Cosine, Linear, Path

PATHS = [pytest.param(path, id=type(path).__name__) for path in (Linear(), Cosine())]
TIMES = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


@pytest.fixture
def ends() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(7, 3, 2, dtype=torch.float64), torch.randn(7, 3, 2, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_path_starts_at_the_data_and_ends_at_the_noise(path: Path, ends: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, x1 = ends
    zero, one = torch.zeros(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
    torch.testing.assert_close(path.interpolate(x0, x1, zero), x0, rtol=0, atol=1e-15)
    torch.testing.assert_close(path.interpolate(x0, x1, one), x1, rtol=0, atol=1e-15)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_time_derivative_of_the_state(path: Path, ends: tuple[torch.Tensor, torch.Tensor]) -> None:
    x0, x1 = ends
    dx_dt = jvp(lambda t: path.interpolate(x0, x1, t), (TIMES,), (torch.ones_like(TIMES),))[1]
    torch.testing.assert_close(path.velocity(x0, x1, TIMES), dx_dt, rtol=0, atol=1e-14)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_from_data_and_state_agrees_and_the_form_with_noise_for_state_does_not(
    path: Path, ends: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """v = (d_alpha - d_beta alpha / beta) x0 + (d_beta / beta) x_t; a common misprint has x1 for x_t."""
    x0, x1 = ends
    v, x = path.velocity(x0, x1, TIMES), path.interpolate(x0, x1, TIMES)
    t = TIMES[:, None, None]
    rate = path.d_beta(t) / path.beta(t)
    from_data = (path.d_alpha(t) - rate * path.alpha(t)) * x0
    assert (from_data + rate * x - v).abs().max() < 1e-13
    assert (from_data + rate * x1 - v).abs().max() > 1


@pytest.mark.parametrize("shape", [(7,), (7, 2), (7, 1, 8, 8)])
def test_one_time_a_row_broadcasts_over_any_trailing_shape(shape: tuple[int, ...]) -> None:
    x0, x1 = torch.randn(shape), torch.randn(shape)
    t = torch.linspace(0, 1, 7)
    x = Linear().interpolate(x0, x1, t)
    assert x.shape == shape
    for i in range(7):
        torch.testing.assert_close(x[i], (1 - t[i]) * x0[i] + t[i] * x1[i])
