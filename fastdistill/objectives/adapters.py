"""Networks of other conventions as the network that the objectives call: net(x, t=t, s=s, y=y) -> u.

Each adapter converts inside the function that is differentiated, so that tangents follow by the chain rule. A network
of (t, h = t - s) moves along (w, 1, 1) when (x, t, s) moves along (w, 1, 0), and nobody has to remember it. All pass
on y, and g where it is given. They nest: `gap_conditioned(...)` inside `reversed_time(...)`, and so on.

Predictions of x0, x1, the score, the path's velocity or TrigFlow's F are one pair (x0, x1) each, with x = alpha x0 +
beta x1. The average velocity from t to s that keeps the pair is slope(alpha) x0 + slope(beta) x1 with the mean slopes
between s and t: DDIM's step for s < t, the instantaneous velocity for s = t. The network may look at s or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdistill.objectives.checks import check_one_end
from fastdistill.paths import Path, TrigFlow, carry_average_velocity, convert, expand_time
from fastdistill.samplers import Net

Keywords = dict[str, Any]


def gap_conditioned(net: Callable[..., Tensor]) -> Net:
    """Adapt net(x, t=t, h=t - s, y=y), as most MeanFlow code conditions.

    Equivalent to: lambda x, t, s, y: net(x, t=t, h=t - s, y=y).
    """
    return lambda x, t, s, **rest: net(x, t=t, h=t - s, **rest)


def reversed_time(net: Net) -> Net:
    """Adapt a network whose time 0 is noise and 1 data, and whose velocity is that of rising time.

    Equivalent to: lambda x, t, s, y: -net(x, t=1 - t, s=1 - s, y=y).
    """
    return lambda x, t, s, **rest: -net(x, t=1 - t, s=1 - s, **rest)


def scaled_time(net: Net, factor: float) -> Net:
    """Adapt a network whose times are `factor` times ours, e.g. 1000 for diffusion steps; u stays by our time.

    Equivalent to: lambda x, t, s, y: net(x, t=factor * t, s=factor * s, y=y).
    """
    return lambda x, t, s, **rest: net(x, t=factor * t, s=factor * s, **rest)


def one_time(net: Callable[..., Tensor]) -> Net:
    """Adapt net(x, t=t, y=y), which knows no s: a velocity field as a teacher, or a consistency network for s = 0.

    Equivalent to: lambda x, t, s, y: net(x, t=t, y=y).
    """
    return lambda x, t, s, **rest: net(x, t=t, **rest)


def signed_time(net: Callable[..., Tensor]) -> Net:
    """Adapt FACM's network of one time, net(x, c=c, y=y): c = t leads to s = 0, and c = -t is the velocity at t.

    At s = 0 the tangent along (w, 1, 0) is the network's along (w, 1). In the published code's time the data are at 1,
    and 1 - c stands for c: such a network is `signed_time(lambda x, c, **rest: -net(x, 1 - c, **rest))`.

    Raises:
        ValueError: on the CPU, an s that is neither 0 nor t. On a GPU it isn't read, and counts as t; nor is it in a
            compiled function or under vmap.

    Equivalent to: lambda x, t, s, y: net(x, c=torch.where(s == 0, t, -t), y=y).
    Source: Peng et al. 2025 (FACM), arXiv:2507.03738, the expanded time interval, with time reversed.
    """

    def adapted(x: Tensor, t: Tensor, s: Tensor, **rest: Any) -> Tensor:
        check_one_end(t, s)
        return net(x, c=torch.where(s == 0, t, -t), **rest)

    return adapted


def predicts(net: Net, prediction: str, path: Path) -> Net:
    """Adapt a network that predicts "x0", "x1", "v" or "score" on the path; see the module's docstring for s < t.

    "v" is the path's velocity as a prediction of the pair: for s < t it is then no average velocity, and s = 0 gives
    the consistency function f = x0-prediction, on each path that starts at the data.

    Equivalent to: slope(alpha) x0 + slope(beta) x1 with x0, x1 by `fastdistill.paths.convert`.
    Source: Song et al. 2021 (DDIM), arXiv:2010.02502, equation 12 without noise, for any schedule.
    """

    def adapted(x: Tensor, t: Tensor, s: Tensor, **rest: Any) -> Tensor:
        value = net(x, t=t, s=s, **rest)
        x0, x1 = (convert(path, x, t, value, prediction, target) for target in ("x0", "x1"))
        alpha, beta = (expand_time(slope, x) for slope in path.slopes(t, s))
        return alpha * x0 + beta * x1

    return adapted


def trigflow(net: Net, path: TrigFlow) -> Net:
    """Adapt sCM's network F(x / sigma_data, angle), with f = cos(a) x - sin(a) sigma_data F, a = pi t / 2.

    The network is called with the scaled state and angles for t and s.

    Equivalent to: predicts(lambda x, t, s: (pi / 2) sigma_data F(x / sigma_data, pi t / 2), "v", path).
    Source: Lu and Song 2025 (sCM), arXiv:2410.11081, equations 3 and 5.
    """
    quarter, scale = 0.5 * math.pi, path.sigma_data

    def velocity(x: Tensor, t: Tensor, s: Tensor, **rest: Any) -> Tensor:
        return quarter * scale * net(x / scale, t=quarter * t, s=quarter * s, **rest)

    return predicts(velocity, "v", path)


def edm(net: Callable[..., Tensor], path: Path, sigma_data: float = 0.5) -> Net:
    """Adapt EDM's raw network, net(c_in x, noise=log(sigma) / 4, y=y), on any path; sigma = beta / alpha.

    The data prediction is c_skip x + c_out net(...), with the state x of the variance-exploding path, ours over alpha.
    t with alpha = 0 or beta = 0 have no finite noise level: their result is not a number.

    Source: Karras et al. 2022 (EDM), arXiv:2206.00364, equation 7 and table 1.
    """

    def denoiser(x: Tensor, t: Tensor, s: Tensor, **rest: Any) -> Tensor:
        alpha, sigma = path.alpha(t), path.beta(t) / path.alpha(t)
        total = sigma.square() + sigma_data**2
        exploding = x / expand_time(alpha, x)
        skip, out, inside = sigma_data**2 / total, sigma * sigma_data / total.sqrt(), 1 / total.sqrt()
        raw = net(expand_time(inside, x) * exploding, noise=sigma.log() / 4, **rest)
        return expand_time(skip, x) * exploding + expand_time(out, x) * raw

    return predicts(denoiser, "x0", path)


def on_path(net: Net, source: Path, target: Path) -> Net:
    """Adapt a network on the path `source` to `target`, by a change of time and scale that keeps its flow map.

    Equivalent to: `fastdistill.paths.carry_average_velocity` with y and g passed on.
    """

    def adapted(x: Tensor, t: Tensor, s: Tensor, **rest: Any) -> Tensor:
        carried = carry_average_velocity(lambda x, t, s: net(x, t=t, s=s, **rest), source, target)
        return carried(x, t, s)

    return adapted


def with_scale(net: Net, scale: float) -> Net:
    """Fix the scale of a network that embeds the guidance scale: net(x, t=t, s=s, y=y, g=scale)."""
    return lambda x, t, s, **rest: net(x, t=t, s=s, **(rest | {"g": torch.full_like(t, scale)}))
