"""Flow matching, MeanFlow and their nearest relatives."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fastdistill.times import distinct_rows, pair_times
from fastdistill.train.methods.base import Context, GuidanceSettings, Learnt, MethodSettings, Share
from fastdistill.train.methods.times import LogitNormalTimes, Times


class FlowMatching(MethodSettings):
    """Flow matching: the network learns the instantaneous velocity, and sampling integrates it."""

    name: Literal["flow_matching"] = "flow_matching"
    times: Times = LogitNormalTimes()
    """The law of the training times t."""
    sample_steps: int = Field(16, ge=1)
    """Steps of the sample grids."""

    learns: ClassVar[tuple[Learnt, ...]] = ("velocity",)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return (self.times.sampler()(context.rows, context.generator, context.device),)


class PairedTimes(MethodSettings):
    """What the methods share whose times are the larger and the smaller of two draws."""

    times: Times = LogitNormalTimes()
    """The law of both times; t is the larger draw, s the smaller."""
    distinct: Share = 0.25
    """Share of the rows with s != t, which pay for a tangent; the others are plain flow matching."""

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        law, generator = self.times.sampler(), context.generator
        return pair_times(context.rows, law, self.distinct, generator=generator, device=context.device)

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"distinct_rows": distinct_rows(context.rows, self.distinct)}


class MeanFlow(PairedTimes):
    """MeanFlow: the network learns the average velocity, and sampling jumps along it, in one step if wished."""

    name: Literal["meanflow"] = "meanflow"
    p: float = Field(1.0, ge=0)
    """Exponent of the adaptive weight; 0 is the plain square."""
    c: float = Field(1e-2, gt=0)
    """Offset of the adaptive weight, in units of the error summed over a row."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the target, so that sampling needs none."""
