"""The connections of docs/methods.md: how the methods become each other, checked on gradients of a network.

Numbers in the names of sections are those of the article. Everything is float64; each statement has a planted error
that must break it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastdistill.eval.exact import Gaussian, Ring
from fastdistill.jvp import jvp
from fastdistill.paths import LINEAR, Cosine, Linear, Path
from fastdistill.samplers import Net

Field = Callable[..., Tensor]
ROWS, WIDTH = 48, 3
PATHS = [pytest.param(path, id=type(path).__name__) for path in (Linear(), Cosine())]


class SmallNet(nn.Module):
    """A smooth network of (x, t, s) whose derivatives in all three are of order one."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH + 4, width), nn.Tanh(), nn.Linear(width, WIDTH)).double()

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        times = torch.stack((t, s), 1)
        return self.body(torch.cat((x, times, (2 * times).sin()), 1))


@pytest.fixture
def net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0, x1 (ROWS, WIDTH), t and s (ROWS,) with gaps of 0.1 to 0.5."""
    generator = torch.Generator().manual_seed(1)
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64, generator=generator)
    t, gap = torch.rand(2, ROWS, dtype=torch.float64, generator=generator)
    t = 0.6 + 0.35 * t
    return x0, x1, t, t - 0.1 - 0.4 * gap


@pytest.fixture
def law() -> Gaussian:
    return gaussian(LINEAR)


def gaussian(path: Path) -> Gaussian:
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    mean = torch.randn(WIDTH, dtype=torch.float64, generator=generator)
    return Gaussian(mean, factor @ factor.T / WIDTH + 0.2 * torch.eye(WIDTH, dtype=torch.float64), path)


def gradient(loss: Tensor, net: nn.Module) -> Tensor:
    """The gradient of a loss in all weights, as one vector."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(net.parameters()))])


def away(a: Tensor, b: Tensor) -> float:
    """The distance of two gradients, relative to the second."""
    return float((a - b).norm() / b.norm())


def jump(net: Net, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The flow map f = x - (t - s) u."""
    return x - (t - s)[:, None] * net(x, t=t, s=s, y=None)


def along(net: Net, x: Tensor, t: Tensor, s: Tensor, w: Tensor, tangent_grad: bool = False) -> tuple[Tensor, Tensor]:
    """f and D_w f, both (ROWS, WIDTH)."""
    return jvp(lambda x, t, s: jump(net, x, t, s), (x, t, s), (w, 1.0, None), tangent_grad=tangent_grad)


def consistency_gradient(net: SmallNet, x: Tensor, t: Tensor, s: Tensor, w: Tensor, weight: Tensor) -> Tensor:
    """The mean over rows of weight (df/dtheta)^T [D_w f]: continuous consistency towards s."""
    f, df_dt = along(net, x, t, s, w)
    return gradient((weight[:, None] * f * df_dt).sum() / len(x), net)


# 10. The three identities, on exact solutions


def residuals(
    map_of: Callable[..., Tensor], velocity: Callable[..., Tensor], x: Tensor, t: Tensor, s: Tensor
) -> Tensor:
    """Root mean squares of the Eulerian, Lagrangian and semigroup residuals of a flow map."""
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
    """A map that goes 10 % too far breaks all three; the one that never moves, only the Lagrangian one."""
    law, (x0, x1, t, s) = gaussian(path), batch
    x = path.interpolate(x0, x1, t)

    def too_far(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x + 1.1 * (law.flow_map(x, t, s) - x)

    assert residuals(too_far, law.velocity, x, t, s).min() > 1e-3
    still = residuals(lambda x, t, s: x + 0 * s[:, None], law.velocity, x, t, s)
    assert still[2] == 0
    assert still[:2].min() > 0.1


def test_the_rings_flow_map_satisfies_the_identities_to_the_error_of_its_integrator(batch: tuple[Tensor, ...]) -> None:
    ring, (_, _, t, s) = Ring(), batch
    x = torch.randn(ROWS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert residuals(ring.flow_map, ring.velocity, x, t, s).max() < 1e-6
    assert residuals(ring.flow_map, lambda x, t: 1.1 * ring.velocity(x, t), x, t, s)[:2].min() > 1e-2


# The conditional velocity for the marginal one: right with a detached tangent, biased with the full gradient


def conditional_excess(law: Gaussian, t: float, s: float, count: int = 4000) -> tuple[Tensor, Tensor]:
    """Mean squares of the Eulerian residual with v_hat minus with v, and of (df/dx)(v_hat - v)."""
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
    """Data and noise whose joint sample mean and covariance are exactly the law's and the normal's."""
    raw = torch.randn(count, 2 * WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / count)).T
    values, axes = torch.linalg.eigh(law_covariance(law))
    return law.mean + white[:, :WIDTH] * values.sqrt() @ axes.T, white[:, WIDTH:]


def law_covariance(law: Gaussian) -> Tensor:
    """Read from the flow map, whose derivative from noise to data is the root of the covariance."""
    one, zero = torch.ones(WIDTH, dtype=torch.float64), torch.zeros(WIDTH, dtype=torch.float64)
    root = law.flow_map(torch.eye(WIDTH, dtype=torch.float64), one, zero) - law.mean
    return root @ root.T


def test_the_full_gradient_also_punishes_the_derivative_of_the_map(law: Gaussian) -> None:
    """E|D_v_hat f|^2 = E|D_v f|^2 + E|(df/dx)(v_hat - v)|^2: the last term is positive at the exact solution."""
    excess, spread = conditional_excess(law, 0.8, 0.2)
    torch.testing.assert_close(excess, spread, rtol=1e-8, atol=1e-10)
    assert spread > 0.1
