"""Methods that match laws instead of regressing a velocity: moment matching, score matching, and sCM with scores."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fastdistill.objectives.dmd import dmd_gradient, generator_input, simulate
from fastdistill.objectives.velocity import Guidance
from fastdistill.paths import expand_time
from fastdistill.samplers import Steps, intervals
from fastdistill.times import imm_times
from fastdistill.train.methods.base import Context, GuidanceSettings, Learnt, MethodSettings
from fastdistill.train.methods.consistency import ArctanTimes, ContinuousConsistency
from fastdistill.train.methods.times import FakeLevels, KarrasLevels, Levels, SameLevels, ShiftedLevels
from fastdistill.train.settings import ConfigError, Settings, short

if TYPE_CHECKING:
    from fastdistill.train.config import TrainConfig


class IMM(MethodSettings):
    """Inductive moment matching: jumps from t and from a little nearer to the data must end in the same law."""

    name: Literal["imm"] = "imm"
    group: int = Field(4, ge=1, le=4096)
    """Rows that share their times and are compared as a sample of one law; it divides data.batch."""
    statistic: Literal["v", "u"] = "v"
    """v: biased, never negative; u: unbiased."""
    a: float = Field(2.0, ge=1)
    """Of the weight, see fastdistill.objectives.imm."""
    b: float = 4.0
    """Of the weight."""
    k: float = Field(12.0, ge=0)
    """The second time r lies 2^-k of the range of noise levels nearer to the data."""
    low: float = Field(0.0, ge=0, lt=1)
    """The least time."""
    high: float = Field(0.994, gt=0, le=1)
    """The greatest time, below 1 so that the noise level is finite; samples start there, from the path's noise."""
    sharpness: float | None = Field(None, gt=0)
    """Of the kernel's exponent; None: 1 / (t - s)."""

    learns: ClassVar[tuple[Learnt, ...]] = ("map",)
    guides_maps: ClassVar[bool] = True

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return imm_times(
            context.rows,
            self.group,
            path=context.path,
            k=self.k,
            low=self.low,
            high=self.high,
            generator=context.generator,
            device=context.device,
        )

    def sample_times(self, steps: int) -> Steps:
        return [self.high * (1 - step / steps) for step in range(steps + 1)]

    def check(self, config: TrainConfig) -> None:
        if config.data.batch % self.group:
            raise ConfigError(f"method.group: expected a divisor of data.batch, {config.data.batch}, got {self.group}")


class CriticSettings(Settings):
    """The network of the samples' own score, which starts as the teacher and trains beside the generator."""

    updates: int = Field(5, ge=1, le=10_000)
    """Its updates in each training step, that is, for each update of the generator."""
    warmup_updates: int = Field(0, ge=0)
    """Its updates before the generator's first one, besides."""
    lr: float = Field(1e-3, gt=0)
    """Its learning rate."""
    levels: Levels = KarrasLevels()
    """The law of the noise levels at which the scores are compared. Two numbers: times uniform between them."""
    fake_levels: FakeLevels = KarrasLevels(low=0.0, high=1.0)
    """The law at which the second network is trained, and the discriminator; same: that of `levels`."""
    gan: bool = False
    """Add a discriminator, as DMD2 does: real data then correct what the teacher got wrong."""
    gan_weight: float = Field(3e-3, gt=0)
    """Of the discriminator's part of the generator's loss."""

    @property
    def trained_levels(self) -> Levels:
        """The law at which the second network is trained."""
        return self.levels if isinstance(self.fake_levels, SameLevels) else self.fake_levels

    def check(self) -> None:
        """Raise a ConfigError for a range of levels that is empty."""
        for name in ("levels", "fake_levels"):
            law = getattr(self, name)
            if hasattr(law, "low") and not law.low < law.high:
                raise ConfigError(f"method.critic.{name}: expected low < high, got {law.low:g}, {law.high:g}")


class ConsistentCriticSettings(CriticSettings):
    """The same with rCM's defaults: four updates, as of its five steps one is the student's."""

    updates: int = Field(4, ge=1)
    """Its updates in each training step, that is, for each update of the generator."""
    levels: Levels = ShiftedLevels()
    """The law of the noise levels at which the scores are compared. Two numbers: times uniform between them."""
    fake_levels: FakeLevels = SameLevels()
    """The law at which the second network is trained; same: that of `levels`."""


