"""Share the settings of methods that draw times alike."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from torch import Tensor

from fastdistill.objectives.settings.base import MethodSettings
from fastdistill.objectives.settings.context import Context
from fastdistill.objectives.settings.guidance import GuidanceSettings
from fastdistill.objectives.settings.times import LogitNormalTimes, Times
from fastdistill.samplers import Learnt
from fastdistill.settings import Bounds, Share, settings
from fastdistill.times import pair_times, triangle_times


@settings
class Instantaneous(MethodSettings):
    """Settings that flow matching on data and on pairs share."""

    times: Times = LogitNormalTimes()
    """The law of the training times t."""
    weight: Literal["velocity", "data", "noise", "min_snr", "edm"] = "velocity"
    """The weight of the times, by the prediction whose plain square it amounts to; velocity is none."""
    sample_steps: Annotated[int, Bounds(ge=1, le=10_000)] = 16
    """Steps of the sample grids."""

    learns: ClassVar[tuple[Learnt, ...]] = ("velocity",)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return (self.times.sampler()(context.rows, context.generator, context.device),)


@settings
class PairedTimes(MethodSettings):
    """Settings that the methods share whose times are the larger and the smaller of two draws."""

    times: Times = LogitNormalTimes()
    """The law of both draws, or of the first where `end_times` is given; t is the larger of the two, s the smaller."""
    end_times: Times | None = None
    """The law of the second draw; None: as `times`. Choose it in a file; the command line can then change its
    numbers."""
    distinct: Share = 0.25
    """Share of the rows with s != t, which pay for a tangent; the others are plain flow matching."""

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return pair_times(
            context.rows,
            self.times.sampler(),
            self.distinct,
            end_sampler=None if self.end_times is None else self.end_times.sampler(),
            generator=context.generator,
            device=context.device,
        )


def flat_by_weight(p: float) -> str | None:
    """Return why a loss whose rows are divided by their own errors, e / [e + c]^p, tells little; None where it does."""
    if p < 1:
        return None
    return (
        f"the loss stays nearly flat by design: at p = {p:g} each row's error e is divided by its own size, "
        "e / (e + c), which is near 1 whatever e is, though its gradient still leads e down. Watch raw_error, "
        "which has a floor too (the spread of the data's velocities), tangent_norm, and the samples."
    )


def flat_by_normalisation(c: float | None) -> str | None:
    """Return why a loss of a normalised tangent, g / (|g| + c), tells little; None where there is no such c."""
    if c is None:
        return None
    return (
        "the loss stays nearly flat by design: it is the square of a normalised tangent g / (|g| + c), which is "
        "near 1 in a row whatever the error is. Watch raw_error, tangent_norm, and the samples."
    )


@settings
class SelfDistillation(MethodSettings):
    """Settings that ESD, LSD and PSD share: flow matching on the diagonal, and an identity of the flow map off it.

    Both the anchor's share and the weight matter: on the ring they diverge with 75 % of the rows off the diagonal, and
    with a learned weight, which grows without bound where the identity holds almost exactly.
    """

    distinct: Share = 0.25
    """Share of the rows with s < t."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the diagonal's velocity, which the map follows."""

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return triangle_times(context.rows, self.distinct, generator=context.generator, device=context.device)
