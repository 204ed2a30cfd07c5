"""Flow matching, MeanFlow and their nearest relatives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastdistill.objectives.velocity import Autoguidance, Guidance
from fastdistill.times import pair_times
from fastdistill.train.methods.base import Context, GuidanceSettings, Learnt, MethodSettings, Share
from fastdistill.train.methods.times import LogitNormalTimes, Times
from fastdistill.train.settings import ConfigError

if TYPE_CHECKING:
    from fastdistill.train.config import TrainConfig


class Instantaneous(MethodSettings):
    """What flow matching on data and on pairs share."""

    times: Times = LogitNormalTimes()
    """The law of the training times t."""
    weight: Literal["velocity", "data", "noise", "min_snr", "edm"] = "velocity"
    """The weight of the times, by the prediction whose plain square it amounts to; velocity is none."""
    sample_steps: int = Field(16, ge=1, le=10_000)
    """Steps of the sample grids."""

    learns: ClassVar[tuple[Learnt, ...]] = ("velocity",)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return (self.times.sampler()(context.rows, context.generator, context.device),)


class FlowMatching(Instantaneous):
    """Flow matching: the network learns the instantaneous velocity, and sampling integrates it."""

    name: Literal["flow_matching"] = "flow_matching"


class PairedTimes(MethodSettings):
    """What the methods share whose times are the larger and the smaller of two draws."""

    times: Times = LogitNormalTimes()
    """The law of both draws, or of the first where `end_times` is given; t is the larger of the two, s the smaller."""
    end_times: Times | None = None
    """The law of the second draw; None: as `times`. MeanFlow's recipe for CIFAR-10 has mean -0.6 there and -4 here, std
    1.6 in both, and `distinct` 0.75. Choose it in a file; the command line can then change its numbers."""
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


class MeanFlow(PairedTimes):
    """MeanFlow: the network learns the average velocity, and sampling jumps along it, in one step if wished."""

    name: Literal["meanflow"] = "meanflow"
    p: float = Field(1.0, ge=0)
    """Exponent of the adaptive weight; 0 is the plain square."""
    c: float = Field(1e-2, gt=0)
    """Offset of the adaptive weight, in units of the error summed over a row."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the target, so that sampling needs none."""


class ImprovedGuidance(GuidanceSettings):
    """Guidance as improved MeanFlow writes it: the scale alone decides how much of the estimate is the student's."""

    def build(self, context: Context) -> Guidance | Autoguidance | None:
        if context.teacher is not None or not self.active:
            return super().build(context)
        return Guidance.improved(self.draw_scale(context), context.batch.null, self.interval)


class ImprovedMeanFlow(PairedTimes):
    """Improved MeanFlow: the tangent follows the network's own velocity, so that the residual regresses a velocity."""

    name: Literal["improved_meanflow"] = "improved_meanflow"
    distinct: Share = 0.5
    """Share of the rows with s != t, which pay for a tangent; the others are plain flow matching."""
    p: float = Field(1.0, ge=0)
    """Exponent of the adaptive weight; 0 is the plain square."""
    c: float = Field(1e-2, gt=0)
    """Offset of the adaptive weight, in units of the error summed over a row."""
    guidance: ImprovedGuidance = ImprovedGuidance()
    """Guidance inside the target; with `scale_to` the network learns all scales between at once."""

    def check(self, config: TrainConfig) -> None:
        if self.guidance.kappa:
            raise ConfigError(
                f"method.guidance.kappa: improved_meanflow takes 1 - 1 / scale for it; expected 0 and a scale, got "
                f"{self.guidance.kappa}"
            )


class AlphaFlow(PairedTimes):
    """Alpha-Flow: from flow matching to MeanFlow by a curriculum, through jumps of ever shorter first parts."""

    name: Literal["alpha_flow"] = "alpha_flow"
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the target."""
    gain: float = Field(25.0, gt=0)
    """Steepness of the curriculum: alpha falls from 1 to 0 as a sigmoid of the share of the steps that are done."""
    snap: float = Field(0.005, ge=0, lt=0.5)
    """An alpha so near to 1 or 0 is taken for it."""
    c: float = Field(1e-3, gt=0)
    """Offset of the adaptive weight, in units of the error summed over a row."""

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"alpha": self.alpha(context)}

    @property
    def depends_on_steps(self) -> bool:
        return True

    def alpha(self, context: Context) -> float:
        """1 is flow matching to every s, 0 is MeanFlow."""
        value = 1 / (1 + math.exp(self.gain * (context.step / context.steps - 0.5)))
        return 1.0 if value > 1 - self.snap else 0.0 if value < self.snap else value


class ReFlow(Instantaneous):
    """ReFlow: flow matching on pairs of noise and where a teacher's flow takes it, which straightens the flow."""

    name: Literal["reflow"] = "reflow"
    pairs: int = Field(20_000, ge=1, le=10**8)
    """How many pairs are made, once, before training."""
    pair_steps: int = Field(32, ge=1, le=10_000)
    """Steps of Heun's method for each, two evaluations a step."""
    pair_guidance: float = Field(1.0, ge=0)
    """Classifier-free guidance scale of the teacher while it makes them."""
    distil: bool = False
    """Train at t = 1 alone: the last round, whose network makes one step and no more. Needs sample_steps 1."""

    makes_pairs: ClassVar[bool] = True
    own_sources: ClassVar[tuple[str, ...]] = (
        "Liu et al. 2023 (rectified flow), arXiv:2209.03003, algorithm 1; pairs by objectives.reflow.coupled_pairs",
    )
    learned_from: ClassVar[str | None] = "flow_matching"

    def has_learnt(self, steps: int) -> bool:
        return steps == 1 or not self.distil

    def check(self, config: TrainConfig) -> None:
        if self.distil and self.sample_steps != 1:
            raise ConfigError(
                f"method.sample_steps: with method.distil the network knows t = 1 alone, so expected 1, got "
                f"{self.sample_steps}"
            )

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        if self.distil:
            return (torch.ones(context.rows, device=context.device),)
        return super().draw_times(context)
