"""Flow matching, MeanFlow and their nearest relatives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fastdistill.objectives.velocity import Autoguidance, Guidance
from fastdistill.paths import Path
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


MEANFLOW_RECIPES: dict[str, dict[str, Any]] = {
    "cifar10_paper": {"times": {"law": "logit_normal", "mean": -2.0, "std": 2.0}, "distinct": 0.75, "p": 0.75},
    "cifar10_code": {
        "times": {"law": "logit_normal", "mean": -0.6, "std": 1.6},
        "end_times": {"law": "logit_normal", "mean": -4.0, "std": 1.6},
        "distinct": 0.75,
        "p": 0.75,
    },
}
"""Fields of `MeanFlow` by the name of a recipe: of the paper's text, and of the authors' code in PyTorch."""


class MeanFlow(PairedTimes):
    """MeanFlow: the network learns the average velocity, and sampling jumps along it, in one step if wished."""

    name: Literal["meanflow"] = "meanflow"
    recipe: Literal["cifar10_paper", "cifar10_code"] | None = None
    """Fill times, end_times, distinct and p as the paper has them for CIFAR-10, both times LN(-2, 2), or as the
    authors' code has them, LN(-0.6, 1.6) and LN(-4, 1.6); 75 % of the rows have s != t and p is 0.75 in both. Any of
    these that a file gives beside it holds; on the command line a recipe replaces the file's."""
    p: float = Field(1.0, ge=0)
    """Exponent of the adaptive weight; 0 is the plain square."""
    c: float = Field(1e-2, gt=0)
    """Offset of the adaptive weight, in units of the error summed over a row."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the target, so that sampling needs none."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_recipe(cls, fields: Any) -> Any:
        recipe = fields.get("recipe") if isinstance(fields, Mapping) else None
        return {**MEANFLOW_RECIPES[recipe], **fields} if recipe in MEANFLOW_RECIPES else fields


class ImprovedGuidance(GuidanceSettings):
    """Guidance as improved MeanFlow writes it: the scale alone decides how much of the estimate is the student's."""

    scale_to: float | None = Field(None, gt=0)
    """Each row gets a scale of its own, log-uniform from `scale` to this, and the network is told: needs
    model.guidance. The paper's are 1 and 8."""

    def draw_scale(self, context: Context) -> float | Tensor:
        if self.scale_to is None:
            return self.scale
        share = torch.rand(context.rows, generator=context.generator).to(context.device)
        return self.scale * (self.scale_to / self.scale) ** share

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

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"undropped": context.batch.undropped}

    def definition(self, config: TrainConfig) -> int | None:
        # Log-uniform scales, no label at the scale 1; the tangent of a dropped row runs along its label's velocity.
        return 2 if config.data.label_dropout or self.guidance.active else None


class AlphaFlow(PairedTimes):
    """Alpha-Flow: from flow matching to MeanFlow by a curriculum, through jumps of ever shorter first parts."""

    name: Literal["alpha_flow"] = "alpha_flow"
    distinct: Share = 0.5
    """Share of the rows with s != t; the others are plain flow matching."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the target."""
    gain: float = Field(25.0, gt=0)
    """Steepness of the curriculum: alpha falls from 1 to 0 as a sigmoid of the share of the steps that are done."""
    snap: float = Field(0.005, ge=0, lt=0.5)
    """An alpha so near to 1 or 0 is taken for it."""
    c: float = Field(1e-3, gt=0)
    """Offset of the adaptive weight, in units of the error summed over a row."""
    clamp: float | None = Field(4.0, gt=0)
    """Largest absolute value in the target of rows with s != t, while alpha > 0; None: no bound. For data of unit
    variance: where velocities are larger it draws their mean to 0."""

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"alpha": self.alpha(context)}

    def definition(self, config: TrainConfig) -> int | None:
        return 2  # rows with s = t are flow matching of weight 1

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
        if self.distil and not _is_straight(config.path.build()):
            raise ConfigError(
                f"method.distil: its one step follows the velocity at t = 1, which leads from pure noise to the data "
                f"on a straight path alone; expected path.name linear, fm or icfm, got {config.path.name}"
            )

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        if self.distil:
            return (torch.ones(context.rows, device=context.device),)
        return super().draw_times(context)


def _is_straight(path: Path) -> bool:
    """Whether a pair's state moves at constant velocity from (almost) the data to pure noise."""
    start, end = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    rates = [(f(end) - f(start) - d(end)).abs() for f, d in ((path.alpha, path.d_alpha), (path.beta, path.d_beta))]
    return float(path.alpha(end)) < 1e-12 and max(map(float, rates)) < 1e-12
