"""Share between sCM and rCM the network as F, the derivative of f along the flow in parts, and the regression on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from fastdistill.objectives.checks import check_after_data, check_batch, check_choice, check_share, check_starts_at_data
from fastdistill.objectives.identities import Jvp, eulerian
from fastdistill.objectives.metric import Weighting, normalise_tangent, squared, weigh
from fastdistill.objectives.rows import Metrics, measure
from fastdistill.objectives.settings import (
    ArctanTimes,
    Context,
    GuidanceSettings,
    MethodSettings,
    flat_by_normalisation,
    ramp,
)
from fastdistill.objectives.velocity import Autoguidance, Guidance, scale_rows, target_velocity
from fastdistill.paths import Path, expand_time
from fastdistill.samplers import Learnt, Net
from fastdistill.settings import Bounds, settings


@dataclass(frozen=True)
class Tangent:
    """F and the parts of its pull; all have the shape of the state, or broadcast against it.

    With k = beta' / W, W = alpha beta' - beta alpha' and f = k x - beta F,
        D_w f / W = pull + turn + carried,  pull = k (w / W - F),  turn = k' x / W,  carried = -(beta / W) D_w F.
    On the circle by the angle, k = cos and W = 1, these are cos (w - F), -sin x and -sin dF/dt; on the linear path
    W = k = 1 and F = u, they are w - u, 0 and -t D_w u.

    Args:
        f_net: F with its gradient; no other part has one.
    """

    f_net: Tensor
    k: Tensor
    pull: Tensor
    turn: Tensor
    carried: Tensor
    du_dt: Tensor

    @property
    def rate(self) -> Tensor:
        """Return D_w f / W."""
        return self.pull + self.turn + self.carried


Warmup = Callable[[Tangent, float], Tensor]  # warm_up(tangent, r) -> g; at r = 1 it is k D_w f / W


def regress(
    warm_up: Warmup,
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    *,
    path: Path,
    y: Tensor | None = None,
    teacher: Net | None = None,
    weak_teacher: Net | None = None,
    guidance: Guidance | Autoguidance | None = None,
    weighting: Weighting | None = None,
    warmup: float,
    parameterization: str,
    c: float | None,
    jvp: Jvp,
) -> tuple[Tensor, Metrics]:
    """Return the loss ||F - [F + g / (||g|| + c)]||^2 with g = warm_up(tangent, warmup), and its metrics; as `scm`."""
    check_batch(x0, x1, t, y=y)
    check_after_data(t)
    check_share("warmup", warmup)
    check_choice("parameterization", parameterization, ("velocity", "average"))
    x, s, g_rows = path.interpolate(x0, x1, t), torch.zeros_like(t), scale_rows(guidance)
    w = target_velocity(
        net, x, path.velocity(x0, x1, t), t, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance
    )
    u, du_dt = eulerian(net, x, t, s, w, y=y, g=g_rows, jvp=jvp)
    time = expand_time(t, x)
    tangent = _tangent_of(path, parameterization, x, time, w, u, du_dt)
    direction = warm_up(tangent, warmup)
    if c is not None:
        direction = normalise_tangent(direction, c)
    error = squared(tangent.f_net - (tangent.f_net + direction).detach(), "mean")
    loss = weigh(error, weighting, t, s).mean()
    return loss, measure(loss, tangent.k * tangent.rate, t, s, tangent=du_dt)


def _tangent_of(path: Path, form: str, x: Tensor, time: Tensor, w: Tensor, u: Tensor, du_dt: Tensor) -> Tangent:
    rate = (w - u - time * du_dt).detach()  # D_w f
    if form == "average":
        own = u.detach()
        return Tangent(u, torch.ones_like(time), w - own, torch.zeros_like(x), -(time * du_dt).detach(), du_dt)
    check_starts_at_data(path, "parameterization='velocity'", "use 'average', or path 'linear', 'cosine' or 'trig'")
    beta, scale = path.beta(time), _turning(path, time)
    k = path.d_beta(time) / scale
    f_net = ((k - 1) * x + time * u) / beta
    pull = k * (w / scale - f_net.detach())
    turn = _derivative(lambda t: path.d_beta(t) / _turning(path, t), time) * x / scale
    return Tangent(f_net, k, pull, turn, rate / scale - pull - turn, du_dt)


def _turning(path: Path, t: Tensor) -> Tensor:
    """Return W, with which the pair (x, v) turns into (x0, x1)."""
    return path.alpha(t) * path.d_beta(t) - path.beta(t) * path.d_alpha(t)


def _derivative(schedule: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    # In reverse mode, so that it also works inside a driver of forward mode and under no_grad.
    return torch.func.grad(lambda t: schedule(t).sum())(t)


@settings
class ContinuousConsistency(MethodSettings):
    """Settings that sCM and rCM share."""

    times: ArctanTimes = ArctanTimes()
    """The law of the training times t."""
    tangent_warmup: Annotated[int, Bounds(ge=0)] = 10_000
    """Steps over which the network's own tangent enters; until then the target is nearer to the velocity."""
    parameterization: Literal["velocity", "average"] = "velocity"
    """What is regressed: sCM's F, on paths that start at the data, or the average velocity, on any."""
    c: Annotated[float | None, Bounds(gt=0)] = 0.1
    """Of the tangent's normalisation, g / (|g| + c); None: none."""
    learned_weight: bool = True
    """Weigh the times by a learned variance."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance of the teacher."""

    learns: ClassVar[tuple[Learnt, ...]] = ("end",)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return (self.times.draw(context),)

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"warmup": ramp(context, self.tangent_warmup)}

    def why_flat(self) -> str | None:
        return flat_by_normalisation(self.c)
