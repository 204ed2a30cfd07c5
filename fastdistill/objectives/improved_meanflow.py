"""Improved MeanFlow: the average velocity turned into an instantaneous one, and regressed on the data's."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from fastdistill.jvp import jvp as fused_jvp
from fastdistill.objectives.checks import check_batch, check_labels
from fastdistill.objectives.identities import Jvp, eulerian, eulerian_residual, evaluate
from fastdistill.objectives.metric import adaptive
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.rows import Metrics, measure, pick, split_rows, split_terms
from fastdistill.objectives.settings import Context, GuidanceSettings, PairedTimes, Run, flat_by_weight
from fastdistill.objectives.velocity import Autoguidance, Guidance, own_velocity, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path
from fastdistill.samplers import Net
from fastdistill.settings import Bounds, ConfigError, Share, settings


def improved_meanflow(
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    s: Tensor,
    *,
    y: Tensor | None = None,
    undropped: Tensor | None = None,
    path: Path = LINEAR,
    teacher: Net | None = None,
    weak_teacher: Net | None = None,
    guidance: Guidance | Autoguidance | None = None,
    velocity_head: Net | None = None,
    p: float = 1.0,
    c: float = 1e-2,
    distinct_rows: int | None = None,
    jvp: Jvp = fused_jvp,
) -> tuple[Tensor, Metrics]:
    """Return the loss A(p, c) of V - w with V = u + (t - s) [du/dt], plus the velocity head's, averaged over rows.

    The tangent runs along the *predicted* velocity, so that V is a function of x_t alone and its regression is a true
    one: the noise of v_hat is in the target only. Their mean is one velocity, which the network meets at its solution;
    that is why this method may use two. Gradients flow through u and not through du/dt. Errors are summed over the
    elements of a row. The paper's share of rows with s = t is 50 %.

    Args:
        undropped: (B,), the labels as they were before some became "no label" in y. The tangent of such a row runs
            along the velocity of the label it had, as in the paper's code, which is right on average as v_hat is: the
            tangent is linear in its direction. None: y.
        velocity_head: velocity_head(x, t=t, s=t, y=y) predicts w, gives the tangent's direction and the two estimates
            of guidance from data; it is trained with the same metric. The paper's shares the network's first blocks.
            None: all of that is the network's own u(x, t, t).
        guidance: `Guidance.improved(scale, null)` is the paper's; a (B,) scale reaches the network as `g`, and thus the
            tangent. The paper draws an interval a row and embeds its ends, too; here one interval holds for all.
        The other arguments, and the metrics, are those of `meanflow`.

    Returns:
        The loss and the metrics of `meanflow`; with a head also `head_error`, its mean square.

    Raises:
        ValueError: as `meanflow`.

    Equivalent to: meanflow whose tangent runs along u(x, t, t), up to the order of the terms of its residual.
    Source: Geng et al. 2025, arXiv:2512.02012, algorithm 1 and equation 12.
    """
    check_batch(x0, x1, t, s, y)
    check_labels("undropped", undropped, y)
    x, g = path.interpolate(x0, x1, t), scale_rows(guidance)
    direction = net if velocity_head is None else velocity_head
    w = target_velocity(
        direction, x, path.velocity(x0, x1, t), t, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance
    )
    far, near = split_rows(t, s, distinct_rows)
    x_far, t_far, s_far, w_far, y_far, g_far = pick(far, x, t, s, w, y, g)
    (labels,) = pick(far, y if undropped is None else undropped)
    x_near, t_near, w_near, y_near, g_near = pick(near, x, t, w, y, g)
    parts, du_dt = [], x[:0]
    if len(t_far):
        v = own_velocity(direction, x_far, t_far, y=labels, g=g_far)
        u, du_dt = eulerian(net, x_far, t_far, s_far, v, y=y_far, g=g_far, jvp=jvp)
        parts.append(eulerian_residual(u, du_dt, w_far, t_far, s_far))
    if len(t_near):
        parts.append(evaluate(net, x_near, t_near, t_near, y_near, g_near) - w_near)
    residual, times = torch.cat(parts), (torch.cat((t_far, t_near)), torch.cat((s_far, t_near)))
    errors, extra = adaptive(residual, p, c), {}
    loss, terms = errors.mean(), split_terms(errors, len(t_far))
    if velocity_head is not None:
        of_head = evaluate(velocity_head, x, t, t, y, g) - w
        terms["head"] = adaptive(of_head, p, c).mean()
        loss, extra = loss + terms["head"], {"head_error": of_head.detach().square().mean()}
    return loss, measure(loss, residual, *times, tangent=du_dt, distinct=len(t_far)) | extra | {"terms": terms}


@settings
class ImprovedGuidance(GuidanceSettings):
    """Guidance as improved MeanFlow writes it: the scale alone decides how much of the estimate is the student's."""

    scale_to: Annotated[float | None, Bounds(gt=0)] = None
    """Each row gets a scale of its own, log-uniform from `scale` to this, and the network is told: needs
    model.guidance. The paper's are 1 and 8."""

    def draw_scale(self, context: Context) -> float | Tensor:
        if self.scale_to is None:
            return self.scale
        share = torch.rand(context.rows, generator=context.generator).to(context.device)
        return self.scale * (self.scale_to / self.scale) ** share

    def build(self, context: Context) -> Guidance | Autoguidance | None:
        if context.teacher is not None or not self.active:
            return super().build(context)
        return Guidance.improved(self.draw_scale(context), context.batch.null, self.interval)


