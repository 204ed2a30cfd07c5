"""Methods that learn the map between any two times: AYF, shortcut, self-distillation, terminal velocity matching."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastdistill.objectives.esd import Through
from fastdistill.times import LogitNormal, dyadic_times, gap_times, triangle_times
from fastdistill.train.methods.base import Context, Decay, GuidanceSettings, Learnt, MethodSettings, Share, ramp
from fastdistill.train.settings import Settings

if TYPE_CHECKING:
    from fastdistill.train.config import TrainConfig


class GapTimes(Settings):
    """t - s = sigmoid(N(mean, std²)), s uniform below 1 - (t - s)."""

    mean: float = -0.8
    """Of the normal; a lower one draws shorter jumps."""
    std: float = Field(1.0, gt=0)
    """Of the normal."""

    def draw(self, context: Context, distinct: float = 1.0) -> tuple[Tensor, Tensor]:
        """Times (t, s), each (B,); the first share `distinct` of the rows has s < t."""
        gap = LogitNormal(self.mean, self.std)
        return gap_times(context.rows, gap, distinct, generator=context.generator, device=context.device)


class AYF(MethodSettings):
    """What AYF's two forms share."""

    times: GapTimes = GapTimes()
    """The law of both times."""
    tangent_warmup: int = Field(10_000, ge=0)
    """Steps over which the network's own tangent enters, up to 99 % of it."""
    c: float | None = Field(0.1, gt=0)
    """Of the normalisation, g / (|g| + c); None: none."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance of the teacher: autoguidance with a weak teacher, else by labels. AYF draws scales from 1 to 3."""
    sample_gamma: Share = 0.0
    """Of the sampler gamma: how much of the noise is new at each step."""

    learns: ClassVar[tuple[Learnt, ...]] = ("map",)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return self.times.draw(context)

    def keywords(self, context: Context) -> dict[str, Any]:
        return super().keywords(context) | {"warmup": ramp(context, self.tangent_warmup, 0.99)}


class AYFEMD(AYF):
    """Align your flow, Eulerian: the flow map from t to s must not change as t moves along the teacher's flow."""

    name: Literal["ayf_emd"] = "ayf_emd"


class AYFLMD(AYF):
    """Align your flow, Lagrangian: the end of the flow map must move with the teacher's velocity."""

    name: Literal["ayf_lmd"] = "ayf_lmd"


class Shortcut(MethodSettings):
    """Shortcut models: a jump must equal two jumps of half its length; the shortest are flow matching."""

    name: Literal["shortcut"] = "shortcut"
    distinct: Share = 0.125
    """Share of the rows with jumps; the others are plain flow matching."""
    finest: int = Field(128, ge=2)
    """Steps of the finest grid, a power of 2. The steps of that grid are made with the velocity."""
    target_ema: Decay | None = 0.999
    """Decay of the averaged network that makes the two jumps; None: the network itself, detached."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the velocity."""

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return dyadic_times(
            context.rows, self.distinct, finest=self.finest, generator=context.generator, device=context.device
        )

    def sampler_for(self, sampler: str, steps: int) -> str:
        # No row trains jumps of the finest length or below: as in training, these are steps along the velocity.
        return "euler" if sampler == "average_velocity" and steps >= self.finest else sampler

    def has_learnt(self, steps: int) -> bool:
        return steps & (steps - 1) == 0 and steps <= self.finest

    def definition(self, config: TrainConfig) -> int | None:
        return 2  # the finest halves are made with the velocity


class SelfDistillation(MethodSettings):
    """What ESD, LSD and PSD share: flow matching on the diagonal, and an identity of the flow map off it.

    Both the anchor's share and the weight matter: on the ring they diverge with 75 % of the rows off the diagonal, and
    with a learned weight, which grows without bound where the identity holds almost exactly.
    """

    distinct: Share = 0.25
    """Share of the rows with s < t."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the diagonal's velocity, which the map follows."""

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return triangle_times(context.rows, self.distinct, generator=context.generator, device=context.device)


class ESD(SelfDistillation):
    """Eulerian self-distillation: the map must not change as its start moves along the network's own flow."""

    name: Literal["esd"] = "esd"
    through: Through = "time"
    """What the gradient flows through beside u: du/dt alone, the whole tangent, or nothing. The first is the authors'
    choice; the others need less time a step, and the last one less memory too."""

    def definition(self, config: TrainConfig) -> int | None:
        return super().definition(config) if self.through == "nothing" else 2


class LSD(SelfDistillation):
    """Lagrangian self-distillation: the map's end must move with the network's own velocity."""

    name: Literal["lsd"] = "lsd"


class PSD(SelfDistillation):
    """Progressive self-distillation: a jump must equal two jumps that meet on the way."""

    name: Literal["psd"] = "psd"
    meeting: Literal["middle", "uniform"] = "middle"
    """Where the two jumps meet: half-way, or anywhere."""

    def keywords(self, context: Context) -> dict[str, Any]:
        midpoint: float | Tensor = 0.5
        if self.meeting == "uniform":
            drawn = torch.rand(context.rows, generator=context.generator)
            midpoint = drawn.clamp(1e-3, 1 - 1e-3).to(context.device)
        return super().keywords(context) | {"midpoint": midpoint}


class TVM(MethodSettings):
    """Terminal velocity matching: the velocity with which the map's end moves must be the network's own there."""

    name: Literal["tvm"] = "tvm"
    times: GapTimes = GapTimes()
    """The law of both times."""
    target_ema: Decay | None = 0.99
    """Decay of the averaged network that gives the velocity at the end; None: the network itself, detached."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the velocity. Both residuals are then divided by its scale."""

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return self.times.draw(context)

    def keywords(self, context: Context) -> dict[str, Any]:
        given = super().keywords(context)
        return given if given["guidance"] is None else given | {"factor": 1 / given["guidance"].scale}

    def definition(self, config: TrainConfig) -> int | None:
        return 2 if self.guidance.active else None  # by the average network without a label, over the scale
