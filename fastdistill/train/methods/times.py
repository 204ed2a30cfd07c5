"""Laws of times as settings; each names a law of `fastdistill.times`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fastdistill.times import LogitNormal, TimeSampler, Uniform
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
