"""What a method is to the trainer: settings, the times it draws, the call of its objective, its sampler.

A method is one small class of settings. Its fields carry the names of its objective's keywords, so that the base class
can pass them on: what is left to write are the times. See `fastdistill.objectives.OBJECTIVES` for what each takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fastdistill import objectives
from fastdistill.data import Batch
from fastdistill.objectives import Objective
from fastdistill.objectives.velocity import Autoguidance, Guidance
from fastdistill.paths import Path
from fastdistill.samplers import Learnt, Net, Steps
from fastdistill.times import distinct_rows
from fastdistill.train.sampler_settings import Sampler, with_sampler_parameters
from fastdistill.train.settings import Settings

if TYPE_CHECKING:
    from fastdistill.train.config import TrainConfig
    from fastdistill.train.critic import Critic

Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
# What the context gives by keyword.
PARTS = ("teacher", "weak_teacher", "target", "weighting", "velocity_head", "perceptual", "generator")
Metrics = dict[str, Any]  # detached scalars by name, and under "rows" and "terms" what diagnostics look at


@dataclass(frozen=True)
class Context:
    """All that a method may look at in one training step."""

    net: nn.Module
    batch: Batch
    generator: torch.Generator
    """For times and whatever else the step draws; on the CPU, a function of the seed and the step."""
    seed: int
    step: int
    """Steps done before this one."""
    steps: int
    """Steps of the whole run."""
    path: Path
    teacher: nn.Module | None = None
    weak_teacher: nn.Module | None = None
    target: nn.Module | None = None
    """The averaged network that stands on the stop-gradient side; None: the network itself, detached."""
    weighting: nn.Module | None = None
    """The learned log-variance, weighting(t, s) -> (B,)."""
    velocity_layer: nn.Module | None = None
    """The last layer of the velocity head, whose other layers are those of `net`."""
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    """The user's distance, perceptual(a, b) -> one value a row."""
    critic: Critic | None = None
    """The second network of the methods that have one."""

    @property
    def rows(self) -> int:
        """Rows in the batch."""
        return len(self.batch.x0)

    @property
    def velocity_head(self) -> Net | None:
        """The network with the velocity head's last layer in the place of its own; None where there is no head."""
        return None if self.velocity_layer is None else partial(self.net, last_layer=self.velocity_layer)

    @property
    def device(self) -> torch.device:
        """Where the batch lies."""
        return self.batch.x0.device


class GuidanceSettings(Settings):
    """Guidance inside the target velocity: by the labels, or by a weak teacher where there is one."""

    scale: float = Field(1.0, gt=0)
    """Effective scale; 1 is none. It is MeanFlow's omega / (1 - kappa), and AYF's lambda."""
    scale_to: float | None = Field(None, gt=0)
    """Each row gets a scale of its own, uniform from `scale` to this, and the network is told: needs model.guidance."""
    kappa: float = Field(0.0, ge=0, lt=1)
    """How much of the student's own conditional estimate replaces the noisy data velocity. Only without a teacher."""
    interval: tuple[Share, Share] = (0.0, 1.0)
    """The times [t_a, t_b] that are guided."""

    @property
    def active(self) -> bool:
        """Whether the target differs from the plain velocity."""
        return self.scale != 1 or self.kappa != 0 or self.scale_to is not None

    def draw_scale(self, context: Context) -> float | Tensor:
        """The scale of all rows, or (B,) of each."""
        if self.scale_to is None:
            return self.scale
        share = torch.rand(context.rows, generator=context.generator).to(context.device)
        return self.scale + (self.scale_to - self.scale) * share

    def build(self, context: Context) -> Guidance | Autoguidance | None:
        """The objective's argument."""
        if context.weak_teacher is not None:
            return Autoguidance(self.draw_scale(context), self.interval)
        if not self.active:
            return None
        omega = self.draw_scale(context) * (1 - self.kappa)
        return Guidance(omega=omega, kappa=self.kappa, interval=self.interval, null=context.batch.null)


@with_sampler_parameters
class CommonSettings(Settings):
    """Fields that all methods have, up to those of the samplers' parameters, which the decorator adds."""

    name: str
    learned_weight: bool = False
    """Weigh the times by a learned variance, where the objective takes one."""
    velocity_head: bool = False
    """Train a second last layer, which predicts the velocity, beside the network's own; samples don't need it."""
    target_ema: Decay | None = None
    """Decay of the averaged network on the stop-gradient side, where there is one; None: the network, detached."""
    sample_steps: int = Field(1, ge=1, le=10_000)
    """Steps of the sample grids."""
    sampler: Sampler | None = None
    """Of all samples; None: the method's own, see `fastdistill explain`."""


