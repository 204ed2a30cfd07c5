"""Sample by jumps to the data, with fresh noise between the jumps."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.paths import LINEAR, Path
from fastdistill.samplers.spec import Sampler
from fastdistill.samplers.steps import Net, Steps, fresh_noise, intervals, jump, renoise


def consistency(
    net: Net,
    x: Tensor,
    steps: Steps = 1,
    y: Tensor | None = None,
    *,
    g: float | Tensor | None = None,
    path: Path = LINEAR,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Jump to the data, x0 = f(x_t, t, 0), and between jumps return to the noise level of s with fresh noise.

    The new state is x_s = alpha(s) x0 + beta(s) noise. On a path with beta(0) > 0 the end of a jump already holds some
    noise, so only the missing amount is added. Each step takes one evaluation. The last time must be 0, the path's end.

    Args:
        g: the guidance scale, a number or (B,), for a network that takes it as an input; None passes none.
        generator: the generator of the noise; None takes the global one of the state's device.

    Source: Song et al. 2023 (consistency models), arXiv:2303.01469, algorithm 1.
    """
    grid = intervals(steps)
    if grid[-1][1] != 0:
        raise ValueError(f"steps: expected times that end at 0, got {grid[-1][1]}")
    for t, s in grid:
        x = jump(net, x, t, 0.0, y, g)
        if s > 0:
            shrink, added = renoise(path, 0.0, s)
            x = shrink * x + added * fresh_noise(x, generator)
    return x


SPEC = Sampler(consistency, needs=("map", "end"), evaluations=1, renoises=True)
