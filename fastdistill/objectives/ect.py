"""Easy consistency tuning: consistency training that starts from a diffusion model and closes the gap in stages."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fastdistill.objectives.checks import check_apart, check_batch, check_deterministic, check_keeps_data
from fastdistill.objectives.identities import flow_map
from fastdistill.objectives.metric import Weighting, pseudo_huber, weigh
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.rows import Metrics, measure
from fastdistill.objectives.settings import Context, LevelSettings, MethodSettings, Run
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Learnt, Net
from fastdistill.settings import Bounds, settings
from fastdistill.times import LogNormalLevel, ect_stage, ect_times


def ect(
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    y: Tensor | None = None,
    path: Path = LINEAR,
    target: Net | None = None,
    weighting: Weighting | None = None,
    c: float = 1e-6,
) -> tuple[Tensor, Metrics]:
    """Return ||f(x_t, t, 0) - [f(x_r, r, 0)]|| / (sigma(t) - sigma(r)), averaged over rows, and its metrics.

    Both states share x0 and x1. sigma = beta / alpha is the noise level, so that the loss is the same on every path, of
    which the paper's own is "edm". The norm is over all elements of a row (summed squares, not squared after), smoothed
    below `c`. Rows with r = 0 are plain denoising on every path: their target is x0 and their gap is all of sigma(t),
    also where the path itself starts at some noise. Dropout must draw the same numbers in both calls: the caller's
    `net` and `target` see to that, or use none.

    Args:
        r: (B,), the next time towards the data, 0 <= r < t; `fastdistill.times.ect_times` lets it approach t by stages.
        target: the network of the bracket; None is `net` itself, as in the paper.
        c: the constant of the Pseudo-Huber form sqrt(e + c^2) - c, > 0.

    Returns:
        The loss; `raw_error` is the mean square of the difference over t - r.

    Raises:
        ValueError: r not below t; a path with noise of its own; on the CPU, a time at which the path holds no data.

    Equivalent to: consistency(distance="huber", c=c, weight=lambda t, r: 1 / (sigma(t) - sigma(r))).
    Source: Geng et al. 2025 (ECT), arXiv:2406.14548, section 3.
    """
    check_batch(x0, x1, t, r, y, end="r")
    check_apart(t, r)
    check_deterministic(path, "ect", "use path 'edm' or 'linear'")
    check_keeps_data(path, t)
    x, s, clean = path.interpolate(x0, x1, t), torch.zeros_like(t), r == 0
    with torch.no_grad():
        goal = flow_map(target or net, path.interpolate(x0, x1, r), r, s, y)
        goal = torch.where(expand_time(clean, x), x0, goal)
    residual = flow_map(net, x, t, s, y) - goal
    gap = path.beta(t) / path.alpha(t) - torch.where(clean, 0.0, path.beta(r) / path.alpha(r))
    loss = weigh(pseudo_huber(residual, c) / gap, weighting, t, r).mean()
    return loss, measure(loss, residual / expand_time(t - r, x), t, s)


@settings
class ECT(MethodSettings):
    """Settings of easy consistency tuning's training."""

    q: Annotated[float, Bounds(gt=1)] = 2.0
    """Each stage divides the relative gap of noise levels by it."""
    stages: Annotated[int, Bounds(ge=1)] = 8
    """How many stages, equally long."""
    levels: LevelSettings = LevelSettings()
    """The law of the noise levels."""
    c: Annotated[float, Bounds(gt=0)] = 1e-6
    """The norm of the difference is smoothed below it."""

    learns: ClassVar[tuple[Learnt, ...]] = ("end",)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return ect_times(
            context.rows,
            ect_stage(context.step, context.steps, self.stages),
            q=self.q,
            law=LogNormalLevel(context.path, self.levels.mean, self.levels.std),
            generator=context.generator,
            device=context.device,
        )

    @property
    def depends_on_steps(self) -> bool:
        return self.stages > 1

    def definition(self, run: Run) -> int | None:
        starts_noisy = float(run.path.beta(torch.zeros((), dtype=torch.float64))) > 0
        return 2 if starts_noisy else super().definition(run)  # where r = 0 stands for the clean data


METHOD = Objective(
    ect,
    "semigroup",
    ("t", "r"),
    tangent="none",
    formula="‖f(x_t, t, 0) − [f(x_r, r, 0)]‖ / (σ(t) − σ(r)), σ = β/α, x_t and x_r from the same x0, x1; "
    "r = 0: ‖f(x_t, t, 0) − x0‖ / σ(t)",
    sources=("Geng et al. 2025, arXiv:2406.14548, section 3",),
    reduction="norm of the sum over elements; s = 0 in all rows",
    exponent=0.5,
    sampler="consistency",
    summary="Easy consistency tuning: consistency whose second time starts at the data and draws "
    "nearer stage by stage.",
    place=7,
    settings=ECT,
    recipes={
        "ring": {"method": {"stages": 6}},
        "digits": {"method": {"stages": 6, "levels": {"mean": 0.0, "std": 2.0}}},
    },
)
