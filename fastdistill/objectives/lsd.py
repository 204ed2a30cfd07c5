"""Lagrangian self-distillation: the end of the map moves with the velocity that its own diagonal has learnt."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.jvp import jvp as fused_jvp
from fastdistill.objectives.checks import check_batch
from fastdistill.objectives.identities import Jvp, evaluate, lagrangian
from fastdistill.objectives.metric import Weighting, squared, weigh
from fastdistill.objectives.objective import AT_THE_END, Objective
from fastdistill.objectives.rows import Metrics, measure, pick, split_rows, split_terms
from fastdistill.objectives.settings import SelfDistillation
from fastdistill.objectives.velocity import Autoguidance, Guidance, own_velocity, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Net


def lsd(
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
    distinct_rows: int | None = None,
    jvp: Jvp = fused_jvp,
) -> tuple[Tensor, Metrics]:
    """Return ||u(x_t, t, t) - w||^2 on rows with s = t, ||d/ds f(x_t, t, s) - [u(f, s, s)]||^2 on the others.

    d/ds f = u - (t - s) du/ds by one jvp along (0, 0, 1), and gradients flow through that derivative: `jvp` is called
    with tangent_grad=True. Averaged over elements and rows.

    Args:
        teacher, guidance: what the diagonal learns, which the map then follows; as in `meanflow`.
        target: the network of the brackets, e.g. an EMA; None is `net` itself.
        weighting: a learned log-variance of (t, s), which the paper has.
        distinct_rows: the number of leading rows with s != t; None finds them by value. The paper's share is 25 %.

    Returns:
        The loss and the metrics; the tangent is du/ds.

    Raises:
        ValueError: as `meanflow`.

    Equivalent to: tvm with flow matching on rows of its own; ayf_lmd with the own diagonal as teacher, and the whole
        gradient.
    Source: Boffi et al. 2025, arXiv:2505.18825, proposition 2.3 (LSD).
    """
    check_batch(x0, x1, t, s, y)
    x, rows = path.interpolate(x0, x1, t), scale_rows(guidance)
    w = target_velocity(
        net, x, path.velocity(x0, x1, t), t, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance
    )
    far, near = split_rows(t, s, distinct_rows)
    x_far, t_far, s_far, y_far, g_far = pick(far, x, t, s, y, rows)
    x_near, t_near, w_near, y_near, g_near = pick(near, x, t, w, y, rows)
    parts, du_ds = [], x[:0]
    if len(t_far):
        u, du_ds = lagrangian(net, x_far, t_far, s_far, y=y_far, g=g_far, jvp=jvp, tangent_grad=True)
        d = expand_time(t_far - s_far, x)
        v = own_velocity(target or net, (x_far - d * u).detach(), s_far, y=y_far, g=g_far)
        parts.append(u - d * du_ds - v)
    if len(t_near):
        parts.append(evaluate(net, x_near, t_near, t_near, y_near, g_near) - w_near)
    residual, t, s = torch.cat(parts), torch.cat((t_far, t_near)), torch.cat((s_far, t_near))
    errors = weigh(squared(residual, "mean"), weighting, t, s)
    loss, terms = errors.mean(), split_terms(errors, len(t_far))
    return loss, measure(loss, residual, t, s, tangent=du_ds, distinct=len(t_far)) | {"terms": terms}


METHOD = Objective(
    lsd,
    "lagrangian",
    ("t", "s"),
    tangent=AT_THE_END + ", with gradient through it",
    formula="s = t: ‖u(x_t, t, t) − w‖²; else ‖∂_s f − [u(f, s, s)]‖², ∂_s f = u − (t−s) du/ds",
    sources=("Boffi et al. 2025, arXiv:2505.18825, proposition 2.3",),
    reduction="mean over elements; t != s in 25 % of the rows",
    sampler="average_velocity",
    summary="Lagrangian self-distillation: the map's end must move with the network's own velocity.",
    place=14,
    settings=SelfDistillation,
    recipes={
        "ring": {"method": {"distinct": 0.25}},
        "digits": {"method": {"distinct": 0.25}},
    },
)
