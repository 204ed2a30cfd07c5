"""Guidance inside a target, as settings."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from fastdistill.objectives.settings.context import Context
from fastdistill.objectives.velocity import Autoguidance, Guidance
from fastdistill.settings import Bounds, Share, settings


@settings
class GuidanceSettings:
    """Guidance inside the target velocity: by the labels, or by a weak teacher where there is one."""

    scale: Annotated[float, Bounds(gt=0)] = 1.0
    """Effective scale; 1 is none. It is MeanFlow's omega / (1 - kappa), and AYF's lambda."""
    scale_to: Annotated[float | None, Bounds(gt=0)] = None
    """Each row gets a scale of its own, uniform from `scale` to this, and the network is told: needs model.guidance."""
    kappa: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    """How much of the student's own conditional estimate replaces the noisy data velocity. Only without a teacher."""
    interval: tuple[Share, Share] = (0.0, 1.0)
    """The times [t_a, t_b] that are guided."""

    @property
    def active(self) -> bool:
        """Return whether the target differs from the plain velocity."""
        return self.scale != 1 or self.kappa != 0 or self.scale_to is not None

    def draw_scale(self, context: Context) -> float | Tensor:
        """Draw the scale of all rows, or (B,) of each."""
        if self.scale_to is None:
            return self.scale
        share = torch.rand(context.rows, generator=context.generator).to(context.device)
        return self.scale + (self.scale_to - self.scale) * share

    def build(self, context: Context) -> Guidance | Autoguidance | None:
        """Build the objective's argument."""
        if context.weak_teacher is not None:
            return Autoguidance(self.draw_scale(context), self.interval)
        if not self.active:
            return None
        omega = self.draw_scale(context) * (1 - self.kappa)
        return Guidance(omega=omega, kappa=self.kappa, interval=self.interval, null=context.batch.null)
