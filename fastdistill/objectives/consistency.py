"""Discrete consistency: what two neighbours on a trajectory are mapped to is the same data point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdistill.objectives.checks import check_apart, check_batch, check_deterministic
from fastdistill.objectives.identities import flow_map
from fastdistill.objectives.metric import Weighting, row_distance, weigh
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.rows import Metrics, measure
from fastdistill.objectives.solvers import solver_step
from fastdistill.objectives.velocity import Autoguidance, Guidance, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Net

Solver = Callable[[Tensor, Tensor, Tensor], Tensor]  # solver(x, t, r) -> the state at r


def consistency(
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    r: Tensor,
    *,
    y: Tensor | None = None,
    path: Path = LINEAR,
    teacher: Net | None = None,
    weak_teacher: Net | None = None,
    guidance: Guidance | Autoguidance | None = None,
    target: Net | None = None,
    weighting: Weighting | None = None,
    distance: str = "l2",
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
    c: float = 1e-2,
    weight: Callable[[Tensor, Tensor], Tensor] | None = None,
    solver: str | Solver = "heun",
) -> tuple[Tensor, Metrics]:
    """The loss lambda(t, r) dist(f(x_t, t, 0), [f_target(x_r, r, 0)]), averaged over rows, and its metrics.

    With a teacher (consistency distillation) x_r is one step of its flow from x_t; without (consistency training) it
    shares x0 and x1 with x_t, which is right to first order in t - r. All rows go to s = 0; none is split off.

    Args:
        r: (B,), the next time towards the data, 0 <= r < t.
        target: the network of the bracket, e.g. an EMA; None is `net` itself.
        distance: "l2" (summed over elements), "huber" with `c`, or "lpips": the caller's `perceptual` network.
        weight: lambda(t, r), elementwise; None is 1 (CM). Improved consistency training's is one over the gap of the
            noise levels beta / alpha, 1 / (sigma(t) - sigma(r)), on the path `EDM`; it is 0 where sigma(t) is infinite.
        solver: "heun" (CM's, which on the path "edm" steps in the noise level), "euler", "heun_in_time" or
            "euler_in_time", see `fastdistill.objectives.solvers.solver_step`; or solver(x, t, r) -> x_r. Only with a
            teacher.
        The other arguments are those of `meanflow`; guidance is inside the teacher's velocity.

    Returns:
        The loss; `raw_error` is the mean square of the difference over t - r.

    Raises:
        ValueError: r not below t, lpips without `perceptual`, guidance without a teacher, a path with noise of its own
            without a teacher, an unknown distance or solver, and as `meanflow`.

    Equivalent to: scm in the limit r -> t, whose gradient is that of this one over 2 (t - r) (l2, weight 1).
    Source: Song et al. 2023, arXiv:2303.01469, algorithms 2 and 3; Song and Dhariwal 2024 (iCT), arXiv:2310.14189.
    """
    check_batch(x0, x1, t, r, y, end="r")
    check_apart(t, r)
    if teacher is None:
        check_deterministic(path, "consistency training", "give a teacher")
        if guidance is not None or weak_teacher is not None:
            raise ValueError("guidance: expected a teacher with it, as consistency training follows no velocity")
    x, g, s = path.interpolate(x0, x1, t), scale_rows(guidance), torch.zeros_like(t)
    with torch.no_grad():
        if teacher is None:
            x_r = path.interpolate(x0, x1, r)
        elif isinstance(solver, str):

            def velocity(x: Tensor, t: Tensor) -> Tensor:
                return target_velocity(
                    net, x, None, t, y=y, teacher=teacher, weak_teacher=weak_teacher, guidance=guidance
                )

            x_r = solver_step(solver, velocity, x, t, r, path)
        else:
            x_r = solver(x, t, r)
        goal = flow_map(target or net, x_r, r, s, y, g)
    f = flow_map(net, x, t, s, y, g)
    error = row_distance(f, goal, distance, c, perceptual)
    loss = weigh(error if weight is None else weight(t, r) * error, weighting, t, r).mean()
    return loss, measure(loss, (f - goal) / expand_time(t - r, x), t, s)


METHOD = Objective(
    consistency,
    "semigroup",
    ("t", "r"),
    tangent="none",
    formula="λ(t, r) dist(f(x_t, t, 0), [f⁻(x_r, r, 0)]); x_r by the teacher's flow (CD; Heun, on edm in the noise "
    "level) or from x0, x1 (CT)",
    sources=("Song et al. 2023, arXiv:2303.01469, algorithms 2 and 3", "Song and Dhariwal 2024, arXiv:2310.14189"),
    reduction="l2 and huber sum over elements; s = 0 in all rows",
    sampler="consistency",
)
