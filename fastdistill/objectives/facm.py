"""FACM: continuous consistency, anchored by flow matching on the same rows."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fastdistill.jvp import jvp as fused_jvp
from fastdistill.objectives.checks import check_batch, check_positive
from fastdistill.objectives.identities import Jvp, eulerian, evaluate
from fastdistill.objectives.metric import adaptive, cosine_distance, squared
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.rows import Metrics, measure
from fastdistill.objectives.settings import ArctanTimes, Context, GuidanceSettings, MethodSettings
from fastdistill.objectives.velocity import Autoguidance, Guidance, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Learnt, Net
from fastdistill.settings import Bounds, settings


def facm(
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    *,
    y: Tensor | None = None,
    path: Path = LINEAR,
    teacher: Net | None = None,
    weak_teacher: Net | None = None,
    guidance: Guidance | Autoguidance | None = None,
    p: float = 0.5,
    c: float = 1e-3,
    clamp: float = 1.0,
    jvp: Jvp = fused_jvp,
) -> tuple[Tensor, Metrics]:
    """Return L_FM(F(x_t, t, t), w) + cos(pi (1 - t) / 2) e / [e + c]^(1/2), averaged over rows, and its metrics.

    F is the network: its consistency condition is (t, 0), where it is the average velocity to the data, its
    flow-matching condition (t, t). With (F, DF) at (t, 0), one jvp along (w, 1, 0),
        g = [F - (w - t DF)],  target = [F] - (1 - (1 - t)^p) clamp(g, -1, 1),
        e = ||F - target||^2 (mean over elements),
        L_FM(F, w) = ||F - w||^2 (mean over elements) + 1 - cos(F, w) (over a row; the authors' code: over channels).
    Here t = 0 is the data; the paper's time runs the other way. Every row has both terms.

    Args:
        p: the exponent of the share 1 - (1 - t)^p of the tangent that a target may take.
        c: the offset of the weight of e, whose own exponent is 1/2, in units of the mean.
        clamp: the bound of each element of g, > 0.
        The other arguments are those of `meanflow`; the paper's w is a teacher's with classifier-free guidance.

    Returns:
        The loss; `raw_error` is the mean square of g, `anchor_error` that of F - w at (t, t).

    Raises:
        ValueError: p, c or clamp not > 0, and as `meanflow`.

    Equivalent to: flow_matching plus meanflow at s = 0: f = x - t F, and 0 = D_w f = w - F - t DF says F = u(x, t, 0).
    Source: Peng et al. 2025, arXiv:2507.03738, its training loss, with time reversed.
    """
    check_batch(x0, x1, t, y=y)
    check_positive(p=p, c=c, clamp=clamp)
    x, s, rows = path.interpolate(x0, x1, t), torch.zeros_like(t), scale_rows(guidance)
    w = target_velocity(
        net, x, path.velocity(x0, x1, t), t, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance
    )
    anchor = evaluate(net, x, t, t, y, rows)
    anchor_loss = squared(anchor - w, "mean") + cosine_distance(anchor, w)
    f_net, df_dt = eulerian(net, x, t, s, w, y=y, g=rows, jvp=jvp)
    time = expand_time(t, x)
    g = (f_net - (w - time * df_dt)).detach()
    target = f_net.detach() - (1 - (1 - time) ** p) * g.clamp(-clamp, clamp)
    distilled = adaptive(f_net - target, 0.5, c, "mean")
    terms = {
        "distillation": (torch.cos(0.5 * torch.pi * (1 - t)) * distilled).mean(),
        "anchor": anchor_loss.mean(),
    }
    loss = terms["distillation"] + terms["anchor"]
    metrics = measure(loss, g, t, s, tangent=df_dt)
    return loss, metrics | {"anchor_error": (anchor - w).detach().square().mean(), "terms": terms}


@settings
class FACM(MethodSettings):
    """Settings of FACM's training."""

    times: ArctanTimes = ArctanTimes(mean=-0.8, std=1.6)
    """The law of the training times t."""
    p: Annotated[float, Bounds(gt=0)] = 0.5
    """Exponent of the share 1 - (1 - t)^p of the tangent that a target takes."""
    c: Annotated[float, Bounds(gt=0)] = 1e-3
    """Offset of the distillation term's weight, in units of the error averaged over a row."""
    clamp: Annotated[float, Bounds(gt=0)] = 1.0
    """Bound of each element of the tangent's part."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the velocity."""

    learns: ClassVar[tuple[Learnt, ...]] = ("velocity", "end")

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return (self.times.draw(context),)


METHOD = Objective(
    facm,
    "eulerian",
    ("t",),
    tangent="D_w F = jvp(F, (x_t, t, 0), (w, 1, 0)); no gradient through it",
    formula="‖F(x_t, t, t) − w‖² + 1 − cos(F, w) + cos(π(1−t)/2) e/[e + c]^½, "
    "e = ‖F − ([F] − (1 − (1−t)^p) clamp(g, ±1))‖², g = [F − (w − t D_w F)], F = F(x_t, t, 0)",
    sources=("Peng et al. 2025, arXiv:2507.03738",),
    reduction="mean over elements; both s = t and s = 0 in all rows",
    exponent=0.5,
    sampler="consistency",
    summary="FACM: continuous consistency to s = 0, anchored by flow matching at s = t.",
    place=9,
    settings=FACM,
    recipes={
        "ring": {"method": {"times": {"mean": -0.8, "std": 1.6}}, "teacher": "runs/ring-flow"},
        "digits": {"method": {"times": {"mean": -0.8, "std": 1.6}}, "teacher": "runs/digits-flow"},
    },
)
