"""MeanFlow against exact average velocities: zero at the truth to 1e-10, and every planted error far above it.

Residuals are root mean squares, read from the metric `raw_error`; states are of order one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.eval.exact import Gaussian, Ring
from fastdistill.jvp import jvp
from fastdistill.objectives import Guidance, meanflow
from fastdistill.paths import LINEAR, Cosine, Linear, Path
from fastdistill.samplers import Net, average_velocity
from fastdistill.times import LogitNormal, distinct_rows, pair_times
from tests.objectives import cases
from tests.objectives.descent import Case, diagonal, share

TAUGHT = {"meanflow": {}}
FROM_DATA = {"meanflow": {}}
DESCENT = {
    "meanflow": Case("meanflow", lambda g, d: 2 * cases.WIDTH * d**2 * 3 * d**2 / 1e-2),
    "meanflow from data": Case("meanflow", lambda g, d: 2 * cases.WIDTH * d**2 * 3 * d**2 / 1e-2, taught=False),
    "meanflow, diagonal": Case("meanflow", lambda g, d: 2 * cases.WIDTH * share(g) / 1e-2, diagonal),
}


EXACT = 1e-10
ROWS, WIDTH = 64, 4
PATHS = [pytest.param(path, id=type(path).__name__) for path in (Linear(), Cosine())]
Jvp = Callable[..., Any]


def batch(distinct: float = 0.75) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw x0, x1 (ROWS, WIDTH), t and s (ROWS,), all float64."""
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    t, s = pair_times(ROWS, LogitNormal(0.0, 1.0), distinct)
    return x0, x1, t.double(), s.double()


def gaussian_law(path: Path = LINEAR) -> Gaussian:
    factor = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    covariance = factor @ factor.T / WIDTH + 0.1 * torch.eye(WIDTH, dtype=torch.float64)
    return Gaussian(torch.randn(WIDTH, dtype=torch.float64), covariance, path)


def exact_net(law: Gaussian) -> Net:
    return lambda x, t, s, y=None: law.average_velocity(x, t, s)


def residual(net: Net, *arguments: Tensor, **options: Any) -> float:
    return meanflow(net, *arguments, **options)[1]["raw_error"].sqrt().item()


# Tier 0: at the exact solution


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("distinct", [0.0, 0.75, 1.0])
def test_residual_vanishes_at_the_exact_average_velocity(path: Path, distinct: float) -> None:
    """Check that with the exact velocity as teacher there is no noise: each row's residual is zero."""
    net = exact_net(gaussian_law(path))
    assert residual(net, *batch(distinct), path=path, teacher=net) < EXACT


@pytest.mark.parametrize("path", PATHS)
def test_gradient_from_data_vanishes_at_the_exact_average_velocity(path: Path) -> None:
    """Check that v_hat stands for v: the same expectation, because D_w u is linear in w.

    Data and noise are whitened, so that their sample moments are the Gaussian's own and expectations are sums.
    """
    raw = torch.randn(400, 2 * WIDTH, dtype=torch.float64)
    raw = raw - raw.mean(0)
    white = raw @ torch.linalg.inv(torch.linalg.cholesky(raw.T @ raw / len(raw))).T
    mean, factor = torch.randn(WIDTH, dtype=torch.float64), torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    law = Gaussian(mean, factor @ factor.T, path)
    t = torch.full((400,), 0.8, dtype=torch.float64)

    def gradient(factor_of_u: float) -> Tensor:
        slope = torch.zeros(WIDTH, WIDTH, dtype=torch.float64, requires_grad=True)
        net = lambda x, t, s, y=None: factor_of_u * law.average_velocity(x, t, s) + x @ slope  # noqa: E731
        loss, _ = meanflow(
            net, mean + white[:, :WIDTH] @ factor.T, white[:, WIDTH:], t, 0.25 * t, path=path, p=0.0, jvp=detached
        )
        return torch.autograd.grad(loss, slope)[0]

    assert gradient(1.0).abs().max() < EXACT
    assert gradient(1.1).abs().max() > 1e-2


