"""Eulerian self-distillation: the map follows the velocity that its own diagonal has learnt."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastdistill.jvp import jvp as fused_jvp
from fastdistill.objectives.checks import check_batch, check_choice
from fastdistill.objectives.identities import Jvp, eulerian, eulerian_residual, evaluate
from fastdistill.objectives.metric import Weighting, squared, weigh
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.rows import Metrics, measure, pick, split_rows, split_terms
from fastdistill.objectives.settings import Run, SelfDistillation
from fastdistill.objectives.velocity import Autoguidance, Guidance, own_velocity, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Net
from fastdistill.settings import settings

Through = Literal["time", "tangent", "nothing"]  # what the gradient of ESD's residual flows through beside u


def esd(
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    y: Tensor | None = None,
    path: Path = LINEAR,
    teacher: Net | None = None,
    weak_teacher: Net | None = None,
    guidance: Guidance | Autoguidance | None = None,
    target: Net | None = None,
    weighting: Weighting | None = None,
    through: Through = "time",
    distinct_rows: int | None = None,
    jvp: Jvp = fused_jvp,
) -> tuple[Tensor, Metrics]:
    """Return ||u(x_t, t, t) - w||^2 on rows with s = t, ||u - [v - (t - s) D_v u]||^2 on the others.

    v = u(x_t, t, t) is the own diagonal, without the data's noise that MeanFlow's w has, and never with a gradient.
    D_v u = du/dt + (du/dx) v has one in part, by `through`. Averaged over elements and rows.

    Args:
        teacher, guidance: what the diagonal learns, which the map then follows; as in `meanflow`.
        target: the network of v, and of (du/dx) v where that has no gradient, e.g. an EMA; None is `net` itself.
        weighting: a learned log-variance of (t, s), which the paper has.
        through: what the gradient flows through beside u. "time": du/dt, which the authors' code calls full and takes
            for its experiments with ESD, since it needs no gradient of du/dx. "tangent": all of D_v u, called convex
            there. "nothing": u alone, by one jvp without a gradient, as MeanFlow has it. Without a target the residual
            is the same in all three.
        distinct_rows: the number of leading rows with s != t; None finds them by value. The paper's share is 25 %.

    Returns:
        The loss and the metrics; the tangent is du/dt.

    Raises:
        ValueError: as `meanflow`, and an unknown `through`.

    Equivalent to: with through="nothing", meanflow at p = 0 with the target's own diagonal as teacher where s != t.
    Source: Boffi et al. 2025, arXiv:2505.18825, proposition 2.3 (ESD), with stopped gradients as in its code.
    """
    check_batch(x0, x1, t, s, y)
    check_choice("through", through, get_args(Through))
    x, rows = path.interpolate(x0, x1, t), scale_rows(guidance)
    w = target_velocity(
        net, x, path.velocity(x0, x1, t), t, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance
    )
    far, near = split_rows(t, s, distinct_rows)
    x_far, t_far, s_far, y_far, g_far = pick(far, x, t, s, y, rows)
    x_near, t_near, w_near, y_near, g_near = pick(near, x, t, w, y, rows)
    parts, du_dt = [], x[:0]
    if len(t_far):
        v = own_velocity(target or net, x_far, t_far, y=y_far, g=g_far)
        far_rows: dict[str, Any] = {"y": y_far, "g": g_far, "jvp": jvp}
        if through == "nothing":
            u, du_dt = eulerian(net, x_far, t_far, s_far, v, **far_rows)
            parts.append(eulerian_residual(u, du_dt, v, t_far, s_far))
        else:
            moving = v if through == "tangent" else None
            u, du_dt = eulerian(net, x_far, t_far, s_far, moving, **far_rows, tangent_grad=True)
            if through == "time":
                with torch.no_grad():
                    _, carried = eulerian(target or net, x_far, t_far, s_far, v, **far_rows, time=None)
                du_dt = du_dt + carried.to(du_dt.dtype)
            parts.append(u - v + expand_time(t_far - s_far, u) * du_dt)
    if len(t_near):
        parts.append(evaluate(net, x_near, t_near, t_near, y_near, g_near) - w_near)
    residual, t, s = torch.cat(parts), torch.cat((t_far, t_near)), torch.cat((s_far, t_near))
    errors = weigh(squared(residual, "mean"), weighting, t, s)
    loss, terms = errors.mean(), split_terms(errors, len(t_far))
    return loss, measure(loss, residual, t, s, tangent=du_dt, distinct=len(t_far)) | {"terms": terms}


@settings
class ESD(SelfDistillation):
    """Settings of Eulerian self-distillation's training."""

    through: Through = "time"
    """What the gradient flows through beside u: du/dt alone, the whole tangent, or nothing. The first is the authors'
    choice; the others need less time a step, and the last one less memory too."""

    def definition(self, run: Run) -> int | None:
        return super().definition(run) if self.through == "nothing" else 2


METHOD = Objective(
    esd,
    "eulerian",
    ("t", "s"),
    tangent="D_v u = jvp(u, (x_t, t, s), (v, 1, 0)) along the own diagonal v, with gradient through du/dt alone; "
    "by option through all of it, or none",
    formula="s = t: ‖u(x_t, t, t) − w‖²; else ‖u − v + (t−s) (du/dt + [(du/dx) v])‖², v = [u(x_t, t, t)]",
    sources=("Boffi et al. 2025, arXiv:2505.18825, proposition 2.3",),
    reduction="mean over elements; t != s in 25 % of the rows",
    sampler="average_velocity",
    summary="Eulerian self-distillation: the map must not change as its start moves along the network's own flow.",
    place=13,
    settings=ESD,
    recipes={
        "ring": {"method": {"distinct": 0.25}},
        "digits": {"method": {"distinct": 0.25}},
    },
)
