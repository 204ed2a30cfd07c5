"""The exact solutions prove themselves: every identity of a flow map, on three paths, to 1e-10 in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from fastdistill.eval.exact import Gaussian, GaussianMixture, Ring
from fastdistill.paths import Cosine, Linear, Path

EXACT = 1e-10
ROWS, WIDTH = 20, 5


class Bent(Path):
    """A path with no symmetry at all."""

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t).square() * (1 + 0.3 * t)

    def beta(self, t: Tensor) -> Tensor:
        return t * (2 - t).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return 0.3 * (1 - t).square() - 2 * (1 - t) * (1 + 0.3 * t)

    def d_beta(self, t: Tensor) -> Tensor:
        return (2 - t).sqrt() - t / (2 * (2 - t).sqrt())


PATHS = [pytest.param(path, id=type(path).__name__) for path in (Linear(), Cosine(), Bent())]


EYE = torch.eye(WIDTH, dtype=torch.float64)


def random_covariance() -> Tensor:
    factor = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    return factor @ factor.T / WIDTH + 0.05 * EYE


def gaussian(path: Path) -> Gaussian:
    return Gaussian(torch.randn(WIDTH, dtype=torch.float64), random_covariance(), path)


@pytest.fixture
def times() -> tuple[Tensor, Tensor, Tensor]:
    """t > m > s, at least 0.02 apart."""
    s, m, t = (0.05 + 0.85 * torch.rand(3, ROWS, dtype=torch.float64)).sort(0).values
    return t + 0.04, m + 0.02, s


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(ROWS, WIDTH, dtype=torch.float64)


def largest(error: Tensor) -> float:
    return error.abs().max().item()


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_conditional_mean_of_the_path_derivative(path: Path, x: Tensor) -> None:
    """By joint-Gaussian conditioning: E[xdot | x_t] = E xdot + Cov(xdot, x_t) Cov(x_t)^-1 (x - E x_t)."""
    covariance, t = random_covariance(), torch.tensor(0.37, dtype=torch.float64)
    law = Gaussian(torch.randn(WIDTH, dtype=torch.float64), covariance, path)
    a, b, da, db = path.alpha(t), path.beta(t), path.d_alpha(t), path.d_beta(t)
    gain = torch.linalg.solve(a**2 * covariance + b**2 * EYE, a * da * covariance + b * db * EYE)
    assert largest(law.velocity(x, t) - (da * law.mean + (x - a * law.mean) @ gain)) < EXACT


@pytest.mark.parametrize("path", PATHS)
def test_flow_map_satisfies_every_identity(path: Path, x: Tensor, times: tuple[Tensor, Tensor, Tensor]) -> None:
    law, (t, m, s) = gaussian(path), times
    v, one, gap = law.velocity(x, t), torch.ones_like(t), (t - s)[:, None]
    f = law.flow_map(x, t, s)
    assert largest(law.flow_map(x, t, t) - x) < EXACT, "boundary: f(x, t, t) = x"
    assert largest(law.flow_map(law.flow_map(x, t, m), m, s) - f) < EXACT, "semigroup"
    assert largest(law.flow_map(f, s, t) - x) < EXACT, "inverse"
    df_dt = jvp(lambda x, t: law.flow_map(x, t, s), (x, t), (v, one))[1]
    assert largest(df_dt) < EXACT, "Eulerian: D_v f = 0"
    df_ds = jvp(lambda s: law.flow_map(x, t, s), (s,), (one,))[1]
    assert largest(df_ds - law.velocity(f, s)) < EXACT, "Lagrangian: d_s f = v(f, s)"
    u, du_dt = jvp(lambda x, t: law.average_velocity(x, t, s), (x, t), (v, one))[:2]
    assert largest(u - (v - gap * du_dt)) < EXACT, "MeanFlow: u = v - (t - s) D_v u"


def test_average_velocity_where_times_meet_is_the_velocity(x: Tensor) -> None:
    law, t = gaussian(Linear()), torch.rand(ROWS, dtype=torch.float64)
    assert torch.equal(law.average_velocity(x, t, t), law.velocity(x, t))
    near = law.average_velocity(x, t, t - 1e-6)
    assert largest(near - law.velocity(x, t)) < 1e-3


def test_single_point_is_the_gaussian_without_covariance(x: Tensor) -> None:
    point = torch.randn(WIDTH, dtype=torch.float64)
    law, t = Gaussian(point, 0 * EYE), torch.full((ROWS,), 0.6, dtype=torch.float64)
    assert largest(law.velocity(x, t) - (x - point) / 0.6) < EXACT
    assert largest(law.flow_map(x, t, 0 * t) - point) < EXACT


@pytest.mark.parametrize("path", PATHS)
def test_mixture_of_one_component_is_the_gaussian(path: Path, x: Tensor, times: tuple[Tensor, Tensor, Tensor]) -> None:
    mean = torch.randn(WIDTH, dtype=torch.float64)
    mixture = GaussianMixture(mean[None], 0.5, path)
    law, (t, _, s) = Gaussian(mean, 0.25 * EYE, path), times
    assert largest(mixture.velocity(x, t) - law.velocity(x, t)) < EXACT
    assert largest(mixture.flow_map(x, t, s) - law.flow_map(x, t, s)) < 1e-8
    assert largest(mixture.average_velocity(x, t, s) - law.average_velocity(x, t, s)) < 1e-6


@pytest.mark.parametrize("path", PATHS)
def test_mixture_velocity_is_the_conditional_mean_by_quadrature(path: Path) -> None:
    """E[xdot | x_t] on a line, with x0 on a fine grid and x1 = (x_t - alpha x0) / beta."""
    mixture, t = GaussianMixture(torch.tensor([[-1.0], [0.4], [2.0]]).double(), 0.3, path), torch.tensor(0.4).double()
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    x0 = torch.linspace(-4, 5, 20_001, dtype=torch.float64)
    x1 = (x - path.alpha(t) * x0) / path.beta(t)
    density = (-(x0 - mixture.means).square() / (2 * 0.3**2)).exp().sum(0) * (-x1.square() / 2).exp()
    velocity = path.d_alpha(t) * x0 + path.d_beta(t) * x1
    truth = (density * velocity).sum(1) / density.sum(1)
    assert largest(mixture.velocity(x, t)[:, 0] - truth) < EXACT


def test_flow_map_of_the_mixture_converges_at_fourth_order() -> None:
    ring, noise = Ring(), torch.randn(64, 2, dtype=torch.float64)
    one = torch.ones(64, dtype=torch.float64)
    truth = ring.flow_map(noise, one, 0 * one, 1600)
    coarse, fine = (ring.flow_map(noise, one, 0 * one, steps) for steps in (200, 400))
    ratio = (coarse - truth).norm() / (fine - truth).norm()
    assert 12 < ratio < 20, ratio
    assert largest(ring.flow_map(noise, one, 0 * one) - truth) < 1e-4, "the default number of steps"


def test_flow_map_carries_noise_to_the_ring() -> None:
    """Each mode gets its eighth, and the distances to the nearest one follow Rayleigh's law of scale 0.2."""
    ring, count = Ring(), 4000
    one = torch.ones(count)
    generated = ring.flow_map(torch.randn(count, 2), one, 0 * one, 60)
    distances, nearest = torch.cdist(generated.double(), ring.means).min(1)
    shares = torch.bincount(nearest, minlength=8) / count
    assert largest(shares - 1 / 8) < 5 * (1 / 8 * 7 / 8 / count) ** 0.5
    assert abs(distances.square().mean().item() - 2 * 0.2**2) < 5 * 2 * 0.2**2 / count**0.5


def test_samples_follow_the_generator_and_stay_near_their_component() -> None:
    ring = Ring()
    data, labels = ring.sample(8000, torch.Generator().manual_seed(1))
    again, _ = ring.sample(8000, torch.Generator().manual_seed(1))
    assert torch.equal(data, again)
    assert data.dtype == torch.float32
    assert set(labels.tolist()) == set(range(8))
    assert abs((data - ring.means.float()[labels]).std().item() - 0.2) < 0.01
    assert abs(ring.means.norm(dim=1) - 2).max() < 1e-12


def test_bad_laws_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^covariance: "):
        Gaussian(torch.zeros(3), torch.eye(2))
    with pytest.raises(ValueError, match=r"^means: .* got \(3,\)"):
        GaussianMixture(torch.zeros(3), 0.1)
    with pytest.raises(ValueError, match=r"^std: .* got 0"):
        Ring(std=0)