def detached(
    fn: Callable[..., Tensor], primals: tuple[Tensor, ...], tangents: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """Call PyTorch's own forward mode, with the calling convention of `fastdistill.jvp`."""
    dense = tuple(
        torch.full_like(primal, tangent or 0.0) if not isinstance(tangent, Tensor) else tangent
        for primal, tangent in zip(primals, tangents, strict=True)
    )
    u, du_dt = torch.func.jvp(fn, primals, dense)[:2]
    return u, du_dt.detach()


# Tier 1: planted errors


def swapped_times(fn: Any, primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    (x, t, s), (w, _, _) = primals, tangents
    return fn(x, t, s), jvp(fn, (x, s, t), (w, None, 1.0))[1]


def no_time_tangent(fn: Any, primals: Any, tangents: Any) -> Any:
    return jvp(fn, primals, (tangents[0], None, None))


def wrong_sign(fn: Any, primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    u, du_dt = jvp(fn, primals, tangents)
    return u, -du_dt


def gap_held_fixed(fn: Any, primals: Any, tangents: Any) -> Any:
    """Differentiate a network of (x, t, h = t - s) along (w, 1, 0), where (w, 1, 1) is right: s moves along with t."""
    x, t, s = primals
    return jvp(lambda x, t, h: fn(x, t, t - h), (x, t, t - s), tangents)


def backward_velocity(fn: Any, primals: Any, tangents: Any) -> Any:
    return jvp(fn, primals, (-tangents[0], 1.0, None))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mutant", [swapped_times, no_time_tangent, wrong_sign, gap_held_fixed, backward_velocity])
def test_a_wrong_tangent_leaves_a_residual_at_the_exact_solution(mutant: Jvp, path: Path) -> None:
    """Check what was measured over eight seeds: 0.16 to 0.98, against 1e-15 for the right tangent."""
    net = exact_net(gaussian_law(path))
    assert residual(net, *batch(1.0), path=path, teacher=net, jvp=mutant) > 0.05


def test_a_path_other_than_the_velocitys_leaves_a_residual() -> None:
    net = exact_net(gaussian_law(Linear()))
    other = exact_net(gaussian_law(Cosine()))
    assert residual(net, *batch(1.0), teacher=other) > 0.05


# Tier 2: tangents and gradients of a network


class SmallNet(nn.Module):
    """Network of (x, t, s) with labels and enough bend for its derivatives to matter."""

    def __init__(self, features: int = 2, width: int = 64, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.labels = nn.Embedding(4, width, dtype=dtype)
        self.inputs = nn.Linear(features + 6, width, dtype=dtype)
        self.hidden = nn.Sequential(
            nn.SiLU(), nn.Linear(width, width, dtype=dtype), nn.SiLU(), nn.Linear(width, features, dtype=dtype)
        )

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        times = torch.stack((t, t - s), 1)
        hidden = self.inputs(torch.cat((x, times, (math.pi * times).sin(), (math.pi * times).cos()), 1))
        return self.hidden(hidden if y is None else hidden + self.labels(y))


def test_tangent_agrees_with_central_differences_along_the_flow() -> None:
    net, (x0, x1, t, s) = SmallNet(WIDTH, dtype=torch.float64), batch(1.0)
    seen: list[Tensor] = []

    def recording(fn: Any, primals: Any, tangents: Any) -> Any:
        seen.append(jvp(fn, primals, tangents)[1])
        return jvp(fn, primals, tangents)

    meanflow(net, x0, x1, t, s, jvp=recording)
    x, w, step = Linear().interpolate(x0, x1, t), x1 - x0, 1e-5
    difference = (net(x + step * w, t + step, s) - net(x - step * w, t - step, s)) / (2 * step)
    assert (seen[0] - difference).abs().max() < 1e-8


@pytest.mark.parametrize("driver", [jvp, detached])
@pytest.mark.parametrize("distinct", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("p", [0.0, 0.75, 1.0])
def test_gradient_is_the_hand_derived_one_with_a_detached_target(driver: Jvp, distinct: float, p: float) -> None:
    """Check the gradient sum over rows of 2 weight / B * (du/dtheta)^T residual, weight = [e + c]^-p; no split rows."""
    net, (x0, x1, t, s), y = SmallNet(WIDTH, dtype=torch.float64), batch(distinct), torch.arange(ROWS) % 4
    loss, metrics = meanflow(net, x0, x1, t, s, y=y, p=p, c=0.05, jvp=driver)
    x, w = Linear().interpolate(x0, x1, t), x1 - x0
    u, du_dt = detached(lambda x, t, s: net(x, t, s, y), (x, t, s), (w, 1.0, None))
    delta = (u - w + (t - s)[:, None] * du_dt).detach()
    error = delta.square().sum(1)
    weight = (error + 0.05) ** -p
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    expected = torch.autograd.grad(u, parameters, grad_outputs=2 * weight[:, None] * delta / ROWS)
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, (weight * error).mean())
    torch.testing.assert_close(metrics["raw_error"], delta.square().mean())


def test_teacher_and_guidance_receive_no_gradient() -> None:
    student, teacher = SmallNet(WIDTH, dtype=torch.float64), SmallNet(WIDTH, dtype=torch.float64)
    loss, _ = meanflow(student, *batch(), y=torch.arange(ROWS) % 3, teacher=teacher, guidance=Guidance(2.0, null=3))
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())


# Rows, metrics and bad input


@pytest.mark.parametrize("known", [True, False], ids=["counted", "found"])
@pytest.mark.parametrize("distinct", [0.0, 0.25, 1.0])
def test_only_rows_with_distinct_times_reach_the_jvp(distinct: float, known: bool) -> None:
    count, rows = distinct_rows(ROWS, distinct), {"jvp": 0, "net": 0}
    x0, x1, t, s = batch(distinct)
    y, order = torch.arange(ROWS) % 4, torch.arange(ROWS) if known else torch.randperm(ROWS)

    def counting(fn: Any, primals: Any, tangents: Any) -> Any:
        rows["jvp"] += len(primals[0])
        assert (primals[1] != primals[2]).all()
        return jvp(fn, primals, tangents)

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        rows["net"] += len(x)
        return x * y[:, None]

    arguments = (x0[order], x1[order], t[order], s[order])
    _, metrics = meanflow(net, *arguments, y=y[order], distinct_rows=count if known else None, jvp=counting)
    assert rows == {"jvp": count, "net": ROWS}
    assert metrics["distinct_share"].item() == distinct


def test_counted_and_found_rows_give_the_same_loss() -> None:
    net, arguments = SmallNet(WIDTH, dtype=torch.float64), batch(0.25)
    counted, _ = meanflow(net, *arguments, distinct_rows=16)
    found, _ = meanflow(net, *arguments)
    torch.testing.assert_close(counted, found, rtol=1e-14, atol=0)


def test_metrics_show_what_the_adaptive_loss_hides() -> None:
    """Check that at p = 1 the loss is near 1 whether the network is hopeless or merely bad; the raw error differs."""
    arguments, metrics = batch(), []
    for size in (10.0, 1000.0):
        _, measured = meanflow(lambda x, t, s, y, size=size: size + 0 * x, *arguments)
        metrics.append(measured)
        assert 0.99 < measured["loss"] < 1
        assert measured["tangent_norm"] == 0
    assert metrics[1]["raw_error"] > 5000 * metrics[0]["raw_error"]
    _, linear = meanflow(lambda x, t, s, y: 3.0 * t[:, None] + 0 * x, *arguments)
    assert linear["tangent_norm"].item() == pytest.approx(3.0)
    rows = linear.pop("rows")
    linear.pop("terms")
    assert all(value.shape == (ROWS,) and not value.requires_grad for value in rows.values())
    assert all(value.ndim == 0 and not value.requires_grad for value in linear.values())


def test_bad_batches_are_refused_by_name() -> None:
    net, (x0, x1, t, s) = SmallNet(WIDTH, dtype=torch.float64), batch(1.0)
    with pytest.raises(ValueError, match=r"^s: expected times in \[0, t\]"):
        meanflow(net, x0, x1, s, t)
    with pytest.raises(ValueError, match=r"^s: expected times in \[0, t\], got -"):
        meanflow(net, x0, x1, t, s - 1)
    with pytest.raises(ValueError, match=r"^t: expected times in \[0, 1\]"):
        meanflow(net, x0, x1, t + 1, s)
    with pytest.raises(ValueError, match=r"^s: expected shape \(64,\), .* got \(64, 1\)"):
        meanflow(net, x0, x1, t, s[:, None])
    with pytest.raises(ValueError, match=r"^x1: expected the shape of x0"):
        meanflow(net, x0, x1[:1], t, s)
    with pytest.raises(ValueError, match=r"^y: expected labels for guidance"):
        meanflow(net, x0, x1, t, s, guidance=Guidance(2.0, null=3))
    with pytest.raises(ValueError, match=r"^distinct_rows: .* \[0, 64\], got 65"):
        meanflow(net, x0, x1, t, s, distinct_rows=65)


# Tier 3: a smoke of training against the exact map


def improvement(driver: Jvp, taught: bool) -> float:
    """Return the error of the one-step map after 300 steps on the ring, over that of the untrained network."""
    ring, net, count, distinct = Ring(), SmallNet(), 256, 0.5
    noise, one = torch.randn(1000, 2), torch.ones(1000)
    truth = ring.flow_map(noise, one, 0 * one)

    def error() -> float:
        with torch.no_grad():
            return (average_velocity(net, noise) - truth).norm().item()

    untrained, optimizer = error(), torch.optim.Adam(net.parameters(), lr=3e-3)
    options: dict[str, Any] = {"p": 0.0, "distinct_rows": distinct_rows(count, distinct), "jvp": driver}
    teacher = (lambda x, t, s, y: ring.velocity(x, t)) if taught else None
    for _ in range(300):
        x0, _ = ring.sample(count)
        t, s = pair_times(count, LogitNormal(0.0, 1.0), distinct)
        loss, _ = meanflow(net, x0, torch.randn_like(x0), t, s, teacher=teacher, **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return error() / untrained


@pytest.mark.parametrize("taught", [True, False], ids=["teacher", "data"])
def test_a_short_training_brings_one_step_closer_to_the_exact_map(taught: bool) -> None:
    """Check what was measured over three seeds: 0.45 to 0.50 with the exact teacher, 0.53 to 0.58 from data."""
    assert improvement(jvp, taught) < 0.7


def test_a_short_training_with_the_wrong_sign_leads_away_from_the_exact_map() -> None:
    """Check what was measured over three seeds: 3.0 to 3.7."""
    assert improvement(wrong_sign, taught=True) > 1
