"""MeanFlow: regress the average velocity u(x_t, t, s), from data or from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from fastdistill.jvp import jvp as fused_jvp
from fastdistill.objectives.checks import check_batch
from fastdistill.objectives.identities import Jvp, eulerian, eulerian_residual, evaluate
from fastdistill.objectives.metric import adaptive
from fastdistill.objectives.objective import ALONG, Objective
from fastdistill.objectives.rows import Metrics, measure, pick, split_rows, split_terms
from fastdistill.objectives.settings import GuidanceSettings, PairedTimes, flat_by_weight
from fastdistill.objectives.velocity import Autoguidance, Guidance, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path
from fastdistill.samplers import Net
from fastdistill.settings import Bounds, settings


def meanflow(
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
    p: float = 1.0,
    c: float = 1e-2,
    distinct_rows: int | None = None,
    jvp: Jvp = fused_jvp,
) -> tuple[Tensor, Metrics]:
    """Return the loss A(p, c) of u - [w - (t - s) du/dt], averaged over rows, and its metrics.

    du/dt is the derivative along the flow, one jvp of u at (x_t, t, s) along (w, 1, 0); the bracket has no gradient.
    Only rows with s != t go through the jvp: elsewhere the residual is u - w, one plain forward.

    Args:
        net: called as net(x, t=t, s=s, y=y), with g=g for guidance whose scale differs by row.
        x0, x1: data and noise, (B, ...), alike in shape.
        t, s: (B,) with 0 <= s <= t <= 1; y: (B,) int64 labels, or None.
        teacher: a network whose instantaneous velocity u(x, t, t) gives w; None: w is the conditional velocity.
        guidance, weak_teacher: guidance inside w; see `Guidance` for both forms and `Autoguidance`.
        p, c: the adaptive weight of `adaptive`, on errors summed over the elements of a row.
        distinct_rows: the number of leading rows with s != t, as `fastdistill.times.pair_times` arranges them; the
            others have s = t. None finds them by value, which on a GPU waits for the queue.
        jvp: jvp(fn, primals, tangents) -> (u, du_dt), with None for a zero tangent.

    Returns:
        The scalar loss, and detached: `loss`, `raw_error` (mean square residual; at p = 1 the loss itself stays near 1
        by design), `tangent_norm` (root mean square of du/dt on distinct rows), `distinct_share`, "rows"; and
            with their graph "terms", the parts of the loss.

    Raises:
        ValueError: an argument whose shape doesn't fit, guidance without labels, or, on the CPU, times out of order.

    Equivalent to: ayf_emd with warmup = 1 and c = None, its gradient weighted by [e + c]^-p; at s = 0 facm's second
        term, up to weight and clamp.
    Source: Geng et al. 2025, arXiv:2505.13447, algorithm 1 and section 4.
    """
    check_batch(x0, x1, t, s, y)
    x, g = path.interpolate(x0, x1, t), scale_rows(guidance)
    w = target_velocity(
        net, x, path.velocity(x0, x1, t), t, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance
    )
    far, near = split_rows(t, s, distinct_rows)
    parts, du_dt = [], x[:0]
    x_far, t_far, s_far, w_far, y_far, g_far = pick(far, x, t, s, w, y, g)
    if len(t_far):
        u, du_dt = eulerian(net, x_far, t_far, s_far, w_far, y=y_far, g=g_far, jvp=jvp)
        parts.append(eulerian_residual(u, du_dt, w_far, t_far, s_far))
    x_near, t_near, w_near, y_near, g_near = pick(near, x, t, w, y, g)
    if len(t_near):
        parts.append(evaluate(net, x_near, t_near, t_near, y_near, g_near) - w_near)
    residual, times = torch.cat(parts), (torch.cat((t_far, t_near)), torch.cat((s_far, t_near)))
    errors = adaptive(residual, p, c)
    loss, terms = errors.mean(), split_terms(errors, len(t_far))
    return loss, measure(loss, residual, *times, tangent=du_dt, distinct=len(t_far)) | {"terms": terms}


# Of the paper's text, and of the authors' code in PyTorch.
PRESETS: dict[str, dict[str, Any]] = {
    "cifar10_paper": {"times": {"law": "logit_normal", "mean": -2.0, "std": 2.0}, "distinct": 0.75, "p": 0.75},
    "cifar10_code": {
        "times": {"law": "logit_normal", "mean": -0.6, "std": 1.6},
        "end_times": {"law": "logit_normal", "mean": -4.0, "std": 1.6},
        "distinct": 0.75,
        "p": 0.75,
    },
}


@settings
class MeanFlow(PairedTimes):
    """Settings of MeanFlow's training."""

    recipe: Literal["cifar10_paper", "cifar10_code"] | None = None
    """Fill times, end_times, distinct and p as the paper has them for CIFAR-10, both times LN(-2, 2), or as the
    authors' code has them, LN(-0.6, 1.6) and LN(-4, 1.6); 75 % of the rows have s != t and p is 0.75 in both. Any of
    these that a file gives beside it holds; on the command line a recipe replaces the file's."""
    p: Annotated[float, Bounds(ge=0)] = 1.0
    """Exponent of the adaptive weight; 0 is the plain square."""
    c: Annotated[float, Bounds(gt=0)] = 1e-2
    """Offset of the adaptive weight, in units of the error summed over a row."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the target, so that sampling needs none."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    def why_flat(self) -> str | None:
        return flat_by_weight(self.p)


METHOD = Objective(
    meanflow,
    "eulerian",
    ("t", "s"),
    tangent=ALONG,
    formula="A(p, c) of Δ = u − [w − (t−s) D_w u];  A(p, c) = e / [e + c]^p, e = ‖Δ‖²",
    sources=("Geng et al. 2025, arXiv:2505.13447, algorithm 1, section 4",),
    reduction="sum over elements; t != s in 25 % of the rows (on CIFAR-10: 75 %)",
    exponent=lambda settings: settings["p"],
    sampler="average_velocity",
    summary="MeanFlow: the network learns the average velocity, and sampling jumps along it, in one step if wished.",
    place=3,
    settings=MeanFlow,
)
