"""Discrete consistency: what two neighbours on a trajectory are mapped to is the same data point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from fastdistill.objectives.checks import check_apart, check_batch, check_deterministic
from fastdistill.objectives.identities import flow_map
from fastdistill.objectives.metric import Weighting, row_distance, weigh
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.rows import Metrics, measure
from fastdistill.objectives.settings import Context, GuidanceSettings, LevelSettings, MethodSettings, Run
from fastdistill.objectives.solvers import has_finite_level, solver_step
from fastdistill.objectives.velocity import Autoguidance, Guidance, scale_rows, target_velocity
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Learnt, Net
from fastdistill.settings import Bounds, ConfigError, settings
from fastdistill.times import ct_points, ict_points, level_of_time
from fastdistill.times import neighbour_times as draw_neighbours

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
    """Return the loss lambda(t, r) dist(f(x_t, t, 0), [f_target(x_r, r, 0)]), averaged over rows, and its metrics.

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


@settings
class Consistency(MethodSettings):
    """Settings of discrete consistency's training."""

    distance: Literal["l2", "huber", "lpips"] = "huber"
    """Between the two ends; lpips is that of `perceptual`."""
    perceptual: str | None = None
    """Of lpips: your own distance(a, b) -> one value a row, as package.module:attribute, imported before training; with
    () after it where it must be called to make one: lpips:LPIPS() is the lpips package's, for images of 3 channels."""
    c: Annotated[float, Bounds(gt=0)] = 0.03
    """Of the Pseudo-Huber distance; iCT takes 0.00054 times the root of the elements of a row."""
    grid: Literal["ict", "ct", "fixed"] = "ict"
    """How the number of times grows: doubled (iCT), as a root (CT), or not at all.

    They lie evenly on [0, 1] in the path's own time: on path edm those are Karras's noise levels, as CT and iCT have
    them; on another path they are others.
    """
    intervals: tuple[int, int] = (10, 1280)
    """Between how many and how many of the grid's intervals; a fixed grid has the second."""
    levels: LevelSettings | None = LevelSettings()
    """The law of the noise levels, as iCT has it; None: every interval alike."""
    gap: Literal["time", "level"] | None = "time"
    """Weigh by 1 over the neighbours' gap: level, as iCT does, 1 / (sigma(t) - sigma(r)) with sigma = beta / alpha.

    level favours low noise, and needs a path whose noise level stays finite, edm or ve. time is 1 / (t - r), the same
    on all of an even grid: it only keeps the loss from shrinking as the grid grows. None: neither.
    """
    solver: Literal["heun", "euler", "heun_in_time", "euler_in_time"] = "heun"
    """Of the teacher's step: in the noise level on paths edm and ve, as in CM's code, and in time on those that end in
    pure noise; the last two are in time on every path."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance of the teacher."""

    learns: ClassVar[tuple[Learnt, ...]] = ("end",)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return draw_neighbours(
            context.rows,
            self.points(context),
            path=context.path,
            log_normal=None if self.levels is None else (self.levels.mean, self.levels.std),
            generator=context.generator,
            device=context.device,
        )

    @property
    def depends_on_steps(self) -> bool:
        return self.grid != "fixed"

    def points(self, context: Context) -> int:
        """Return how many times are on the grid in this step."""
        start, end = self.intervals
        if self.grid == "fixed":
            return end + 1
        grow = ict_points if self.grid == "ict" else ct_points
        return grow(context.step, context.steps, start=start, end=end)

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"weight": self.weight(context.path)}

    def weight(self, path: Path) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Return lambda(t, r) of the objective."""
        if self.gap == "level":
            return lambda t, r: (1 / (level_of_time(path, t) - level_of_time(path, r))).to(t.dtype)
        return None if self.gap is None else lambda t, r: 1 / (t - r)

    def definition(self, run: Run) -> int | None:
        in_level = not self.solver.endswith("_in_time") and has_finite_level(run.path)
        return 2 if run.has_teacher and in_level else super().definition(run)

    def check(self, run: Run) -> None:
        if (self.distance == "lpips") != (self.perceptual is not None):
            needed = "package.module:attribute with distance lpips" if self.perceptual is None else "distance lpips too"
            raise ConfigError(
                f"method.perceptual: expected {needed}, got {str(self.perceptual)[:80]} and {self.distance}"
            )
        if self.gap == "level" and not has_finite_level(run.path):
            raise ConfigError(
                f"method.gap: got level on path {run.path_name}, whose noise level is infinite at t = 1: the last "
                f"interval would weigh 0, and one step would never be learnt; expected time, or path.name edm or ve"
            )
        if not 1 <= self.intervals[0] <= self.intervals[1] <= 2**20:
            raise ConfigError(f"method.intervals: expected 1 <= first <= second <= 2^20, got {list(self.intervals)}")
        if self.guidance.active and not run.has_teacher:
            raise ConfigError("method.guidance: consistency training follows no velocity; give a teacher, or scale 1")


METHOD = Objective(
    consistency,
    "semigroup",
    ("t", "r"),
    tangent="none",
    formula="λ(t, r) dist(f(x_t, t, 0), [f⁻(x_r, r, 0)]); x_r by the teacher's flow (CD; Heun, on edm in the noise "
    "level) or from x0, x1 (CT)",
    sources=("Song et al. 2023, arXiv:2303.01469, algorithms 2 and 3", "Song and Dhariwal 2024, arXiv:2310.14189"),
    reduction="l2 and huber sum over elements; s = 0 in all rows",
    exponent=lambda settings: 0.5 if settings["distance"] == "huber" else 0.0,
    sampler="consistency",
    summary="Discrete consistency: neighbours on a trajectory must lead to the same data; CD with a teacher, else CT.",
    place=6,
    settings=Consistency,
    recipes={
        "ring": {"method": {"grid": "ict", "intervals": [10, 160]}, "teacher": "runs/ring-flow"},
        "digits": {"method": {"grid": "ict", "intervals": [10, 160]}, "teacher": "runs/digits-flow"},
    },
)
