"""Check the flow map's three identities on exact solutions, and what the conditional velocity costs: docs/methods.md.

The article proves that all methods are one of these residuals; here the residuals are zero where they have to be.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdistill.eval.exact import Gaussian, Ring
from fastdistill.paths import LINEAR, VPSI, Cosine, Linear, Path, TrigFlow

Field = Callable[..., Tensor]
ROWS, WIDTH = 48, 3
PATHS = [pytest.param(path, id=type(path).__name__) for path in (Linear(), Cosine(), TrigFlow(), VPSI(0.1))]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw x0, x1 (ROWS, WIDTH), t and s (ROWS,) with gaps of 0.1 to 0.5."""
    generator = torch.Generator().manual_seed(1)
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64, generator=generator)
    t, gap = torch.rand(2, ROWS, dtype=torch.float64, generator=generator)
    t = 0.6 + 0.35 * t
    return x0, x1, t, t - 0.1 - 0.4 * gap


def gaussian(path: Path) -> Gaussian:
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    mean = torch.randn(WIDTH, dtype=torch.float64, generator=generator)
    return Gaussian(mean, factor @ factor.T / WIDTH + 0.2 * torch.eye(WIDTH, dtype=torch.float64), path)


# The three identities


def residuals(
    map_of: Callable[..., Tensor], velocity: Callable[..., Tensor], x: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """Return root mean squares of the Eulerian, Lagrangian and semigroup residuals of a flow map."""
    v, m = velocity(x, t), 0.3 * t + 0.7 * s
    _, start = torch.func.jvp(lambda x, t: map_of(x, t, s), (x, t), (v, torch.ones_like(t)))[:2]
    f, end = torch.func.jvp(lambda s: map_of(x, t, s), (s,), (torch.ones_like(s),))[:2]
    both = map_of(map_of(x, t, m), m, s)
    return torch.stack([r.square().mean().sqrt() for r in (start, end - velocity(f, s), both - f)])


@pytest.mark.parametrize("path", PATHS)
def test_exact_flow_map_satisfies_all_three_identities(path: Path, batch: tuple[Tensor, ...]) -> None:
    law, (x0, x1, t, s) = gaussian(path), batch
    x = path.interpolate(x0, x1, t)
    assert residuals(law.flow_map, law.velocity, x, t, s).max() < 1e-10


@pytest.mark.parametrize("path", PATHS)
def test_each_identity_notices_a_map_that_is_not_the_flow(path: Path, batch: tuple[Tensor, ...]) -> None:
    """Check that a map that goes 10 % too far breaks all three, and one that never moves only the Lagrangian one."""
    law, (x0, x1, t, s) = gaussian(path), batch
    x = path.interpolate(x0, x1, t)

    def too_far(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x + 1.1 * (law.flow_map(x, t, s) - x)

    assert residuals(too_far, law.velocity, x, t, s).min() > 1e-3
    still = residuals(lambda x, t, s: x + 0 * s[:, None], law.velocity, x, t, s)
    assert still[2] == 0
    assert still[:2].min() > 0.1


def test_the_rings_flow_map_satisfies_the_identities_to_the_error_of_its_integrator() -> None:
    ring, t = Ring(), torch.full((6,), 0.8, dtype=torch.float64)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def map_of(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return ring.flow_map(x, t, s, steps=30)

    assert residuals(map_of, ring.velocity, x, t, 0.4 * t).max() < 1e-5
    assert residuals(map_of, lambda x, t: 1.1 * ring.velocity(x, t), x, t, 0.4 * t)[:2].min() > 1e-2


# The conditional velocity for the marginal one: right with a detached tangent, biased with the full gradient


def conditional_excess(law: Gaussian, t: float, s: float, count: int = 4000) -> tuple[Tensor, Tensor]:
    """Return mean squares of the Eulerian residual with v_hat minus with v, and of (df/dx)(v_hat - v)."""
    x0, x1 = whitened(law, count)
    times = [torch.full((count,), value, dtype=torch.float64) for value in (t, s)]
    x, v_hat = LINEAR.interpolate(x0, x1, times[0]), x1 - x0
    v = law.velocity(x, times[0])

    def residual(w: Tensor) -> Tensor:
        one = torch.ones_like(times[0])
        return torch.func.jvp(lambda x, t: law.flow_map(x, t, times[1]), (x, times[0]), (w, one))[1]

    spread = torch.func.jvp(lambda x: law.flow_map(x, *times), (x,), (v_hat - v,))[1]
    return residual(v_hat).square().mean() - residual(v).square().mean(), spread.square().mean()


def whitened(law: Gaussian, count: int) -> tuple[Tensor, Tensor]:
    """Return data and noise whose joint sample mean and covariance are exactly the law's and the normal's."""
    raw = torch.randn(count, 2 * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / count)).T
    values, axes = torch.linalg.eigh(law.covariance)
    return law.mean + white[:, :WIDTH] * values.sqrt() @ axes.T, white[:, WIDTH:]


def test_the_full_gradient_also_punishes_the_derivative_of_the_map() -> None:
    """Check E|D_v_hat f|^2 = E|D_v f|^2 + E|(df/dx)(v_hat - v)|^2: the last term is positive at the exact solution."""
    excess, spread = conditional_excess(gaussian(LINEAR), 0.8, 0.2)
    torch.testing.assert_close(excess, spread, rtol=1e-8, atol=1e-10)
    assert spread > 0.1
