"""Train alpha-Flow: from trajectory flow matching (alpha = 1) to MeanFlow (alpha = 0), without a jvp on the way."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from torch import Tensor

from fastdistill.jvp import jvp as fused_jvp
from fastdistill.objectives.checks import check_batch, check_positive, check_share
from fastdistill.objectives.identities import Jvp, evaluate
from fastdistill.objectives.meanflow import meanflow
from fastdistill.objectives.metric import squared
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.rows import Metrics, measure
from fastdistill.objectives.settings import Context, GuidanceSettings, PairedTimes, Run
from fastdistill.objectives.velocity import Autoguidance, Guidance, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Net
from fastdistill.settings import Bounds, Share, settings


def alpha_flow(
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
    alpha: float = 1.0,
    c: float = 1e-3,
    clamp: float | None = None,
    distinct_rows: int | None = None,
    jvp: Jvp = fused_jvp,
) -> tuple[Tensor, Metrics]:
    """Return a e / ([e] + c), e = ||u - [a w + (1 - a) u_target(x - D w, t - D, s)]||^2, a = alpha, D = a (t - s).

    alpha goes from 1, where all (t, s) regress w, to 0, where it is MeanFlow; the paper takes a sigmoid of the step,
    clamped: below 0.005 it is 0. At alpha = 0 the residual is that of its limit, by one jvp along (w, 1, 0), and the
    weight 1 / ([e] + c). Rows with s = t are flow matching at any alpha: e = ||u - w||^2 with that same weight. Errors
    are summed over the elements of a row and averaged over rows.

    Args:
        alpha: a number in [0, 1], computed from the step by the caller.
        target: the network of the bracket, e.g. an EMA; None is `net` itself. Unused at alpha = 0.
        c: the offset of the weight, in units of the summed error; the code's 1e-3 is in units of the mean.
        clamp: the largest absolute value of an element of the bracket, on rows with s < t and at alpha > 0. The code
            has 4, for data of unit variance; where velocities are larger it moves their mean. None: no bound.
        The other arguments are those of `meanflow`.

    Returns:
        The loss and metrics; `raw_error` is the mean square of the residual, over alpha where s < t, so that it is
        comparable at all alpha; `tangent_norm` is there at alpha = 0 only.

    Raises:
        ValueError: alpha outside [0, 1], and as `meanflow`. TypeError: an alpha that is no plain number.

    Equivalent to: meanflow(p=1, c=c) at alpha = 0; alpha = 1/2 is Shortcut's midpoint with w for its first half.
    Source: Zhang et al. 2025, arXiv:2510.20771, definition 1, algorithms 1 and 2 and section 4.
    """
    check_batch(x0, x1, t, s, y)
    check_share("alpha", alpha)
    check_positive(c=c, **({} if clamp is None else {"clamp": clamp}))
    if alpha == 0:
        return meanflow(
            net, x0, x1, t, s, y=y, path=path, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance, c=c,
            distinct_rows=distinct_rows, jvp=jvp,
        )  # fmt: skip
    x, g = path.interpolate(x0, x1, t), scale_rows(guidance)
    w = target_velocity(
        net, x, path.velocity(x0, x1, t), t, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance
    )
    # Rows are told apart by masks, which wait for no queue as indices do.
    step, apart = alpha * (t - s), t != s
    share = torch.ones_like(t).masked_fill(apart, alpha)  # how much of the bracket is w, and the weight
    with torch.no_grad():
        after = evaluate(target or net, x - expand_time(step, x) * w, t - step, s, y, g)
        goal = alpha * w + (1 - alpha) * after
        goal = torch.where(expand_time(apart, x), goal if clamp is None else goal.clamp(-clamp, clamp), w)
    residual = evaluate(net, x, t, s, y, g) - goal
    error = squared(residual)
    weighted = share.to(error) * error / (error.detach() + c)
    loss = weighted.mean()
    terms = {
        "distillation": torch.where(apart, weighted, 0.0).mean(),
        "anchor": torch.where(apart, 0.0, weighted).mean(),
    }
    return loss, measure(loss, residual / expand_time(share, residual), t, s) | {"terms": terms}


@settings
class AlphaFlow(PairedTimes):
    """Settings of alpha-Flow's training."""

    distinct: Share = 0.5
    """Share of the rows with s != t; the others are plain flow matching."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the target."""
    gain: Annotated[float, Bounds(gt=0)] = 25.0
    """Steepness of the curriculum: alpha falls from 1 to 0 as a sigmoid of the share of the steps that are done."""
    snap: Annotated[float, Bounds(ge=0, lt=0.5)] = 0.005
    """An alpha so near to 1 or 0 is taken for it."""
    c: Annotated[float, Bounds(gt=0)] = 1e-3
    """Offset of the adaptive weight, in units of the error summed over a row."""
    clamp: Annotated[float | None, Bounds(gt=0)] = 4.0
    """Largest absolute value in the target of rows with s != t, while alpha > 0; None: no bound. For data of unit
    variance: where velocities are larger it draws their mean to 0."""

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"alpha": self.alpha(context)}

    def definition(self, run: Run) -> int | None:
        return 2  # rows with s = t are flow matching of weight 1

    @property
    def depends_on_steps(self) -> bool:
        return True

    def why_flat(self) -> str | None:
        return (
            "the loss follows its curriculum: each row's error e counts as a e / (e + c), which is near a whatever e "
            "is, and a falls from 1 to 0 before it ends as MeanFlow's, near 1. Watch raw_error and the samples."
        )

    def alpha(self, context: Context) -> float:
        """Return alpha: 1 is flow matching to every s, 0 is MeanFlow."""
        value = 1 / (1 + math.exp(self.gain * (context.step / context.steps - 0.5)))
        return 1.0 if value > 1 - self.snap else 0.0 if value < self.snap else value


METHOD = Objective(
    alpha_flow,
    "semigroup",
    ("t", "s"),
    tangent="none for alpha > 0; at alpha = 0 MeanFlow's, along (w, 1, 0)",
    formula="s = t: e / ([e] + c), e = ‖u − w‖²; else a e / ([e] + c), "
    "e = ‖u − [a w + (1−a) u⁻(x_t − Δ w, t − Δ, s)]‖², Δ = a (t−s), a: 1 → 0",
    sources=("Zhang et al. 2025, arXiv:2510.20771, definition 1",),
    reduction="sum over elements; t != s in 50 % of the rows (its code also has 75 %)",
    exponent=1.0,
    sampler="average_velocity",
    summary="Alpha-Flow: from flow matching to MeanFlow by a curriculum, through jumps of ever shorter first parts.",
    place=5,
    settings=AlphaFlow,
    recipes={
        "ring": {"method": {"times": {"law": "logit_normal", "mean": -0.4, "std": 1.0}, "distinct": 0.75}},
        "digits": {"method": {"distinct": 0.75}},
    },
)
