"""ReFlow: straighten a flow by flow matching on pairs that the flow itself couples.

It needs no objective of its own. One round: `coupled_pairs` from a teacher, then `flow_matching` on them, which makes
the next teacher; k rounds are k-rectified flow. To distil into one step, flow matching at t = 1 alone
(`fastdistill.times.Constant`) on the last pairs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from fastdistill.objectives.flow_matching import METHOD as FLOW_MATCHING
from fastdistill.objectives.settings import Context, Instantaneous, Run
from fastdistill.paths import LINEAR, Path
from fastdistill.samplers import Net, Steps, guided, intervals, sample
from fastdistill.settings import Bounds, ConfigError, settings

DETERMINISTIC = ("euler", "heun", "adaptive", "average_velocity")


@torch.no_grad()
def coupled_pairs(
    teacher: Net,
    x1: Tensor,
    y: Tensor | None = None,
    steps: Steps = 50,
    *,
    sampler: str = "heun",
    path: Path = LINEAR,
    scale: float = 1.0,
    null: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Make pairs (x0, x1): unit noise x1 (B, ...) and where the teacher's flow takes it, without gradient.

    Args:
        teacher: called as teacher(x, t=t, s=s, y=y).
        y: (B,) int64 labels, or None; they belong to the pairs.
        steps, scale, null, options: of `fastdistill.samplers.sample`.
        sampler: a name in `DETERMINISTIC`: with fresh noise on the way the pairs would be no coupling by a flow.

    Source: Liu et al. 2023 (rectified flow), arXiv:2209.03003, algorithm 1.
    """
    if sampler not in DETERMINISTIC:
        raise ValueError(f"sampler: expected one of {', '.join(DETERMINISTIC)}, got {sampler!r}")
    return sample(sampler, teacher, x1, steps, y, path=path, scale=scale, null=null, **options), x1


@torch.no_grad()
def straightness(
    net: Net,
    x1: Tensor,
    y: Tensor | None = None,
    steps: Steps = 100,
    *,
    path: Path = LINEAR,
    scale: float = 1.0,
    null: int | None = None,
) -> Tensor:
    """Return the integral over t of E ||(x_1 - x_0) - v(x_t, t)||^2 along the flow of `net` from noise x1 (B, ...).

    0 where all trajectories are straight and run at constant speed, so that one step of Euler is exact. The norm is a
    sum over elements; the mean is over rows. By Heun's method, of which x_1 - x_0 is the mean slope: a scalar, float64.

    Args:
        net, y, scale, null: as of `fastdistill.samplers.guided`.

    Source: Liu et al. 2023 (rectified flow), arXiv:2209.03003, its measure of straightness.
    """
    velocity, x = guided(net, y, scale, null), path.prior(x1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    chord, energy, length = torch.zeros_like(x, dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0.0
    for t, s in intervals(steps):
        ends = (torch.full((len(x),), time, device=x.device, dtype=dtype) for time in (t, s))
        v = velocity(x, next(ends))
        v_end = velocity(x - (t - s) * v, next(ends))
        x = x - (t - s) * 0.5 * (v + v_end)
        v, v_end = v.double(), v_end.double()
        chord = chord + (t - s) * 0.5 * (v + v_end)
        energy = energy.to(x.device) + (t - s) * 0.5 * (v.square() + v_end.square()).flatten(1).sum(1).mean()
        length += t - s
    return energy - chord.square().flatten(1).sum(1).mean() / length


@settings
class ReFlow(Instantaneous):
    """Settings of ReFlow's training."""

    pairs: Annotated[int, Bounds(ge=1, le=10**8)] = 20_000
    """How many pairs are made, once, before training."""
    pair_steps: Annotated[int, Bounds(ge=1, le=10_000)] = 32
    """Steps of Heun's method for each, two evaluations a step."""
    pair_guidance: Annotated[float, Bounds(ge=0)] = 1.0
    """Classifier-free guidance scale of the teacher while it makes them."""
    distil: bool = False
    """Train at t = 1 alone: the last round, whose network makes one step and no more. Needs sample_steps 1."""

    makes_pairs: ClassVar[bool] = True

    def has_learnt(self, steps: int) -> bool:
        return steps == 1 or not self.distil

    def check(self, run: Run) -> None:
        if self.distil and self.sample_steps != 1:
            raise ConfigError(
                f"method.sample_steps: with method.distil the network knows t = 1 alone, so expected 1, got "
                f"{self.sample_steps}"
            )
        if self.distil and not _is_straight(run.path):
            raise ConfigError(
                f"method.distil: its one step follows the velocity at t = 1, which leads from pure noise to the data "
                f"on a straight path alone; expected path.name linear, fm or icfm, got {run.path_name}"
            )

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        if self.distil:
            return (torch.ones(context.rows, device=context.device),)
        return super().draw_times(context)


def _is_straight(path: Path) -> bool:
    """Return whether a pair's state moves at constant velocity from (almost) the data to pure noise."""
    start, end = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    rates = [(f(end) - f(start) - d(end)).abs() for f, d in ((path.alpha, path.d_alpha), (path.beta, path.d_beta))]
    return float(path.alpha(end)) < 1e-12 and max(map(float, rates)) < 1e-12


METHOD = replace(
    FLOW_MATCHING,
    name="reflow",
    place=2,
    sources=(
        "Liu et al. 2023 (rectified flow), arXiv:2209.03003, algorithm 1; pairs by objectives.reflow.coupled_pairs",
        *FLOW_MATCHING.sources,
    ),
    summary="ReFlow: flow matching on pairs of noise and where a teacher's flow takes it, which straightens the flow.",
    settings=ReFlow,
    recipes={
        "ring": {
            "method": {"times": {"law": "uniform"}, "pairs": 20000, "pair_steps": 32},
            "teacher": "runs/ring-flow",
        },
        "digits": {
            "method": {"times": {"law": "uniform"}, "pairs": 20000, "pair_steps": 16},
            "teacher": "runs/digits-flow",
        },
    },
)
