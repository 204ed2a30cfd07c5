"""Check the exact solutions themselves: every identity of a flow map, on every path, to 1e-10 in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from fastdistill.eval.exact import Gaussian, GaussianMixture, Ring
from fastdistill.paths import EDM, FM, ICFM, OTCFM, VE, VPSI, Cosine, Linear, Path, TrigFlow, convert

EXACT = 1e-10
ROWS, WIDTH = 20, 5


class Bent(Path):
    """Bend a path so that it has no symmetry at all."""

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t).square() * (1 + 0.3 * t)

    def beta(self, t: Tensor) -> Tensor:
        return t * (2 - t).sqrt()

    def d_alpha(self, t: Tensor) -> Tensor:
        return 0.3 * (1 - t).square() - 2 * (1 - t) * (1 + 0.3 * t)

    def d_beta(self, t: Tensor) -> Tensor:
        return (2 - t).sqrt() - t / (2 * (2 - t).sqrt())


INDEPENDENT = (Linear(), Cosine(), Bent(), FM(0.1), ICFM(0.3), VPSI(0.2), TrigFlow(0.5), EDM(0.1, 5.0), VE(0.1, 5.0))
PATHS = [pytest.param(path, id=type(path).__name__) for path in INDEPENDENT]
ALL = [*PATHS, pytest.param(OTCFM(), id="OTCFM"), pytest.param(OTCFM(0.3), id="OTCFM-noised")]

EYE = torch.eye(WIDTH, dtype=torch.float64)


def random_covariance() -> Tensor:
    factor = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    return factor @ factor.T / WIDTH + 0.05 * EYE


def gaussian(path: Path) -> Gaussian:
    return Gaussian(torch.randn(WIDTH, dtype=torch.float64), random_covariance(), path)


@pytest.fixture
def times() -> tuple[Tensor, Tensor, Tensor]:
    """Return t > m > s, at least 0.02 apart."""
    s, m, t = (0.05 + 0.85 * torch.rand(3, ROWS, dtype=torch.float64)).sort(0).values
    return t + 0.04, m + 0.02, s


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(ROWS, WIDTH, dtype=torch.float64)


def largest(error: Tensor) -> float:
    return error.abs().max().item()


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_conditional_mean_of_the_path_derivative(path: Path, x: Tensor) -> None:
    """Compare with joint-Gaussian conditioning: E[xdot | x_t] = E xdot + Cov(xdot, x_t) Cov(x_t)^-1 (x - E x_t)."""
    covariance, t = random_covariance(), torch.tensor(0.37, dtype=torch.float64)
    law = Gaussian(torch.randn(WIDTH, dtype=torch.float64), covariance, path)
    a, b, da, db = path.alpha(t), path.beta(t), path.d_alpha(t), path.d_beta(t)
    gain = torch.linalg.solve(a**2 * covariance + b**2 * EYE, a * da * covariance + b * db * EYE)
    assert largest(law.velocity(x, t) - (da * law.mean + (x - a * law.mean) @ gain)) < EXACT


def broken_identities(law: Gaussian, x: Tensor, times: tuple[Tensor, Tensor, Tensor]) -> set[str]:
    """Return the names of the identities that a law breaks by more than rounding."""
    t, m, s = times
    v, one, gap = law.velocity(x, t), torch.ones_like(t), (t - s)[:, None]
    f = law.flow_map(x, t, s)
    df_dt = jvp(lambda x, t: law.flow_map(x, t, s), (x, t), (v, one))[1]
    df_ds = jvp(lambda s: law.flow_map(x, t, s), (s,), (one,))[1]
    u, du_dt = jvp(lambda x, t: law.average_velocity(x, t, s), (x, t), (v, one))[:2]
    errors = {
        "boundary: f(x, t, t) = x": law.flow_map(x, t, t) - x,
        "semigroup": law.flow_map(law.flow_map(x, t, m), m, s) - f,
        "inverse": law.flow_map(f, s, t) - x,
        "Eulerian: D_v f = 0": df_dt,
        "Lagrangian: d_s f = v(f, s)": df_ds - law.velocity(f, s),
        "definition: u = (x - f) / (t - s)": u - (x - f) / gap,
        "MeanFlow: u = v - (t - s) D_v u": u - (v - gap * du_dt),
    }
    return {name for name, error in errors.items() if not largest(error) < EXACT}


@pytest.mark.parametrize("path", ALL)
def test_flow_map_satisfies_every_identity(path: Path, x: Tensor, times: tuple[Tensor, Tensor, Tensor]) -> None:
    assert broken_identities(gaussian(path), x, times) == set()


class WrongSign(Gaussian):
    """Let time run backwards."""

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return -super().velocity(x, t)


class FullRate(Gaussian):
    """Drop the factor 1/2 before dC/dt."""

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        drift = self.path.d_alpha(t)[:, None] * self.mean
        return drift + 2 * (super().velocity(x, t) - drift)


class NoRoot(Gaussian):
    """Drop the root of C_s / C_t: this maps the laws wrongly, but satisfies the boundary and the semigroup."""

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        half = super().flow_map(x, t, s)
        a_s, a_t = self.path.alpha(s)[:, None], self.path.alpha(t)[:, None]
        return super().flow_map(half - a_s * self.mean + a_t * self.mean, t, s)


class SwappedTimes(Gaussian):
    """Return u(x, s, t) for u(x, t, s)."""

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return super().average_velocity(x, s, t)


class Instantaneous(Gaussian):
    """Return v for u."""

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.velocity(x, t)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("mutant", "broken"),
    [
        (WrongSign, {"Eulerian", "Lagrangian", "MeanFlow"}),
        (FullRate, {"Eulerian", "Lagrangian", "MeanFlow"}),
        (NoRoot, {"Eulerian", "Lagrangian", "definition"}),
        (SwappedTimes, {"definition", "MeanFlow"}),
        (Instantaneous, {"definition", "MeanFlow"}),
    ],
)
def test_planted_errors_break_the_identities_that_are_about_them(
    mutant: type[Gaussian], broken: set[str], path: Path, x: Tensor, times: tuple[Tensor, Tensor, Tensor]
) -> None:
    law = mutant(torch.randn(WIDTH, dtype=torch.float64), random_covariance(), path)
    assert {name.partition(":")[0] for name in broken_identities(law, x, times)} == broken


@pytest.mark.parametrize("path", ALL)
def test_average_velocity_is_accurate_where_times_meet(path: Path, x: Tensor) -> None:
    """Check the velocity at s = t, its first-order expansion nearby, and MeanFlow's identity at every distance.

    A quotient of differences would be off by 1e-16 / 1e-9 there.
    """
    law, t = gaussian(path), 0.1 + 0.8 * torch.rand(ROWS, dtype=torch.float64)
    one, v = torch.ones_like(t), law.velocity(x, t)
    scale = v.abs().max().item()
    assert largest(law.average_velocity(x, t, t) - v) < 1e-13 * scale
    for gap in (0.0, 1e-12, 1e-9, 1e-6, 1e-3):
        s = t - gap
        u, du_dt = jvp(lambda x, t: law.average_velocity(x, t, s), (x, t), (v, one))  # noqa: B023
        assert largest(u - (v - gap * du_dt)) < 1e-12 * scale, gap
        assert largest(u - v) < 200 * scale * gap + 1e-12 * scale


@pytest.mark.parametrize("path", PATHS)
def test_average_velocity_of_the_mixture_is_accurate_where_times_meet(path: Path, x: Tensor) -> None:
    mixture, t = GaussianMixture(torch.randn(3, WIDTH).double(), 0.5, path), 0.2 + 0.7 * torch.rand(ROWS).double()
    v = mixture.velocity(x, t)
    assert largest(mixture.average_velocity(x, t, t, 3) - v) < 1e-13 * v.abs().max().item()
    near = mixture.average_velocity(x, t, t - 1e-9, 3)
    assert 0 < largest(near - v) < 1e-6 * v.abs().max().item()


@pytest.mark.parametrize("path", PATHS)
def test_data_and_score_are_those_of_the_joint_gaussian(path: Path, x: Tensor) -> None:
    """Compare E[x0 | x_t] with conditioning, and the score with autograd of the log density."""
    covariance, t = random_covariance(), torch.full((ROWS,), 0.37, dtype=torch.float64)
    law = Gaussian(torch.randn(WIDTH, dtype=torch.float64), covariance, path)
    a, b = path.alpha(t[0]), path.beta(t[0])
    total = a**2 * covariance + b**2 * EYE
    offset = x - a * law.mean
    assert largest(law.data(x, t) - (law.mean + offset @ torch.linalg.solve(total, a * covariance))) < EXACT
    log_density = torch.distributions.MultivariateNormal(a * law.mean, total).log_prob
    assert largest(law.score(x, t) - torch.func.grad(lambda x: log_density(x).sum())(x)) < EXACT
    assert largest(law.score(x, t) - convert(path, x, t, law.velocity(x, t), "v", "score")) < EXACT


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_law_under_optimal_transport_is_that_of_transported_pairs(sigma: float, x: Tensor) -> None:
    """Check pairs x0 = m + S^(1/2) x1: x_t and x1 - x0 are jointly Gaussian, so v is their regression."""
    covariance, t = random_covariance(), torch.tensor(0.37, dtype=torch.float64)
    values, axes = torch.linalg.eigh(covariance)
    root = axes * values.sqrt() @ axes.T
    law = Gaussian(torch.randn(WIDTH, dtype=torch.float64), covariance, OTCFM(sigma))
    across = (1 - t) * root + t * EYE
    gain = (EYE - root) @ across @ torch.linalg.inv(across @ across + sigma**2 * EYE)
    truth = -law.mean + (x - (1 - t) * law.mean) @ gain.T
    assert largest(law.velocity(x, t) - truth) < EXACT
    independent = Gaussian(law.mean, covariance, ICFM(sigma)).velocity(x, t)
    assert largest(independent - truth) > 0.1
    if sigma == 0:  # The path is straight, so the velocity is constant along the flow.
        x0 = law.flow_map(x, torch.ones(ROWS).double(), torch.zeros(ROWS).double())
        assert largest(x0 - (law.mean + x @ root)) < EXACT
        assert largest(law.velocity((1 - t) * x0 + t * x, t) - (x - x0)) < EXACT


def test_samples_of_the_gaussian_have_its_moments() -> None:
    law = gaussian(Linear())
    x0 = law.sample(200_000, torch.Generator().manual_seed(1))
    assert torch.equal(x0, law.sample(200_000, torch.Generator().manual_seed(1)))
    assert x0.dtype == torch.float64
    assert largest(x0.mean(0) - law.mean) < 0.02
    white = (x0 - law.mean) @ torch.linalg.inv(torch.linalg.cholesky(law.covariance)).T
    assert largest(white.T.cov() - EYE) < 0.02


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
    """Compute E[xdot | x_t] on a line, with x0 on a fine grid and x1 = (x_t - alpha x0) / beta."""
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
    """Check that each mode gets its eighth, and that distances to the nearest one follow Rayleigh's law, scale 0.2."""
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
    with pytest.raises(ValueError, match=r"^path: .* got OTCFM"):
        Ring(path=OTCFM())
    with pytest.raises(ValueError, match=r"^covariance: expected a symmetric"):
        Gaussian(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"^covariance: expected a symmetric"):
        Gaussian(torch.zeros(2), -torch.eye(2))
    with pytest.raises(ValueError, match=r"^steps: .* got 0"):
        Ring().flow_map(torch.zeros(1, 2), torch.ones(1), torch.zeros(1), 0)
