"""Progressive self-distillation: one jump of the map agrees with two of its own."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastdistill.objectives.checks import check_batch, check_midpoint
from fastdistill.objectives.identities import evaluate, semigroup_target
from fastdistill.objectives.metric import Weighting, squared, weigh
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.rows import Metrics, measure, pick, split_rows, split_terms
from fastdistill.objectives.settings import Context, SelfDistillation
from fastdistill.objectives.velocity import Autoguidance, Guidance, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path
from fastdistill.samplers import Net
from fastdistill.settings import settings


def psd(
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
    midpoint: Tensor | float = 0.5,
    distinct_rows: int | None = None,
) -> tuple[Tensor, Metrics]:
    """Return ||u(x_t, t, t) - w||^2 where s = t, ||u - [a u(x_t, t, m) + (1 - a) u(x_m, m, s)]||^2 elsewhere.

    m = t - a (t - s) and x_m = f(x_t, t, m): the semigroup's residual over t - s. Averaged over elements and rows.

    Args:
        midpoint: a, a number or (B,), in (0, 1): 1/2 is the paper's PSD-M, uniform draws its PSD-U.
        teacher, guidance: what the diagonal learns, which the map then follows; as in `meanflow`.
        target: the network of the brackets, e.g. an EMA; None is `net` itself.
        weighting: a learned log-variance of (t, s), which the paper has.
        distinct_rows: the number of leading rows with s != t; None finds them by value. The paper's share is 25 %.

    Returns:
        The loss and the metrics; there is no tangent.

    Raises:
        ValueError: as `meanflow`, and a midpoint outside (0, 1).

    Equivalent to: shortcut at midpoint 1/2 with delta = (t - s) / 2; SplitMeanFlow.
    Source: Boffi et al. 2025, arXiv:2505.18825, proposition 2.3 (PSD); Guo et al. 2025 (SplitMeanFlow),
        arXiv:2507.16884.
    """
    check_batch(x0, x1, t, s, y)
    check_midpoint(midpoint, len(t))
    x, rows = path.interpolate(x0, x1, t), scale_rows(guidance)
    w = target_velocity(
        net, x, path.velocity(x0, x1, t), t, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance
    )
    far, near = split_rows(t, s, distinct_rows)
    x_far, t_far, s_far, y_far, g_far = pick(far, x, t, s, y, rows)
    x_near, t_near, w_near, y_near, g_near = pick(near, x, t, w, y, rows)
    parts = []
    if len(t_far):
        a = pick(far, midpoint)[0] if isinstance(midpoint, Tensor) and midpoint.ndim else midpoint
        goal = semigroup_target(target or net, x_far, t_far, s_far, a, y=y_far, g=g_far)
        parts.append(evaluate(net, x_far, t_far, s_far, y_far, g_far) - goal)
    if len(t_near):
        parts.append(evaluate(net, x_near, t_near, t_near, y_near, g_near) - w_near)
    residual, t, s = torch.cat(parts), torch.cat((t_far, t_near)), torch.cat((s_far, t_near))
    errors = weigh(squared(residual, "mean"), weighting, t, s)
    loss, terms = errors.mean(), split_terms(errors, len(t_far))
    return loss, measure(loss, residual, t, s, distinct=len(t_far)) | {"terms": terms}


@settings
class PSD(SelfDistillation):
    """Settings of progressive self-distillation's training."""

    meeting: Literal["middle", "uniform"] = "middle"
    """Where the two jumps meet: half-way, or anywhere."""

    def keywords(self, context: Context) -> dict[str, Any]:
        midpoint: float | Tensor = 0.5
        if self.meeting == "uniform":
            drawn = torch.rand(context.rows, generator=context.generator)
            midpoint = drawn.clamp(1e-3, 1 - 1e-3).to(context.device)
        return super().keywords(context) | {"midpoint": midpoint}


METHOD = Objective(
    psd,
    "semigroup",
    ("t", "s"),
    tangent="none",
    formula="s = t: ‖u(x_t, t, t) − w‖²; else ‖u − [a u⁻(x_t, t, m) + (1−a) u⁻(x_m, m, s)]‖², m = t − a (t−s)",
    sources=("Boffi et al. 2025, arXiv:2505.18825, proposition 2.3", "Guo et al. 2025, arXiv:2507.16884"),
    reduction="mean over elements; t != s in 25 % of the rows",
    sampler="average_velocity",
    summary="Progressive self-distillation: a jump must equal two jumps that meet on the way.",
    place=15,
    settings=PSD,
    recipes={
        "ring": {"method": {"distinct": 0.25}},
        "digits": {"method": {"distinct": 0.25}},
    },
)
