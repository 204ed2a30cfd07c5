"""Flow matching against exact velocities: zero at the truth, and visibly not at anything else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill import objectives
from fastdistill.eval.exact import Gaussian
from fastdistill.objectives import flow_matching
from fastdistill.paths import Cosine, Linear, Path
from fastdistill.samplers import Net
from tests.objectives.descent import Case, diagonal

ROWS, WIDTH = 32, 4

FROM_DATA = {"flow_matching": {}}
DESCENT = {
    "flow matching": Case("flow_matching", lambda g, d: 2 + 0 * d, diagonal, taught=False),
}


PATHS = [pytest.param(path, id=type(path).__name__) for path in (Linear(), Cosine())]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    return x0, x1, 0.1 + 0.8 * torch.rand(ROWS, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_error_vanishes_at_the_exact_velocity_of_a_point_and_at_no_mutant(
    path: Path, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Check data in one point: the conditional velocity is the marginal one, so the loss itself is zero."""
    _, x1, t = batch
    point = torch.randn(WIDTH, dtype=torch.float64)
    law = Gaussian(point, torch.zeros(WIDTH, WIDTH, dtype=torch.float64), path)
    x0 = point.expand(ROWS, WIDTH)

    def residual(velocity: Net) -> float:
        _, metrics = flow_matching(velocity, x0, x1, t, path=path)
        return metrics["raw_error"].sqrt().item()

    assert residual(lambda x, t, s, y: law.velocity(x, t)) < 1e-10
    assert residual(lambda x, t, s, y: -law.velocity(x, t)) > 1, "time runs backwards"
    assert residual(lambda x, t, s, y: law.velocity(x, 1 - t)) > 0.5, "data and noise change places"


@pytest.mark.parametrize("path", PATHS)
def test_gradient_vanishes_at_the_marginal_velocity(path: Path) -> None:
    """Check whitened data and noise, whose sample moments are a Gaussian's own, so that expectations are sums."""
    law, x0, x1 = whitened(path)
    t = torch.full((len(x0),), 0.35, dtype=torch.float64)

    def gradient(factor: float) -> Tensor:
        slope = torch.zeros(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True)
        shift = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
        loss, _ = flow_matching(
            lambda x, t, s, y: factor * law.velocity(x, t) + x @ slope + shift, x0, x1, t, path=path
        )
        return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, (slope, shift))])

    assert gradient(1.0).abs().max() < 1e-10
    assert gradient(1.1).abs().max() > 1e-3


def whitened(path: Path) -> tuple[Gaussian, Tensor, Tensor]:
    """Return a Gaussian law and (x0, x1) whose joint sample mean and covariance are exactly the law's."""
    raw = torch.randn(400, 2 * WIDTH, dtype=torch.float64)
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / len(raw))).T
    mean, factor = torch.randn(WIDTH, dtype=torch.float64), torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    x0, x1 = mean + white[:, :WIDTH] @ factor.T, white[:, WIDTH:]
    return Gaussian(mean, factor @ factor.T, path), x0, x1


def test_network_is_called_with_the_state_both_times_and_labels(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x0, x1, t = batch
    labels = torch.randint(10, (ROWS,))

    def net(x: Tensor, **named: Tensor) -> Tensor:
        assert torch.equal(x, Linear().interpolate(x0, x1, t))
        assert named["t"] is t
        assert named["s"] is t
        assert named["y"] is labels
        return torch.zeros_like(x)

    loss, metrics = flow_matching(net, x0, x1, t, y=labels)
    torch.testing.assert_close(loss, (x1 - x0).square().mean())
    torch.testing.assert_close(metrics["raw_error"], loss)
    assert not metrics["loss"].requires_grad


def test_weight_scales_each_row_and_leaves_the_raw_error(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x0, x1, t = batch
    net = lambda x, t, s, y: torch.zeros_like(x)  # noqa: E731
    loss, metrics = flow_matching(net, x0, x1, t, weight=lambda t: 1 / (1 - t))
    torch.testing.assert_close(loss, ((x1 - x0).square().mean(1) / (1 - t)).mean())
    torch.testing.assert_close(metrics["raw_error"], (x1 - x0).square().mean())


def test_bad_batches_are_refused_by_name(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x0, x1, t = batch
    net = lambda x, t, s, y: x  # noqa: E731
    with pytest.raises(ValueError, match=r"^x1: .* got \(32, 3\)"):
        flow_matching(net, x0, x1[:, :3], t)
    with pytest.raises(ValueError, match=r"^x0: .* got \(0, 4\)"):
        flow_matching(net, x0[:0], x1[:0], t[:0])
    with pytest.raises(ValueError, match=r"^t: .* got \(\)"):
        flow_matching(net, x0, x1, t[0])
    with pytest.raises(ValueError, match=r"^y: .* got \(31,\)"):
        flow_matching(net, x0, x1, t, y=torch.zeros(31, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"^t: .* in \[0, 1\], got 1.5"):
        flow_matching(net, x0, x1, t.where(t != t[3], 1.5))
    with pytest.raises(ValueError, match=r"^t: .* in \[0, 1\], got nan"):
        flow_matching(net, x0, x1, t.where(t != t[3], float("nan")))


def test_registry_says_what_each_objective_needs() -> None:
    assert objectives.get("meanflow").two_times
    assert objectives.get("meanflow").takes_teacher
    assert not objectives.get("flow_matching").two_times
    with pytest.raises(ValueError, match=r"^objective: expected one of flow_matching, meanflow, .*, got 'mean_flow'"):
        objectives.get("mean_flow")
