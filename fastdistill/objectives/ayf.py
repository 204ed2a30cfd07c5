"""Align Your Flow: a teacher's flow map by its Eulerian (EMD) or its Lagrangian (LMD) identity."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from torch import Tensor

from fastdistill.jvp import jvp as fused_jvp
from fastdistill.objectives.checks import check_batch, check_present, check_share
from fastdistill.objectives.identities import Jvp, eulerian, eulerian_residual, lagrangian
from fastdistill.objectives.metric import Weighting, normalise_tangent, squared, weigh
from fastdistill.objectives.objective import ALONG, AT_THE_END, Objective, of_normalised
from fastdistill.objectives.rows import Metrics, measure
from fastdistill.objectives.settings import (
    Context,
    GapTimes,
    GuidanceSettings,
    MethodSettings,
    flat_by_normalisation,
    ramp,
)
from fastdistill.objectives.velocity import Autoguidance, Guidance, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Learnt, Net
from fastdistill.settings import Bounds, Share, settings


def ayf_emd(
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
    weighting: Weighting | None = None,
    warmup: float = 1.0,
    c: float | None = 0.1,
    jvp: Jvp = fused_jvp,
) -> tuple[Tensor, Metrics]:
    """Return the loss ||u - [u - g / (||g|| + c)]||^2, g = (u - w) + warmup (t - s) D_w u, averaged over rows.

    w is the teacher's velocity, guided by `Autoguidance(scale, interval)` with the weak teacher (a (B,) scale, lambda ~
    U[1, 3] in the paper, reaches the network as `g`) or by labels; the tangent runs along it. Errors are summed over
    the elements of a row. All rows may have s != t.

    Args:
        teacher: needed. weak_teacher: for autoguidance.
        warmup: the share of the tangent in [0, 1]; the paper's is min(0.99, step / H).
        c: the tangent normalisation's constant, the norm being summed over a row; None leaves g as it is.
        The other arguments are those of `meanflow`.

    Returns:
        The loss; `raw_error` is the mean square of g at warmup 1.

    Raises:
        ValueError: no teacher, a warmup outside [0, 1], and as `meanflow`.

    Equivalent to: meanflow at p = 0 in its gradient, with warmup = 1 and c = None; flow matching as s -> t; scm
        ("average") at s = 0.
    Source: Sabour et al. 2025, arXiv:2506.14603, theorem 3.2, sections 3.3 and 3.4 and algorithm 1.
    """
    check_batch(x0, x1, t, s, y)
    check_present("teacher", teacher, "ayf_emd", "a network")
    check_share("warmup", warmup)
    x, rows = path.interpolate(x0, x1, t), scale_rows(guidance)
    w = target_velocity(net, x, None, t, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance)
    u, du_dt = eulerian(net, x, t, s, w, y=y, g=rows, jvp=jvp)
    g = eulerian_residual(u, du_dt, w, t, s, warmup).detach()
    loss = _pull(u, g, c, weighting, t, s)
    return loss, measure(loss, eulerian_residual(u, du_dt, w, t, s), t, s, tangent=du_dt)


def ayf_lmd(
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
    weighting: Weighting | None = None,
    warmup: float = 1.0,
    c: float | None = 0.1,
    jvp: Jvp = fused_jvp,
) -> tuple[Tensor, Metrics]:
    """Return the loss ||u - [u - g / (||g|| + c)]||^2, g = u - warmup (t - s) du/ds - w(f, s), averaged over rows.

    At warmup 1, g = d/ds f - w(f, s): the gradient is sign(s - t) w' (df/dtheta)^T g with w' = 1 / (t - s). w is the
    teacher's velocity where the map ends, so it costs an evaluation after the network's, and the tangent is (0, 0, 1).

    Args and Returns: as `ayf_emd`; the tangent is du/ds.

    Raises:
        ValueError: as `ayf_emd`.

    Equivalent to: lsd's off-diagonal term with a teacher for the diagonal, and no gradient through du/ds.
    Source: Sabour et al. 2025, arXiv:2506.14603, its Lagrangian map distillation.
    """
    check_batch(x0, x1, t, s, y)
    check_present("teacher", teacher, "ayf_lmd", "a network")
    check_share("warmup", warmup)
    x, rows = path.interpolate(x0, x1, t), scale_rows(guidance)
    u, du_ds = lagrangian(net, x, t, s, y=y, g=rows, jvp=jvp)
    d, now = expand_time(t - s, x), u.detach()
    f = x - d * now
    w = target_velocity(net, f, None, s, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance)
    loss = _pull(u, now - warmup * d * du_ds - w, c, weighting, t, s)
    return loss, measure(loss, now - d * du_ds - w, t, s, tangent=du_ds)


def _pull(u: Tensor, g: Tensor, c: float | None, weighting: Weighting | None, t: Tensor, s: Tensor) -> Tensor:
    """Return the loss whose gradient by u is twice the normalised g, averaged over rows."""
    g = g if c is None else normalise_tangent(g, c)
    return weigh(squared(u - (u - g).detach()), weighting, t, s).mean()


@settings
class AYF(MethodSettings):
    """Settings that AYF's two forms share."""

    times: GapTimes = GapTimes()
    """The law of both times."""
    tangent_warmup: Annotated[int, Bounds(ge=0)] = 10_000
    """Steps over which the network's own tangent enters, up to 99 % of it."""
    c: Annotated[float | None, Bounds(gt=0)] = 0.1
    """Of the normalisation, g / (|g| + c); None: none."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance of the teacher: autoguidance with a weak teacher, else by labels. AYF draws scales from 1 to 3."""
    sample_gamma: Share = 0.0
    """Of the sampler gamma: how much of the noise is new at each step."""

    learns: ClassVar[tuple[Learnt, ...]] = ("map",)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return self.times.draw(context)

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"warmup": ramp(context, self.tangent_warmup, 0.99)}

    def why_flat(self) -> str | None:
        return flat_by_normalisation(self.c)


