"""Share between the tests of objectives exact networks, one gate for every method, and the errors planted against it.

A gate is a method's residual (root mean square, before any weight) and its loss's gradient by small changes of the
network. Both are zero at the exact solution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill import objectives
from fastdistill.eval.exact import Gaussian
from fastdistill.jvp import jvp
from fastdistill.paths import Path, expand_time
from fastdistill.samplers import Net

EXACT = 1e-10
ROWS, WIDTH = 48, 3


def gaussian_law(path: Path, point: bool = False) -> Gaussian:
    """Return a Gaussian law of the data, or one point, where the conditional velocity is the marginal one."""
    factor = torch.randn(WIDTH, WIDTH, dtype=torch.float64)
    covariance = factor @ factor.T / WIDTH + 0.1 * torch.eye(WIDTH, dtype=torch.float64)
    return Gaussian(torch.randn(WIDTH, dtype=torch.float64), covariance * (0 if point else 1), path)


def exact_net(law: Gaussian) -> Net:
    """Return the exact average velocity as a network."""
    return lambda x, t, s, y=None: law.average_velocity(x, t, s)


def point_net(law: Gaussian) -> Net:
    """Return the exact average velocity for data in one point m, where x1 = (x - alpha m) / beta stays all the way."""

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        path, t_x, s_x = law.path, expand_time(t, x), expand_time(s, x)
        alpha, beta = path.slopes(t_x, s_x)
        return alpha * law.mean + beta * (x - path.alpha(t_x) * law.mean) / path.beta(t_x)

    return net


def draw_times(rows: int = ROWS) -> dict[str, Tensor]:
    """Draw times by name, 0.1 <= t <= 0.95 and s, r in (0.05 t, 0.9 t), but s = t in each fourth row; float64."""
    t, share = torch.rand(2, rows, dtype=torch.float64)
    t = 0.1 + 0.85 * t
    r = t * (0.05 + 0.85 * share)
    s = torch.where(torch.arange(rows) % 4 == 3, t, r)
    return {"t": t, "s": s, "r": r, "delta": (t - s) / 2}


def nudged(net: Net, theta: Tensor) -> Net:
    """Return the network plus theta (3,) times smooth functions of x, t and s, by which gradients are taken."""

    def changed(x: Tensor, t: Tensor, s: Tensor, **rest: Any) -> Tensor:
        bumps = theta[0] * x.sin() + theta[1] * expand_time(t, x) + theta[2] * expand_time((3 * s).cos(), x) * x
        return net(x, t=t, s=s, **rest) + bumps

    return changed


class SmallNet(nn.Module):
    """Network in float64 of (x, t, s) with labels, smooth, whose derivatives in all three are of order one."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.labels = nn.Embedding(4, width, dtype=torch.float64)
        self.first = nn.Linear(WIDTH + 4, width, dtype=torch.float64)
        self.last = nn.Sequential(nn.SiLU(), nn.Linear(width, WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        times = torch.stack((t, s), 1)
        hidden = self.first(torch.cat((x, times, (2 * times).sin()), 1))
        return self.last(hidden if y is None else hidden + self.labels(y))


@dataclass
class Gate:
    """Gate of a method at the exact solution of Gaussian data, with the exact velocity as teacher or data in one point.

    Args:
        name: of the method. taught: from the teacher rather than from data. options: keywords for the objective.
    """

    name: str
    path: Path
    taught: bool
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.objective = objectives.get(self.name)
        self.law = gaussian_law(self.path, point=not self.taught)
        self.net = exact_net(self.law) if self.taught else point_net(self.law)
        self.times = draw_times()
        x0, self.x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
        self.x0 = x0 if self.taught else self.law.mean.expand(ROWS, WIDTH)
        self.keywords: dict[str, Any] = {"path": self.path} | self.options
        if self.taught:
            self.keywords["teacher"] = self.net
        if self.name == "consistency" and self.taught:
            self.keywords["solver"] = self.law.flow_map
        if self.name == "rcm":
            self.keywords["score_gradient"] = torch.zeros_like(self.x1)

    def __call__(self, net: Net | None = None, **keywords: Any) -> tuple[float, float]:
        """Return the residual and the largest gradient, for a network and keywords instead of the exact ones."""
        theta = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        student = nudged(net or self.net, theta)
        times = [self.times[name] for name in self.objective.times]
        loss, metrics = self.objective.function(student, self.x0, self.x1, *times, **(self.keywords | keywords))
        (gradient,) = torch.autograd.grad(loss, theta)
        error = metrics["raw_error"] + metrics.get("anchor_error", 0)
        return error.sqrt().item(), gradient.abs().max().item()


Jvp = Callable[..., Any]


# Errors of the tangent (w, 1, 0)


def swapped_times(fn: Any, primals: Any, tangents: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Differentiate u(x, s, t) along (w, 0, 1), the seed's argument order."""
    (x, t, s), (w, time, _) = primals, tangents
    return fn(x, t, s), jvp(fn, (x, s, t), (w, None, time), **options)[1]


def no_time_tangent(fn: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    """Differentiate along (w, 0, 0)."""
    return jvp(fn, primals, (tangents[0], None, None), **options)


def no_state_tangent(fn: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    """Differentiate along (0, 1, 0)."""
    return jvp(fn, primals, (None, tangents[1], None), **options)


def wrong_sign(fn: Any, primals: Any, tangents: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Flip the derivative's sign."""
    u, du = jvp(fn, primals, tangents, **options)
    return u, -du


def gap_held_fixed(fn: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    """Differentiate a network of (x, t, h = t - s) along (w, 1, 0), where (w, 1, 1) is right: s moves along with t."""
    x, t, s = primals
    return jvp(lambda x, t, h: fn(x, t, t - h), (x, t, t - s), tangents, **options)


def backward_velocity(fn: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    """Differentiate along (-w, 1, 0)."""
    w, time, _ = tangents
    return jvp(fn, primals, (None if w is None else -w, time, None), **options)


# Errors of the tangent (0, 0, 1)


def start_moves(fn: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    """Differentiate along (0, 1, 0), by the time of the start."""
    return jvp(fn, primals, (None, 1.0, None), **options)


def both_move(fn: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    """Differentiate along (0, 1, 1)."""
    return jvp(fn, primals, (None, 1.0, 1.0), **options)


def no_tangent(fn: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    """Return no derivative at all."""
    u, du = jvp(fn, primals, tangents, **options)
    return u, 0 * du


EULERIAN_MUTANTS = [
    swapped_times,
    no_time_tangent,
    no_state_tangent,
    wrong_sign,
    gap_held_fixed,
    backward_velocity,
    no_tangent,
]
LAGRANGIAN_MUTANTS = [start_moves, both_move, wrong_sign, no_tangent]


# Errors of a network, as the student, as the stopped target or as the teacher


def instantaneous(net: Net) -> Net:
    """Ignore s: return the velocity, as if it were the average."""
    return lambda x, t, s, **rest: net(x, t=t, s=t, **rest)


def other_way(net: Net) -> Net:
    """Take s for t."""
    return lambda x, t, s, **rest: net(x, t=s, s=t, **rest)


def reversed_velocity(net: Net) -> Net:
    """Return the velocity from data to noise where noise to data is meant."""
    return lambda x, t, s, **rest: -net(x, t=t, s=s, **rest)


def too_far(net: Net) -> Net:
    """Return 10 % too much."""
    return lambda x, t, s, **rest: 1.1 * net(x, t=t, s=s, **rest)


def reversed_time(net: Net) -> Net:
    """Take t = 0 for the noise."""
    return lambda x, t, s, **rest: net(x, t=1 - t, s=1 - s, **rest)


class GuidedGaussians:
    """Average velocity under guidance, exact, for classes that share their mean and differ in variance.

    With C_y = alpha^2 variance_y + beta^2, class y's velocity is d_alpha m + r_y (x - alpha m), r_y = (log C_y)' / 2.
    Guided rates stay in that form, so that the flow from t to s scales x - alpha m by exp(-int_s^t r). The last class
    is "no label", and is never guided. A scale g by row, where it is given, replaces `scale`.
    """

    def __init__(
        self, variances: list[float], scale: float, interval: tuple[float, float] = (0.0, 1.0), *, path: Path
    ) -> None:
        self.variances, self.scale, self.interval, self.path = torch.tensor(variances).double(), scale, interval, path
        self.mean = torch.randn(WIDTH, dtype=torch.float64)
        self.null = len(variances) - 1

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor, g: Tensor | None = None) -> Tensor:
        variance, path = self.variances[y], self.path
        scale = torch.where(y == self.null, 1.0, self.scale if g is None else g)
        null, guided = self.variances[self.null], (t.clamp(*self.interval), s.clamp(*self.interval))
        extra = self._integral(variance, *guided) - self._integral(null, *guided)
        integral = self._integral(variance, t, s) + (scale - 1) * extra
        from_mean = x - expand_time(path.alpha(t), x) * self.mean
        f = expand_time(path.alpha(s), x) * self.mean + expand_time((-integral).exp(), x) * from_mean
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        plain = self._rate(variance, t)
        rate = torch.where(inside, plain + (scale - 1) * (plain - self._rate(null, t)), plain)
        v = expand_time(path.d_alpha(t), x) * self.mean + expand_time(rate, x) * from_mean
        gap = expand_time(t - s, x)
        return torch.where(gap == 0, v, (x - f) / torch.where(gap == 0, 1, gap))

    def _integral(self, variance: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the integral of the plain rate from s to t."""
        return 0.5 * (self._log_spread(variance, t) - self._log_spread(variance, s))

    def _log_spread(self, variance: Tensor, t: Tensor) -> Tensor:
        return (self.path.alpha(t).square() * variance + self.path.beta(t).square()).log()

    def _rate(self, variance: Tensor, t: Tensor) -> Tensor:
        a, b = self.path.alpha(t), self.path.beta(t)
        return (a * self.path.d_alpha(t) * variance + b * self.path.d_beta(t)) / (a.square() * variance + b.square())

    def unguided(self) -> GuidedGaussians:
        """Return the same law at scale 1."""
        twin = GuidedGaussians(self.variances.tolist(), 1.0, self.interval, path=self.path)
        twin.mean = self.mean
        return twin


def gradients(loss: Tensor, net: nn.Module) -> Tensor:
    """Return the loss's gradient by all weights that it reaches, as one vector."""
    parts = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def random_batch() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Draw x0, x1 (ROWS, WIDTH) and times by name."""
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    return x0, x1, draw_times()


def assert_same_gradient(ours: Tensor, theirs: Tensor, net: nn.Module, factor: float = 1.0) -> None:
    """Assert that the gradient of `ours` is `factor` times that of `theirs`, and not zero."""
    a, b = gradients(ours, net), gradients(theirs, net)
    assert b.norm() > 1e-4
    torch.testing.assert_close(a, factor * b, rtol=1e-9, atol=1e-11)
