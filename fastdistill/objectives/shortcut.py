"""Shortcut models: flow matching, and jumps of 2 delta that agree with two jumps of delta."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from fastdistill.objectives.checks import check_batch, check_halves, check_times
from fastdistill.objectives.identities import evaluate, semigroup_target
from fastdistill.objectives.metric import Weighting, squared, weigh
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.rows import Metrics, measure, pick, split_rows, split_terms
from fastdistill.objectives.settings import Context, Decay, GuidanceSettings, MethodSettings, Run
from fastdistill.objectives.velocity import Autoguidance, Guidance, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path
from fastdistill.samplers import Net
from fastdistill.settings import Bounds, Share, settings
from fastdistill.times import dyadic_times


def shortcut(
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    delta: Tensor,
    *,
    y: Tensor | None = None,
    path: Path = LINEAR,
    teacher: Net | None = None,
    weak_teacher: Net | None = None,
    guidance: Guidance | Autoguidance | None = None,
    target: Net | None = None,
    weighting: Weighting | None = None,
    finest: int | None = 128,
    distinct_rows: int | None = None,
) -> tuple[Tensor, Metrics]:
    """Return the loss of jumps by their halves on rows with delta > 0, and of flow matching on the others.

    The two are ||u(x_t, t, t - 2 delta) - [(u(x_t, t, t - delta) + u(x', t - delta, t - 2 delta)) / 2]||^2 and
    ||u(x_t, t, t) - w||^2, averaged over elements and rows; x' is where the first half ends. The error is one of
    velocities, which is the flow map's over (2 delta)^2. The paper splits off 1/8 of the rows and draws delta from
    powers of two down to 1/128 (`fastdistill.times`), t from multiples.
    Halves of the finest length, delta = 1 / finest, are no target of a longer jump, so that no row would train them:
    they are steps along the velocity, u(x_t, t, t) and u(x', t - delta, t - delta), as in the paper's code.

    Args:
        delta: (B,), half of the jump, 0 <= 2 delta <= t.
        target: the network of the bracket, an EMA in the paper; None is `net` itself.
        finest: the steps of the finest grid, as the times were drawn with. None: every half is asked at its own gap.
        distinct_rows: the number of leading rows with delta > 0; None finds them by value.
        The other arguments are those of `meanflow`; guidance acts on the rows with delta = 0, and the jumps inherit it.

    Returns:
        The loss and the metrics; there is no tangent.

    Raises:
        ValueError: on the CPU, 2 delta outside [0, t] or a delta between 0 and 1 / finest, and as `meanflow`.

    Equivalent to: psd with midpoint = 1/2, unweighted, at finest = None.
    Source: Frans et al. 2025, arXiv:2410.12557, its flow-matching and self-consistency targets.
    """
    check_batch(x0, x1, t, delta, y, end="delta")
    check_times("delta", delta, 0.0, t / 2, "in [0, t/2], half of the jump")
    least = check_halves(delta, finest)
    x, rows, s = path.interpolate(x0, x1, t), scale_rows(guidance), (t - 2 * delta).clamp_min(0)
    far, near = split_rows(t, t - delta, distinct_rows)
    x_far, t_far, s_far, y_far, g_far = pick(far, x, t, s, y, rows)
    parts = []
    if len(t_far):
        goal = semigroup_target(target or net, x_far, t_far, s_far, 0.5, y=y_far, g=g_far, least=least)
        parts.append(evaluate(net, x_far, t_far, s_far, y_far, g_far) - goal)
    w = target_velocity(
        net, x, path.velocity(x0, x1, t), t, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance
    )
    x_near, t_near, w_near, y_near, g_near = pick(near, x, t, w, y, rows)
    if len(t_near):
        parts.append(evaluate(net, x_near, t_near, t_near, y_near, g_near) - w_near)
    residual, t, s = torch.cat(parts), torch.cat((t_far, t_near)), torch.cat((s_far, t_near))
    errors = weigh(squared(residual, "mean"), weighting, t, s)
    loss, terms = errors.mean(), split_terms(errors, len(t_far))
    return loss, measure(loss, residual, t, s, distinct=len(t_far)) | {"terms": terms}


@settings
class Shortcut(MethodSettings):
    """Settings of shortcut models' training."""

    distinct: Share = 0.125
    """Share of the rows with jumps; the others are plain flow matching."""
    finest: Annotated[int, Bounds(ge=2)] = 128
    """Steps of the finest grid, a power of 2. The steps of that grid are made with the velocity."""
    target_ema: Decay | None = 0.999
    """Decay of the averaged network that makes the two jumps; None: the network itself, detached."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the velocity."""

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return dyadic_times(
            context.rows, self.distinct, finest=self.finest, generator=context.generator, device=context.device
        )

    def sampler_for(self, sampler: str, steps: int) -> str:
        # No row trains jumps of the finest length or below: as in training, these are steps along the velocity.
        return "euler" if sampler == "average_velocity" and steps >= self.finest else sampler

    def has_learnt(self, steps: int) -> bool:
        return steps & (steps - 1) == 0 and steps <= self.finest

    def definition(self, run: Run) -> int | None:
        return 2  # the finest halves are made with the velocity


METHOD = Objective(
    shortcut,
    "semigroup",
    ("t", "delta"),
    tangent="none",
    formula="δ = 0: ‖u(x_t, t, t) − w‖²; else ‖u(x_t, t, t−2δ) − [½ (u⁻(x_t, t, t−δ) + u⁻(x′, t−δ, t−2δ))]‖²; "
    "the finest halves by u⁻(x_t, t, t) and u⁻(x′, t−δ, t−δ)",
    sources=("Frans et al. 2025, arXiv:2410.12557",),
    reduction="mean over elements; t != s in 1/8 of the rows",
    sampler="average_velocity",
    summary="Shortcut models: a jump must equal two jumps of half its length; the shortest are flow matching.",
    place=12,
    settings=Shortcut,
    recipes={
        "ring": {"method": {"distinct": 0.25, "target_ema": 0.99}},
        "digits": {"method": {"distinct": 0.5, "finest": 16, "target_ema": None}},
    },
)