EMD = Objective(
    ayf_emd,
    "eulerian",
    ("t", "s"),
    tangent=ALONG + "; w is the teacher's",
    formula="‖u − [u − ĝ]‖², g = (u − w) + r (t−s) D_w u, ĝ = g/(‖g‖+c), w = λ v + (1−λ) v_weak",
    sources=("Sabour et al. 2025, arXiv:2506.14603, theorem 3.2, algorithm 1",),
    reduction="sum over elements; t != s in all rows",
    exponent=of_normalised,
    sampler="gamma",
    needs=frozenset({"teacher"}),
    summary="Align your flow, Eulerian: the flow map from t to s must not change as t moves along the teacher's flow.",
    place=10,
    settings=AYF,
    recipes={
        "ring": {
            "method": {"tangent_warmup": 500, "times": {"mean": -0.8, "std": 1.0}, "c": None, "sample_gamma": 0.0},
            "teacher": "runs/ring-flow",
        },
        "digits": {
            "method": {"tangent_warmup": 1000, "times": {"mean": -0.8, "std": 1.0}, "c": None, "sample_gamma": 0.0},
            "teacher": "runs/digits-flow",
        },
    },
)


LMD = Objective(
    ayf_lmd,
    "lagrangian",
    ("t", "s"),
    tangent=AT_THE_END + "; no gradient through it",
    formula="‖u − [u − ĝ]‖², g = u − r (t−s) du/ds − w(f, s), f = x_t − (t−s) u, ĝ = g/(‖g‖+c)",
    sources=("Sabour et al. 2025, arXiv:2506.14603, AYF-LMD",),
    reduction="sum over elements; t != s in all rows",
    exponent=of_normalised,
    sampler="gamma",
    needs=frozenset({"teacher"}),
    summary="Align your flow, Lagrangian: the end of the flow map must move with the teacher's velocity.",
    place=11,
    settings=AYF,
    recipes={
        "ring": {
            "method": {"tangent_warmup": 500, "times": {"mean": -0.8, "std": 1.0}, "sample_gamma": 0.0},
            "teacher": "runs/ring-flow",
        },
        "digits": {
            "method": {"tangent_warmup": 1000, "times": {"mean": -0.8, "std": 1.0}},
            "teacher": "runs/digits-flow",
        },
    },
)
METHOD = (EMD, LMD)
