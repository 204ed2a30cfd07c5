"""Sample by jumps beyond the next time, and return to it with fresh noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.paths import LINEAR, Path
from fastdistill.samplers.spec import Parameter, Sampler
from fastdistill.samplers.steps import Net, Steps, fresh_noise, intervals, jump, level, renoise

GAMMA = Parameter(0.5, low=0.0, high=1.0, help="share of the noise that is new at each step")


def gamma(
    net: Net,
    x: Tensor,
    steps: Steps = 1,
    y: Tensor | None = None,
    *,
    gamma: float,
    g: float | Tensor | None = None,
    path: Path = LINEAR,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Jump beyond s to less noise, and return to s with fresh noise, gamma times the amount at s.

    The end r of the jump satisfies beta(r)/alpha(r) = (1 - gamma^2)^(1/2) beta(s)/alpha(s), and
        x_s = (alpha(s)/alpha(r)) f(x_t, t, r) + gamma beta(s) noise.
    gamma = 0 is `average_velocity`, and gamma = 1 is `consistency`. If the path never has so little noise, then r = 0
    and only the missing noise is added. Each step takes one evaluation.

    Args:
        gamma: the share of fresh noise, in [0, 1].
        g, generator: see `consistency`.

    Source: Sabour et al. 2025 (AYF), arXiv:2506.14603, γ-sampling, here for any path; Kim et al. 2024 (CTM),
    arXiv:2310.02279.
    """
    GAMMA.check("gamma", gamma)
    for t, s in intervals(steps):
        end = s if gamma == 0 else _less_noise(path, s, math.sqrt(1 - gamma**2))
        x = jump(net, x, t, end, y, g)
        if end != s:
            shrink, added = renoise(path, end, s)
            x = shrink * x + (added if end == 0 else gamma * level(path, s)[1]) * fresh_noise(x, generator)
    return x


def _less_noise(path: Path, s: float, factor: float) -> float:
    """Return the time at which beta / alpha is `factor` times its value at s, or 0 if the path doesn't reach that."""
    (alpha, beta), start = level(path, s), level(path, 0.0)
    angle = math.atan2(factor * beta, alpha)
    if angle <= math.atan2(start[1], start[0]):
        return 0.0
    return path.time_at(torch.tensor(angle, dtype=torch.float64)).item()


SPEC = Sampler(gamma, needs=("map",), evaluations=1, renoises=lambda gamma: gamma != 0, parameters={"gamma": GAMMA})
