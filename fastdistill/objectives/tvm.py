"""Terminal velocity matching: the velocity at which a jump ends is the flow's own there."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdistill.jvp import jvp as fused_jvp
from fastdistill.objectives.checks import check_batch
from fastdistill.objectives.identities import Jvp, evaluate, lagrangian
from fastdistill.objectives.metric import Weighting, squared, weigh
from fastdistill.objectives.objective import AT_THE_END, Objective
from fastdistill.objectives.rows import Metrics, measure
from fastdistill.objectives.settings import Context, Decay, GapTimes, GuidanceSettings, MethodSettings, Run
from fastdistill.objectives.velocity import Autoguidance, Guidance, Number, own_velocity, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Net
from fastdistill.settings import settings


def tvm(
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
    factor: Number = 1.0,
    jvp: Jvp = fused_jvp,
) -> tuple[Tensor, Metrics]:
    """Return ||d/ds f(x_t, t, s) - [u_target(f, s, s)]||^2 + ||u(x_s, s, s) - w||^2, a mean over elements and rows.

    d/ds f = u - (t - s) du/ds by one jvp along (0, 0, 1), and gradients flow through that derivative: `jvp` is called
    with tangent_grad=True. x_s is on the path at s with the same x0 and x1, and w is the velocity there. Every row has
    both terms; s = t is allowed and rare. In the paper the target is an EMA of rate 0.99, the second term has times s
    of its own in the best runs, and the network's normalisation layers are RMSNorm throughout, to bound its slope.

    Args:
        target: the network of the bracket, and of the estimates of guidance from data; None is `net` itself.
        weighting: a learned log-variance of (t, s) on the first term.
        factor: what both residuals are multiplied by, a number or (B,). The paper's code has 1 / scale with guidance,
            since w grows with the scale: so rows of every scale count alike.
        The other arguments are those of `meanflow`.

    Returns:
        The loss; `raw_error` is the mean square of the first residual, `anchor_error` that of the second, before
        any factor.

    Raises:
        ValueError: as `meanflow`.

    Equivalent to: lsd with both terms on every row, its diagonal learnt at s.
    Source: Zhou et al. 2025 (TVM), arXiv:2511.19797, equations 9, 11 and 12.
    """
    check_batch(x0, x1, t, s, y)
    x, rows = path.interpolate(x0, x1, t), scale_rows(guidance)
    u, du_ds = lagrangian(net, x, t, s, y=y, g=rows, jvp=jvp, tangent_grad=True)
    d = expand_time(t - s, x)
    terminal = u - d * du_ds - own_velocity(target or net, (x - d * u).detach(), s, y=y, g=rows)
    x_s = path.interpolate(x0, x1, s)
    w = target_velocity(
        target or net, x_s, path.velocity(x0, x1, s), s, y=y, teacher=teacher, weak_teacher=weak_teacher,
        guidance=guidance,
    )  # fmt: skip
    anchor = evaluate(net, x_s, s, s, y, rows) - w
    terms = {
        "distillation": weigh(factor**2 * squared(terminal, "mean"), weighting, t, s).mean(),
        "anchor": (factor**2 * squared(anchor, "mean")).mean(),
    }
    loss = terms["distillation"] + terms["anchor"]
    metrics = measure(loss, terminal, t, s, tangent=du_ds)
    return loss, metrics | {"anchor_error": anchor.detach().square().mean(), "terms": terms}


@settings
class TVM(MethodSettings):
    """Settings of terminal velocity matching's training."""

    times: GapTimes = GapTimes()
    """The law of both times."""
    target_ema: Decay | None = 0.99
    """Decay of the averaged network that gives the velocity at the end; None: the network itself, detached."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the velocity. Both residuals are then divided by its scale."""

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return self.times.draw(context)

    def keywords(self, context: Context) -> dict[str, Any]:
        given = super().keywords(context)
        return given if given["guidance"] is None else given | {"factor": 1 / given["guidance"].scale}

    def definition(self, run: Run) -> int | None:
        return 2 if self.guidance.active else None  # by the average network without a label, over the scale


METHOD = Objective(
    tvm,
    "lagrangian",
    ("t", "s"),
    tangent=AT_THE_END + ", with gradient through it",
    formula="‖∂_s f − [u⁻(f, s, s)]‖² + ‖u(x_s, s, s) − w‖², ∂_s f = u − (t−s) du/ds",
    sources=("Zhou et al. 2025, arXiv:2511.19797, equations 9, 11 and 12",),
    reduction="mean over elements; t != s in all rows",
    sampler="average_velocity",
    summary="Terminal velocity matching: the velocity with which the map's end moves must be the network's own there.",
    place=16,
    settings=TVM,
    recipes={
        "ring": {"method": {"times": {"mean": 0.5, "std": 1.5}}},
        "digits": {"method": {"times": {"mean": -0.8, "std": 1.0}}},
    },
)
