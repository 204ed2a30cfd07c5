"""Describe a method to a trainer: settings, the times it draws, the call of its objective, what it learns.

A method's settings are one small class. Its fields carry the names of its objective's keywords, so that the base class
can pass them on: what is left to write are the times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, ClassVar

from torch import Tensor

from fastdistill.objectives.objective import Objective
from fastdistill.objectives.settings.context import Context, Run
from fastdistill.objectives.settings.guidance import GuidanceSettings
from fastdistill.objectives.settings.samplers import Sampler, with_sampler_parameters
from fastdistill.samplers import Learnt, Steps
from fastdistill.settings import Bounds, settings
from fastdistill.times import distinct_rows

Decay = Annotated[float, Bounds(ge=0, lt=1)]
# What the context gives by keyword.
PARTS = ("teacher", "weak_teacher", "target", "weighting", "velocity_head", "perceptual", "generator")
Metrics = dict[str, Any]  # detached scalars by name, and under "rows" and "terms" what diagnostics look at


@with_sampler_parameters
@settings
class CommonSettings:
    """Fields that all methods have, up to those of the samplers' parameters, which the decorator adds."""

    name: str
    learned_weight: bool = False
    """Weigh the times by a learned variance, where the objective takes one."""
    velocity_head: bool = False
    """Train a second last layer, which predicts the velocity, beside the network's own; samples don't need it."""
    target_ema: Decay | None = None
    """Decay of the averaged network on the stop-gradient side, where there is one; None: the network, detached."""
    sample_steps: Annotated[int, Bounds(ge=1, le=10_000)] = 1
    """Steps of the sample grids."""
    sampler: Sampler | None = None
    """Of all samples; None: the method's own, see `fastdistill explain`."""


@settings
class MethodSettings(CommonSettings):
    """Settings that the trainer asks of every method. A subclass gives its fields, and `draw_times`."""

    sample_guidance: Annotated[float, Bounds(ge=0)] = 1.0
    """Guidance scale of samples, where the network can still be guided; 1 is none. Any other takes two evaluations."""

    learns: ClassVar[tuple[Learnt, ...]] = ("velocity", "map")
    """What u(x, t, s) becomes: the velocity at s = t (then a run can be a teacher), the map to any s, that to s = 0."""
    has_critic: ClassVar[bool] = False
    """Whether it trains a second network beside the first."""
    makes_pairs: ClassVar[bool] = False
    """Whether its data are noise and where a teacher's flow takes it, rather than data and fresh noise."""
    guides_maps: ClassVar[bool] = False
    """Whether its source guides samples of its map by labels, u_null + scale (u_y - u_null), rather than its target."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Fields that a name fills in, where there is a field `recipe` for the name."""
    row: ClassVar[Objective]
    """The method's own, in the class that the trainer makes of it."""

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fields of a file, with those that a recipe fills in; the file's own hold."""
        recipe = fields.get("recipe")
        return {**cls.presets[recipe], **fields} if isinstance(recipe, str) and recipe in cls.presets else fields

    @classmethod
    def needs_teacher(cls) -> bool:
        """Return whether it can't do without a teacher."""
        return cls.makes_pairs or cls.has_critic or "teacher" in cls.objective().needs

    @classmethod
    def objective(cls) -> Objective:
        """Return its row of the registry."""
        return cls.row

    def loss(self, context: Context) -> tuple[Tensor, Metrics]:
        """Return the objective on one batch, at times drawn from the step's generator."""
        batch, objective = context.batch, self.objective()
        times = self.draw_times(context)
        given = {name: value for name, value in self.keywords(context).items() if name in objective.takes}
        return objective.function(context.net, batch.x0, batch.x1, *times, y=batch.y, path=context.path, **given)

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        """Draw the times of a batch, in the order in which the objective takes them."""
        raise TypeError(f"{type(self).__name__} draws no times")

    def keywords(self, context: Context) -> dict[str, Any]:
        """Return the keywords that the objective takes: fields by their names, and parts of the context.

        A subclass adds what it computes from the step.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        given |= {name: getattr(context, name) for name in PARTS}
        if self.guidance_settings is not None:
            given["guidance"] = self.guidance_settings.build(context)
        if "distinct" in given:
            given["distinct_rows"] = distinct_rows(context.rows, given["distinct"])
        return given

    def sample_times(self, steps: int) -> Steps:
        """Return what the sampler walks in so many steps: equal ones, or the times themselves, falling to 0."""
        return steps

    def has_learnt(self, steps: int) -> bool:
        """Return whether sampling in `steps` steps starts only at times that were trained."""
        return True

    def sampler_for(self, sampler: str, steps: int) -> str:
        """Return the name of the sampler that does what `sampler` means in so many steps, for this method's network."""
        return sampler

    def definition(self, run: Run) -> int | None:
        """Return the number of the definition of a step, counted where it changed; None is the first one.

        A checkpoint holds it: a run whose method has changed since, in what this configuration asks of it, is refused
        rather than continued as something else. The second definition asks a network that is told a scale, and no
        label, at the scale 1.
        """
        return 2 if self.conditions_on_guidance and not run.has_teacher else None

    def check(self, run: Run) -> None:
        """Raise a ConfigError for what the fields don't allow together, or with the rest of the configuration."""

    def why_flat(self) -> str | None:
        """Return why its loss, without a learned weight, tells little to whoever watches it; None: it tells enough."""
        return None

    @property
    def depends_on_steps(self) -> bool:
        """Return whether it has a curriculum over the whole run, which another number of steps would move."""
        return False

    @property
    def guidance_settings(self) -> GuidanceSettings | None:
        """Return the guidance of its target, where it has one."""
        guidance = getattr(self, "guidance", None)
        return guidance if isinstance(guidance, GuidanceSettings) else None

    @property
    def conditions_on_guidance(self) -> bool:
        """Return whether the network is told a scale of guidance."""
        return self.guidance_settings is not None and self.guidance_settings.scale_to is not None
