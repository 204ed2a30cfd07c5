"""Train sCM: continuous consistency, with tangent normalisation and warm-up."""

from __future__ import annotations

from torch import Tensor

from fastdistill.jvp import jvp as fused_jvp
from fastdistill.objectives.continuous import ContinuousConsistency, Tangent, regress
from fastdistill.objectives.identities import Jvp
from fastdistill.objectives.metric import Weighting
from fastdistill.objectives.objective import FROM_DATA, Objective, of_normalised
from fastdistill.objectives.rows import Metrics
from fastdistill.objectives.velocity import Autoguidance, Guidance
from fastdistill.paths import LINEAR, Path
from fastdistill.samplers import Net


def scm(
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
    weighting: Weighting | None = None,
    warmup: float = 1.0,
    parameterization: str = "velocity",
    c: float | None = 0.1,
    jvp: Jvp = fused_jvp,
) -> tuple[Tensor, Metrics]:
    """Return the loss ||F - [F + g]||^2, a mean over elements and rows, g being f's normalised rate on the flow.

    With k = beta' / W and W = alpha beta' - beta alpha', F is defined by f = k x - beta F, and
        g = k (k (w / W - F) + warmup (D_w f / W - k (w / W - F))),  then  g / (||g|| + c).
    On the linear path W = k = 1 and F = u. On the trigonometric paths k = cos and this is sCM's
        g = -cos^2 (F - w) - warmup cos sin (x + dF/dt)
    with states in units of sigma_data and times as angles. The network is u on every path: F is made from it inside, so
    that its tangent is the chain rule's; wrap an F-network with `adapters.trigflow`. All rows go to s = 0.

    Args:
        t: (B,) in (0, 1].
        teacher: consistency distillation along its (guided) velocity; None is consistency training, w = v_hat.
        warmup: the share r of the tangent, a number in [0, 1]; the paper raises it from 0 to 1 over 10,000 steps.
        parameterization: "velocity" as above; "average": F = u and k = 1 on every path, the linear path's own form.
        c: the tangent normalisation's constant, in units of F, the norm being summed over a row (the paper's 0.1 is in
            units of sigma_data F); None leaves g as it is.
        weighting: the learned log-variance, called as weighting(t, 0).

    Returns:
        The loss; `raw_error` is the mean square of g at warmup 1 before normalisation, `tangent_norm` that of du/dt.

    Raises:
        ValueError: t = 0, a warmup outside [0, 1], a path that doesn't start at the data for "velocity", and as
            `meanflow`.

    Equivalent to: consistency in the limit r -> t; facm's second term up to weight and clamp; ayf_emd at s = 0.
    Source: Lu and Song 2025, arXiv:2410.11081, equations 6 and 8, algorithm 1.
    """
    return regress(
        warm_up, net, x0, x1, t, y=y, path=path, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance,
        weighting=weighting, warmup=warmup, parameterization=parameterization, c=c, jvp=jvp,
    )  # fmt: skip


def warm_up(tangent: Tangent, warmup: float) -> Tensor:
    """Return g = k (pull + r (turn + carried)): at r = 0 flow matching, at r = 1 the whole derivative.

    Source: Lu and Song 2025, arXiv:2410.11081, algorithm 1.
    """
    return tangent.k * (tangent.pull + warmup * (tangent.turn + tangent.carried))


METHOD = Objective(
    scm,
    "eulerian",
    ("t",),
    tangent="D_w u = jvp(u, (x_t, t, 0), (w, 1, 0)), turned into F's inside; no gradient through it",
    formula="‖F − [F + ĝ]‖², g = k (k (w/W − F) + r (D_w f/W − k (w/W − F))), ĝ = g/(‖g‖+c); linear path: "
    "g = (w − F) − r t D_w F; trigonometric: g = −cos²(F − w) − r cos sin (x + dF/dt)",
    sources=("Lu and Song 2025, arXiv:2410.11081, equations 6 and 8, algorithm 1",),
    reduction="mean over elements, the tangent's norm over their sum; s = 0 in all rows",
    exponent=of_normalised,
    sampler="consistency",
    paths=FROM_DATA,
    anywhere=("parameterization", "average"),
    summary="Continuous consistency: the limit of neighbouring times, by the tangent along the flow; "
    "sCD with a teacher.",
    place=8,
    settings=ContinuousConsistency,
    recipes={
        "ring": {"method": {"tangent_warmup": 500, "times": {"mean": -0.8, "std": 1.6}}, "teacher": "runs/ring-flow"},
        "digits": {
            "method": {"tangent_warmup": 1000, "times": {"mean": -0.8, "std": 1.6}},
            "teacher": "runs/digits-flow",
        },
    },
)
