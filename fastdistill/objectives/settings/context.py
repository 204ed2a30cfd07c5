"""Describe to a method the parts of one training step, and the run that its settings must fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdistill.paths import Path
from fastdistill.samplers import Net


class Batch(Protocol):
    """Batch of one training step, on the device of the network."""

    @property
    def x0(self) -> Tensor:
        """Return the data (B, ...)."""
        ...

    @property
    def x1(self) -> Tensor:
        """Return the noise (B, ...)."""
        ...

    @property
    def y(self) -> Tensor | None:
        """Return the labels (B,) int64; None where there are no classes."""
        ...

    @property
    def null(self) -> int:
        """Return the label that stands for "no label"."""
        ...

    @property
    def undropped(self) -> Tensor | None:
        """Return the labels (B,) as they were before some of y became null."""
        ...


class Critic(Protocol):
    """Critic: the second network of the methods that train a score."""

    fake: nn.Module
    """The score of the generator's own samples, as a velocity."""

    @property
    def gan(self) -> Any:
        """Return the discriminator; None where there is none."""
        ...


@dataclass(frozen=True)
class Run:
    """Run as a method's own checks may know it, by its other settings."""

    path: Path
    path_name: str
    """The name that the configuration gives it."""
    rows: int
    """In a batch."""
    label_dropout: float
    """Share of the labels that are replaced by "no label"."""
    has_teacher: bool


@dataclass(frozen=True)
class Context:
    """Context of one training step: all that a method may look at."""

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
        """Return the number of rows in the batch."""
        return len(self.batch.x0)

    @property
    def velocity_head(self) -> Net | None:
        """Return the network with the velocity head's last layer in place of its own; None where there is no head."""
        return None if self.velocity_layer is None else partial(self.net, last_layer=self.velocity_layer)

    @property
    def device(self) -> torch.device:
        """Return where the batch lies."""
        return self.batch.x0.device


def ramp(context: Context, steps: int, limit: float = 1.0) -> float:
    """Return a warm-up factor that grows linearly from 0 to `limit` over `steps` steps; with 0, `limit` at once."""
    return limit if steps == 0 else min(limit, context.step / steps)