class MethodSettings(CommonSettings):
    """What the trainer asks of every method. A subclass gives its fields, and `draw_times`."""

    sample_guidance: float = Field(1.0, ge=0)
    """Guidance scale of samples, where the network can still be guided; 1 is none. Any other takes two evaluations."""

    learns: ClassVar[tuple[Learnt, ...]] = ("velocity", "map")
    """What u(x, t, s) becomes: the velocity at s = t (then a run can be a teacher), the map to any s, that to s = 0."""
    has_critic: ClassVar[bool] = False
    """Whether it trains a second network beside the first."""
    makes_pairs: ClassVar[bool] = False
    """Whether its data are noise and where a teacher's flow takes it, rather than data and fresh noise."""
    guides_maps: ClassVar[bool] = False
    """Whether its source guides samples of its map by labels, u_null + scale (u_y - u_null), rather than its target."""
    own_sources: ClassVar[tuple[str, ...]] = ()
    """Papers beside those of its objective."""
    learned_from: ClassVar[str | None] = None
    """The objective's name, where it isn't the method's own."""

    @classmethod
    def needs_teacher(cls) -> bool:
        """Whether it can't do without one."""
        return cls.makes_pairs or cls.has_critic or "teacher" in cls.objective().needs

    @classmethod
    def objective(cls) -> Objective:
        """Its row of the registry."""
        return objectives.get(cls.learned_from or cls.model_fields["name"].default)

    def loss(self, context: Context) -> tuple[Tensor, Metrics]:
        """The objective on one batch, at times drawn from the step's generator."""
        batch, objective = context.batch, self.objective()
        times = self.draw_times(context)
        given = {name: value for name, value in self.keywords(context).items() if name in objective.takes}
        return objective.function(context.net, batch.x0, batch.x1, *times, y=batch.y, path=context.path, **given)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        """The times of a batch, in the order in which the objective takes them."""
        raise TypeError(f"{type(self).__name__} draws no times")

    def keywords(self, context: Context) -> dict[str, Any]:
        """Keywords for the objective, of which those are passed that it takes: fields by their names, and the context.

        A subclass adds what it computes from the step.
        """
        given = {name: getattr(self, name) for name in type(self).model_fields}
        given |= {name: getattr(context, name) for name in PARTS}
        if self.guidance_settings is not None:
            given["guidance"] = self.guidance_settings.build(context)
        if "distinct" in given:
            given["distinct_rows"] = distinct_rows(context.rows, given["distinct"])
        return given

    def sample_times(self, steps: int) -> Steps:
        """What the sampler walks in so many steps: equal ones, or the times themselves, falling to 0."""
        return steps

    def has_learnt(self, steps: int) -> bool:
        """Whether it learnt all times at which so many steps start; others are possible, and no measure of it."""
        return True

    def sampler_for(self, sampler: str, steps: int) -> str:
        """The name of the sampler that does what `sampler` means in so many steps, for a network of this method."""
        return sampler

    def definition(self, config: TrainConfig) -> int | None:
        """Return the number of the definition of a step, counted where it changed; None is the first one.

        A checkpoint holds it: a run whose method has changed since, in what this configuration asks of it, is refused
        rather than continued as something else. The second definition asks a network that is told a scale, and no
        label, at the scale 1.
        """
        return 2 if self.conditions_on_guidance and config.teacher is None else None

    def check(self, config: TrainConfig) -> None:
        """Raise a ConfigError for what the fields don't allow together, or with the rest of the configuration."""

    @property
    def depends_on_steps(self) -> bool:
        """Whether it has a curriculum over the whole run, which another number of steps would move."""
        return False

    @property
    def guidance_settings(self) -> GuidanceSettings | None:
        """The guidance of its target, where it has one."""
        guidance = getattr(self, "guidance", None)
        return guidance if isinstance(guidance, GuidanceSettings) else None

    @property
    def conditions_on_guidance(self) -> bool:
        """Whether the network is told a scale of guidance."""
        return self.guidance_settings is not None and self.guidance_settings.scale_to is not None


def ramp(context: Context, steps: int, limit: float = 1.0) -> float:
    """A warm-up factor that grows linearly from 0 to `limit` over the first `steps` steps; 0 steps: `limit` at once."""
    return limit if steps == 0 else min(limit, context.step / steps)