class ScoreMethod(MethodSettings):
    """What the methods share that train a fake score."""

    critic: CriticSettings = CriticSettings()
    """The second network and its training."""
    generator_times: tuple[float, ...] = (1.0,)
    """The falling times at which the generator starts, 1 first: as many as it shall make steps.

    Sampling in so many steps uses these; any other number of steps are equal ones, at times that it wasn't trained at.
    """
    backward_simulation: bool = True
    """With several times: the generator's inputs are what it makes itself on the way, as in sampling (DMD2)."""

    learns: ClassVar[tuple[Learnt, ...]] = ("end",)
    has_critic: ClassVar[bool] = True

    def check(self, config: TrainConfig) -> None:
        times = self.generator_times
        if not times or times[0] != 1 or times[-1] <= 0 or any(a <= b for a, b in pairwise(times)):
            raise ConfigError(
                f"method.generator_times: expected falling times from 1, above 0, got {short(list(times))}"
            )
        self.critic.check()
        if self.conditions_on_guidance:
            raise ConfigError(
                f"method.guidance.scale_to: {self.name} has one scale, which its generator isn't told; expected "
                f"method.guidance.scale alone"
            )

    def sample_times(self, steps: int) -> Steps:
        return (*self.generator_times, 0.0) if steps == len(self.generator_times) else steps

    def has_learnt(self, steps: int) -> bool:
        return {t for t, _ in intervals(self.sample_times(steps))} <= set(self.generator_times)

    @property
    def starts(self) -> int:
        """The step at which scores begin to take part; until then the second network stays as it is."""
        return 0

    def definition(self, config: TrainConfig) -> int | None:
        return 2  # its samples start from noise alone on every path, and what compares scores has laws of its own

    @property
    def simulated_times(self) -> tuple[float, ...] | None:
        """The times of backward simulation, where it takes part."""
        return self.generator_times if self.backward_simulation and len(self.generator_times) > 1 else None

    def draw_starts(self, context: Context, generator: torch.Generator) -> Tensor:
        """Times (B,) of the generator's own, each with the same probability."""
        times = torch.tensor(self.generator_times)
        return times[torch.randint(len(times), (context.rows,), generator=generator)].to(context.device)

    @torch.no_grad()
    def draw_samples(self, context: Context, generator: torch.Generator) -> Tensor:
        """Samples (B, ...) of the generator as it is, from fresh noise, for the batch's labels."""
        batch = context.batch
        x1 = torch.randn(batch.x1.shape, generator=generator).to(context.device)
        t = self.draw_starts(context, generator)
        if self.simulated_times is None:
            x = generator_input(context.path, batch.x0, x1, t)
        else:
            x = simulate(context.net, x1, t, self.simulated_times, y=batch.y, path=context.path, generator=generator)
        return x - expand_time(t, x) * context.net(x, t=t, s=torch.zeros_like(t), y=batch.y)

    def keywords(self, context: Context) -> dict[str, Any]:
        assert context.critic is not None
        given = super().keywords(context) | {
            "fake": context.critic.fake,
            "levels": self.critic.levels.sampler(context.path),
        }
        if self.critic.gan:
            given |= {"gan": context.critic.gan, "gan_weight": self.critic.gan_weight}
        return given | {"backward_simulation": self.simulated_times}


class DMD(ScoreMethod):
    """Distribution matching: samples move by the difference of two scores, the teacher's and their own."""

    name: Literal["dmd"] = "dmd"
    guidance: GuidanceSettings = GuidanceSettings()
    """Guidance of the teacher."""

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return (self.draw_starts(context, context.generator),)


class RCM(ContinuousConsistency, ScoreMethod):
    """rCM: continuous consistency, which covers all modes, and scores of one-step samples, which sharpen them."""

    name: Literal["rcm"] = "rcm"
    times: ArctanTimes = ArctanTimes(mean=-0.8, std=1.6)
    """The law of the training times t."""
    tangent_warmup: int = Field(1000, ge=0)
    """Steps of the tangent's warm-up; only after them do scores take part, and does the second network train."""
    learned_weight: bool = False
    """Weigh the times by a learned variance; the authors don't, as next to it the score term has no say."""
    critic: ConsistentCriticSettings = ConsistentCriticSettings()
    """The second network and its training."""
    score_weight: float = Field(0.02, ge=0)
    """Of the score term, by means; the authors' weights, 100 and 1 of sums without a half, are 0.02."""

    learns: ClassVar[tuple[Learnt, ...]] = ("end",)

    @property
    def starts(self) -> int:
        return self.tangent_warmup

    def has_learnt(self, steps: int) -> bool:
        return True  # its continuous consistency knows all times

    def check(self, config: TrainConfig) -> None:
        super().check(config)
        if self.generator_times != (1.0,):
            raise ConfigError("method.generator_times: rcm makes its samples in one step, so expected [1]")
        if self.critic.gan:
            raise ConfigError("method.critic.gan: rcm has no discriminator; expected False, or method.name dmd")

    def keywords(self, context: Context) -> dict[str, Any]:
        given = super().keywords(context) | {"score_gradient": partial(self.score_gradient, context)}
        return given | ({"score_weight": 0.0} if context.step < self.starts else {})

    def score_gradient(self, context: Context, samples: Tensor, y: Tensor | None) -> Tensor:
        """The direction in which samples (B, ...) leave the data's law, by the teacher's score and their own."""
        assert context.critic is not None and context.teacher is not None
        noise = torch.randn(samples.shape, generator=context.generator).to(samples)
        tau = self.critic.levels.sampler(context.path)(len(samples), context.generator, samples.device)
        guidance = self.guidance.build(context)
        return dmd_gradient(
            samples,
            noise,
            tau,
            teacher=context.teacher,
            fake=context.critic.fake,
            y=y,
            path=context.path,
            guidance=guidance if isinstance(guidance, Guidance) else None,
        )
