"""Laws of times as settings; each names a law of `fastdistill.times`, for a path where it speaks of noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fastdistill.paths import Path
from fastdistill.times import KarrasLevel, LogitNormal, ShiftedLevel, TimeSampler, Uniform
from fastdistill.train.settings import Settings


class LogitNormalTimes(Settings):
    """sigmoid(N(mean, std²)): most draws in the middle."""

    law: Literal["logit_normal"] = "logit_normal"
    mean: float = -0.4
    """Of the normal; a lower one draws times nearer to the data."""
    std: float = Field(1.0, gt=0)
    """Of the normal."""

    def sampler(self) -> TimeSampler:
        """The law to draw from."""
        return LogitNormal(self.mean, self.std)


class UniformTimes(Settings):
    """Uniform on [0, 1)."""

    law: Literal["uniform"] = "uniform"

    def sampler(self) -> TimeSampler:
        """The law to draw from."""
        return Uniform()


Times = Annotated[LogitNormalTimes | UniformTimes, Field(discriminator="law")]


class KarrasLevels(Settings):
    """Noise levels of Karras's grid, at a uniform share of it between two; on path edm that is its time. DMD2's."""

    law: Literal["karras"] = "karras"
    low: float = Field(0.02, ge=0, le=1)
    """The least share."""
    high: float = Field(0.98, ge=0, le=1)
    """The greatest share."""

    def sampler(self, path: Path) -> TimeSampler:
        """The law to draw from."""
        return KarrasLevel(path, self.low, self.high)


class ShiftedLevels(Settings):
    """Noise levels of the linear path at shift q / (1 + (shift - 1) q), q uniform. rCM's."""

    law: Literal["shifted"] = "shifted"
    shift: float = Field(5.0, gt=0)
    """A larger one draws more noise."""

    def sampler(self, path: Path) -> TimeSampler:
        """The law to draw from."""
        return ShiftedLevel(path, self.shift)


class TimeLevels(Settings):
    """Times of the path itself, uniform between two."""

    law: Literal["time"] = "time"
    low: float = Field(0.02, ge=0, le=1)
    """The least time."""
    high: float = Field(0.98, ge=0, le=1)
    """The greatest time."""

    def sampler(self, path: Path) -> TimeSampler:
        """The law to draw from."""
        return Uniform(self.low, self.high)


class SameLevels(Settings):
    """Those of the law beside it."""

    law: Literal["same"] = "same"


def _from_pair(given: Any) -> Any:
    """Two numbers by themselves are times, as in the configurations of versions that knew no other law."""
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) == 2:
        return {"law": "time", "low": given[0], "high": given[1]}
    return given


Levels = Annotated[KarrasLevels | ShiftedLevels | TimeLevels, Field(discriminator="law"), BeforeValidator(_from_pair)]
FakeLevels = Annotated[
    SameLevels | KarrasLevels | ShiftedLevels | TimeLevels, Field(discriminator="law"), BeforeValidator(_from_pair)
]
