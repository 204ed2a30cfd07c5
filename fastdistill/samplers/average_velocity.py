"""Sample by jumps along the learned flow map."""

from __future__ import annotations

from torch import Tensor

from fastdistill.samplers.spec import Sampler
from fastdistill.samplers.steps import Net, Steps, intervals, jump


def average_velocity(
    net: Net, x: Tensor, steps: Steps = 1, y: Tensor | None = None, *, g: float | Tensor | None = None
) -> Tensor:
    """Jump along the learned flow map, x_s = x_t - (t - s) u(x_t, t, s), on any path.

    The default, steps = 1, is one-step generation. With the exact u, any number of steps gives the exact flow map. Each
    step takes one evaluation.

    Args:
        g: the guidance scale, a number or (B,), for a network that takes it as an input; None passes none.

    Source: Geng et al. 2025 (MeanFlow), arXiv:2505.13447, algorithm 2, which has one step.
    """
    for t, s in intervals(steps):
        x = jump(net, x, t, s, y, g)
    return x


SPEC = Sampler(average_velocity, needs=("map",), evaluations=1)
