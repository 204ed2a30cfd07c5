"""Methods that learn the map to the data alone, f(x, t, 0): discrete and continuous consistency, and FACM."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastdistill.objectives.solvers import has_finite_level
from fastdistill.paths import Path
from fastdistill.times import (
    ArctanLogNormal,
    LogNormalLevel,
    ct_points,
    ect_stage,
    ect_times,
    ict_points,
    level_of_time,
)
from fastdistill.times import neighbour_times as draw_neighbours
from fastdistill.train.methods.base import Context, GuidanceSettings, Learnt, MethodSettings, ramp
from fastdistill.train.settings import ConfigError, Settings

if TYPE_CHECKING:
    from fastdistill.train.config import TrainConfig


class LevelSettings(Settings):
    """A log-normal law of noise levels beta / alpha."""

    mean: float = -1.1
    """Of the logarithm."""
    std: float = Field(2.0, gt=0)
    """Of the logarithm."""


class Consistency(MethodSettings):
    """Discrete consistency: neighbours on a trajectory must lead to the same data; CD with a teacher, else CT."""

    name: Literal["consistency"] = "consistency"
    distance: Literal["l2", "huber", "lpips"] = "huber"
    """Between the two ends; lpips is that of `perceptual`."""
    perceptual: str | None = None
    """Of lpips: your own distance(a, b) -> one value a row, as package.module:attribute, imported before training; with
    () after it where it must be called to make one: lpips:LPIPS() is the lpips package's, for images of 3 channels."""
    c: float = Field(0.03, gt=0)
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
        """The times on the grid in this step."""
        start, end = self.intervals
        if self.grid == "fixed":
            return end + 1
        grow = ict_points if self.grid == "ict" else ct_points
        return grow(context.step, context.steps, start=start, end=end)

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"weight": self.weight(context.path)}

    def weight(self, path: Path) -> Callable[[Tensor, Tensor], Tensor] | None:
        """lambda(t, r) of the objective."""
        if self.gap == "level":
            return lambda t, r: (1 / (level_of_time(path, t) - level_of_time(path, r))).to(t.dtype)
        return None if self.gap is None else lambda t, r: 1 / (t - r)

    def definition(self, config: TrainConfig) -> int | None:
        in_level = not self.solver.endswith("_in_time") and has_finite_level(config.path.build())
        return 2 if config.teacher is not None and in_level else super().definition(config)

    def check(self, config: TrainConfig) -> None:
        if (self.distance == "lpips") != (self.perceptual is not None):
            needed = "package.module:attribute with distance lpips" if self.perceptual is None else "distance lpips too"
            raise ConfigError(
                f"method.perceptual: expected {needed}, got {str(self.perceptual)[:80]} and {self.distance}"
            )
        if self.gap == "level" and not has_finite_level(config.path.build()):
            raise ConfigError(
                f"method.gap: got level on path {config.path.name}, whose noise level is infinite at t = 1: the last "
                f"interval would weigh 0, and one step would never be learnt; expected time, or path.name edm or ve"
            )
        if not 1 <= self.intervals[0] <= self.intervals[1] <= 2**20:
            raise ConfigError(f"method.intervals: expected 1 <= first <= second <= 2^20, got {list(self.intervals)}")
        if self.guidance.active and config.teacher is None:
            raise ConfigError("method.guidance: consistency training follows no velocity; give a teacher, or scale 1")


class ECT(MethodSettings):
    """Easy consistency tuning: consistency whose second time starts at the data and draws nearer stage by stage."""

    name: Literal["ect"] = "ect"
    q: float = Field(2.0, gt=1)
    """Each stage divides the relative gap of noise levels by it."""
    stages: int = Field(8, ge=1)
    """How many stages, equally long."""
    levels: LevelSettings = LevelSettings()
    """The law of the noise levels."""
    c: float = Field(1e-6, gt=0)
    """The norm of the difference is smoothed below it."""

    learns: ClassVar[tuple[Learnt, ...]] = ("end",)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return ect_times(
            context.rows,
            ect_stage(context.step, context.steps, self.stages),
            q=self.q,
            law=LogNormalLevel(context.path, self.levels.mean, self.levels.std),
            generator=context.generator,
            device=context.device,
        )

    @property
    def depends_on_steps(self) -> bool:
        return self.stages > 1

    def definition(self, config: TrainConfig) -> int | None:
        starts_noisy = float(config.path.build().beta(torch.zeros((), dtype=torch.float64))) > 0
        return 2 if starts_noisy else super().definition(config)  # where r = 0 stands for the clean data


class ArctanTimes(Settings):
    """t = (2 / pi) atan(e^N(mean, std²) / sigma_data)."""

    mean: float = -1.0
    """Of the normal; a lower one draws times nearer to the data."""
    std: float = Field(1.4, gt=0)
    """Of the normal."""
    sigma_data: float = Field(1.0, gt=0)
    """The scale of the data."""

    def draw(self, context: Context) -> Tensor:
        """Times (B,)."""
        return ArctanLogNormal(self.mean, self.std, self.sigma_data)(context.rows, context.generator, context.device)


class ContinuousConsistency(MethodSettings):
    """What sCM and rCM share."""

    times: ArctanTimes = ArctanTimes()
    """The law of the training times t."""
    tangent_warmup: int = Field(10_000, ge=0)
    """Steps over which the network's own tangent enters; until then the target is nearer to the velocity."""
    parameterization: Literal["velocity", "average"] = "velocity"
    """What is regressed: sCM's F, on paths that start at the data, or the average velocity, on any."""
    c: float | None = Field(0.1, gt=0)
    """Of the tangent's normalisation, g / (|g| + c); None: none."""
    learned_weight: bool = True
    """Weigh the times by a learned variance."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance of the teacher."""

    learns: ClassVar[tuple[Learnt, ...]] = ("end",)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return (self.times.draw(context),)

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"warmup": ramp(context, self.tangent_warmup)}


class SCM(ContinuousConsistency):
    """Continuous consistency: the limit of neighbouring times, by the tangent along the flow; sCD with a teacher."""

    name: Literal["scm"] = "scm"


class FACM(MethodSettings):
    """FACM: continuous consistency to s = 0, anchored by flow matching at s = t."""

    name: Literal["facm"] = "facm"
    times: ArctanTimes = ArctanTimes(mean=-0.8, std=1.6)
    """The law of the training times t."""
    p: float = Field(0.5, gt=0)
    """Exponent of the share 1 - (1 - t)^p of the tangent that a target takes."""
    c: float = Field(1e-3, gt=0)
    """Offset of the distillation term's weight, in units of the error averaged over a row."""
    clamp: float = Field(1.0, gt=0)
    """Bound of each element of the tangent's part."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the velocity."""

    learns: ClassVar[tuple[Learnt, ...]] = ("velocity", "end")

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return (self.times.draw(context),)
