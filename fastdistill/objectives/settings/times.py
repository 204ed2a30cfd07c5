"""Laws of times as settings; each names a law of `fastdistill.times`, for a path where it speaks of noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from torch import Tensor

from fastdistill.objectives.settings.context import Context
from fastdistill.paths import Path
from fastdistill.settings import Bounds, Share, settings
from fastdistill.times import ArctanLogNormal, KarrasLevel, LogitNormal, ShiftedLevel, TimeSampler, Uniform, gap_times


@settings
class LogitNormalTimes:
    """Law of times sigmoid(N(mean, std²)): most draws lie in the middle."""

    law: Literal["logit_normal"] = "logit_normal"
    mean: float = -0.4
    """Of the normal; a lower one draws times nearer to the data."""
    std: Annotated[float, Bounds(gt=0)] = 1.0
    """Of the normal."""

    def sampler(self) -> TimeSampler:
        """Return the law to draw from."""
        return LogitNormal(self.mean, self.std)


@settings
class UniformTimes:
    """Uniform on [0, 1)."""

    law: Literal["uniform"] = "uniform"

    def sampler(self) -> TimeSampler:
        """Return the law to draw from."""
        return Uniform()


Times = LogitNormalTimes | UniformTimes


@settings
class KarrasLevels:
    """Noise levels of Karras's grid, at a uniform share of it between two; on path edm that is its time. DMD2's."""

    law: Literal["karras"] = "karras"
    low: Share = 0.02
    """The least share."""
    high: Share = 0.98
    """The greatest share."""

    def sampler(self, path: Path) -> TimeSampler:
        """Return the law to draw from."""
        return KarrasLevel(path, self.low, self.high)


@settings
class ShiftedLevels:
    """Noise levels of the linear path at shift q / (1 + (shift - 1) q), q uniform. rCM's."""

    law: Literal["shifted"] = "shifted"
    shift: Annotated[float, Bounds(gt=0)] = 5.0
    """A larger one draws more noise."""

    def sampler(self, path: Path) -> TimeSampler:
        """Return the law to draw from."""
        return ShiftedLevel(path, self.shift)


@settings
class TimeLevels:
    """Times of the path itself, uniform between two."""

    law: Literal["time"] = "time"
    low: Share = 0.02
    """The least time."""
    high: Share = 0.98
    """The greatest time."""

    def sampler(self, path: Path) -> TimeSampler:
        """Return the law to draw from."""
        return Uniform(self.low, self.high)


@settings
class SameLevels:
    """Levels of the law beside it."""

    law: Literal["same"] = "same"


Levels = KarrasLevels | ShiftedLevels | TimeLevels
FakeLevels = SameLevels | KarrasLevels | ShiftedLevels | TimeLevels


def from_pair(given: Any) -> Any:
    """Return the law of times between two numbers, which versions that knew no other law wrote by themselves."""
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2:
        return {"law": "time", "low": given[0], "high": given[1]}
    return given


@settings
class LevelSettings:
    """Log-normal law of noise levels beta / alpha."""

    mean: float = -1.1
    """Of the logarithm."""
    std: Annotated[float, Bounds(gt=0)] = 2.0
    """Of the logarithm."""


@settings
class ArctanTimes:
    """Law of times t = (2 / pi) atan(e^N(mean, std²) / sigma_data)."""

    mean: float = -1.0
    """Of the normal; a lower one draws times nearer to the data."""
    std: Annotated[float, Bounds(gt=0)] = 1.4
    """Of the normal."""
    sigma_data: Annotated[float, Bounds(gt=0)] = 1.0
    """The scale of the data."""

    def draw(self, context: Context) -> Tensor:
        """Draw times (B,)."""
        return ArctanLogNormal(self.mean, self.std, self.sigma_data)(context.rows, context.generator, context.device)


@settings
class GapTimes:
    """Law of gaps t - s = sigmoid(N(mean, std²)), s uniform below 1 - (t - s)."""

    mean: float = -0.8
    """Of the normal; a lower one draws shorter jumps."""
    std: Annotated[float, Bounds(gt=0)] = 1.0
    """Of the normal."""

    def draw(self, context: Context, distinct: float = 1.0) -> tuple[Tensor, Tensor]:
        """Draw times (t, s), each (B,); the first share `distinct` of the rows has s < t."""
        gap = LogitNormal(self.mean, self.std)
        return gap_times(context.rows, gap, distinct, generator=context.generator, device=context.device)