@settings
class ImprovedMeanFlow(PairedTimes):
    """Settings of improved MeanFlow's training."""

    distinct: Share = 0.5
    """Share of the rows with s != t, which pay for a tangent; the others are plain flow matching."""
    p: Annotated[float, Bounds(ge=0)] = 1.0
    """Exponent of the adaptive weight; 0 is the plain square."""
    c: Annotated[float, Bounds(gt=0)] = 1e-2
    """Offset of the adaptive weight, in units of the error summed over a row."""
    guidance: ImprovedGuidance = ImprovedGuidance()
    """Guidance inside the target; with `scale_to` the network learns all scales between at once."""

    def check(self, run: Run) -> None:
        if self.guidance.kappa:
            raise ConfigError(
                f"method.guidance.kappa: improved_meanflow takes 1 - 1 / scale for it; expected 0 and a scale, got "
                f"{self.guidance.kappa}"
            )

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"undropped": context.batch.undropped}

    def why_flat(self) -> str | None:
        return flat_by_weight(self.p)

    def definition(self, run: Run) -> int | None:
        # Log-uniform scales, no label at the scale 1; the tangent of a dropped row runs along its label's velocity.
        return 2 if run.label_dropout or self.guidance.active else None


METHOD = Objective(
    improved_meanflow,
    "eulerian",
    ("t", "s"),
    tangent="D_v u = jvp(u, (x_t, t, s), (v, 1, 0)) along the predicted v; no gradient through it",
    formula="A(p, c) of V − w, V = u + (t−s) [D_v u], v = [u(x_t, t, t)] or a velocity head trained alongside",
    sources=("Geng et al. 2025, arXiv:2512.02012, algorithm 1, equation 12",),
    reduction="sum over elements; t != s in 50 % of the rows",
    exponent=lambda settings: settings["p"],
    sampler="average_velocity",
    summary="Improved MeanFlow: the tangent follows the network's own velocity, so that the residual "
    "regresses a velocity.",
    place=4,
    settings=ImprovedMeanFlow,
    recipes={
        "ring": {"method": {"times": {"law": "logit_normal", "mean": -0.4, "std": 1.0}, "distinct": 0.25, "p": 0.0}},
        "digits": {"method": {"distinct": 0.75, "p": 0.75}},
    },
)
