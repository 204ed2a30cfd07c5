"""How each objective is trained and sampled: its settings, the times it draws, the call of its loss.

One class a method. A new method is a new class here beside its objective, never a flag of another.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fastdistill import objectives, samplers
from fastdistill.objectives import Guidance
from fastdistill.times import LogitNormal, TimeSampler, Uniform, distinct_rows, pair_times
from fastdistill.train.data import Batch
from fastdistill.train.settings import ConfigError, Settings

Share = Annotated[float, Field(ge=0, le=1)]
Metrics = dict[str, Tensor]


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


class GuidanceSettings(Settings):
    """Classifier-free guidance inside MeanFlow's target velocity."""

    scale: float = Field(1.0, gt=0)
    """Effective scale; 1 is none. It is MeanFlow's omega / (1 - kappa)."""
    kappa: float = Field(0.0, ge=0, lt=1)
    """How much of the student's own conditional estimate replaces the noisy data velocity. Only without a teacher."""
    interval: tuple[Share, Share] = (0.0, 1.0)
    """The times [t_a, t_b] that are guided."""

    @property
    def active(self) -> bool:
        """Whether the target differs from the plain velocity."""
        return self.scale != 1 or self.kappa != 0

    def build(self, null: int) -> Guidance | None:
        """The objective's argument; `null` is the label that stands for "no label"."""
        if not self.active:
            return None
        return Guidance(omega=self.scale * (1 - self.kappa), kappa=self.kappa, interval=self.interval, null=null)


class FlowMatching(Settings):
    """Flow matching: the network learns the instantaneous velocity, and sampling integrates it."""

    name: Literal["flow_matching"] = "flow_matching"
    times: Times = LogitNormalTimes()
    """The law of the training times t."""
    sample_steps: int = Field(16, ge=1)
    """Euler steps of the sample grids."""
    sample_guidance: float = Field(1.0, ge=0)
    """Classifier-free guidance scale of the sample grids; 1 is none."""

    def loss(
        self, net: nn.Module, batch: Batch, generator: torch.Generator, teacher: nn.Module | None = None
    ) -> tuple[Tensor, Metrics]:
        """The objective on one batch, at times drawn from `generator`. A teacher is refused by `check`, before."""
        t = self.times.sampler()(len(batch.x0), generator, batch.x0.device)
        return objectives.flow_matching(net, batch.x0, batch.x1, t, y=batch.y)

    def sample(self, net: nn.Module, x1: Tensor, y: Tensor | None, steps: int, guidance: float, null: int) -> Tensor:
        """Euler from the noise x1 along the guided velocity: `steps` evaluations, twice as many with guidance."""
        return samplers.euler(samplers.guided(net, y, guidance, null), x1, steps)


class MeanFlow(Settings):
    """MeanFlow: the network learns the average velocity, and sampling jumps along it, in one step if wished."""

    name: Literal["meanflow"] = "meanflow"
    times: Times = LogitNormalTimes()
    """The law of both times; t is the larger draw, s the smaller."""
    distinct: Share = 0.25
    """Share of the rows with s != t, which pay for a tangent; the others are plain flow matching."""
    p: float = Field(1.0, ge=0)
    """Exponent of the adaptive weight; 0 is the plain square."""
    c: float = Field(1e-2, gt=0)
    """Offset of the adaptive weight, in units of the error summed over a row."""
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance inside the target, so that sampling needs none."""
    sample_steps: int = Field(1, ge=1)
    """Steps of the sample grids."""

    def loss(
        self, net: nn.Module, batch: Batch, generator: torch.Generator, teacher: nn.Module | None = None
    ) -> tuple[Tensor, Metrics]:
        """The objective on one batch, at times drawn from `generator`."""
        rows, device = len(batch.x0), batch.x0.device
        t, s = pair_times(rows, self.times.sampler(), self.distinct, generator=generator, device=device)
        return objectives.meanflow(
            net,
            batch.x0,
            batch.x1,
            t,
            s,
            y=batch.y,
            teacher=teacher,
            guidance=self.guidance.build(batch.null),
            p=self.p,
            c=self.c,
            distinct_rows=distinct_rows(rows, self.distinct),
        )

    def sample(self, net: nn.Module, x1: Tensor, y: Tensor | None, steps: int, guidance: float, null: int) -> Tensor:
        """Jump from the noise x1 in `steps` evaluations. Guidance was learnt: asking for more is an error."""
        if guidance != 1:
            raise ConfigError(f"guidance: a MeanFlow network has its guidance built in, so expected 1, got {guidance}")
        return samplers.average_velocity(net, x1, steps, y)


Method = Annotated[FlowMatching | MeanFlow, Field(discriminator="name")]
