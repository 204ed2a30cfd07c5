"""Share what the methods have in common that train a second network, the score of their own samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from fastdistill.objectives.settings import (
    Context,
    FakeLevels,
    KarrasLevels,
    Levels,
    MethodSettings,
    Run,
    SameLevels,
    from_pair,
)
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Learnt, Net, Steps, gamma, intervals
from fastdistill.settings import Bounds, ConfigError, settings, short


@settings
class CriticSettings:
    """Settings of the samples' own score, whose network starts as the teacher and trains beside the generator."""

    updates: Annotated[int, Bounds(ge=1, le=10_000)] = 5
    """Its updates in each training step, that is, for each update of the generator."""
    warmup_updates: Annotated[int, Bounds(ge=0)] = 0
    """Its updates before the generator's first one, besides."""
    lr: Annotated[float, Bounds(gt=0)] = 1e-3
    """Its learning rate."""
    levels: Levels = KarrasLevels()
    """The law of the noise levels at which the scores are compared. Two numbers: times uniform between them."""
    fake_levels: FakeLevels = KarrasLevels(low=0.0, high=1.0)
    """The law at which the second network is trained, and the discriminator; same: that of `levels`."""
    gan: bool = False
    """Add a discriminator, as DMD2 does: real data then correct what the teacher got wrong."""
    gan_weight: Annotated[float, Bounds(gt=0)] = 3e-3
    """Of the discriminator's part of the generator's loss."""

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the fields of a file, with a law in the place of two numbers."""
        return {
            name: from_pair(value) if name in ("levels", "fake_levels") else value for name, value in fields.items()
        }

    @property
    def trained_levels(self) -> Levels:
        """Return the law at which the second network is trained."""
        return self.levels if isinstance(self.fake_levels, SameLevels) else self.fake_levels

    def check(self) -> None:
        """Raise a ConfigError for a range of levels that is empty."""
        for name in ("levels", "fake_levels"):
            law = getattr(self, name)
            if hasattr(law, "low") and not law.low < law.high:
                raise ConfigError(f"method.critic.{name}: expected low < high, got {law.low:g}, {law.high:g}")


@settings
class ScoreMethod(MethodSettings):
    """Settings that the methods share that train a fake score."""

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

    def check(self, run: Run) -> None:
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
        """Return the step at which scores begin to take part; until then the second network stays as it is."""
        return 0

    def definition(self, run: Run) -> int | None:
        return 2  # its samples start from noise alone on every path, and what compares scores has laws of its own

    @property
    def simulated_times(self) -> tuple[float, ...] | None:
        """Return the times of backward simulation, where it takes part."""
        return self.generator_times if self.backward_simulation and len(self.generator_times) > 1 else None

    def draw_starts(self, context: Context, generator: torch.Generator) -> Tensor:
        """Draw times (B,) of the generator's own, each with the same probability."""
        times = torch.tensor(self.generator_times)
        return times[torch.randint(len(times), (context.rows,), generator=generator)].to(context.device)

    @torch.no_grad()
    def draw_samples(self, context: Context, generator: torch.Generator) -> Tensor:
        """Draw samples (B, ...) of the generator as it is, from fresh noise, for the batch's labels."""
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


def generator_input(path: Path, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Return the states (B, ...) that a generator starts from at t (B,): x_t, but for t = 1 the sampler's own prior.

    They differ on the paths whose data never fade, such as EDM, where x_1 = x0 + sigma x1 would tell the generator x0.
    """
    return torch.where(expand_time(t == 1, x0), path.prior(x1), path.interpolate(x0, x1, t))


def simulate(
    net: Net,
    x1: Tensor,
    t: Tensor,
    times: Sequence[float],
    *,
    y: Tensor | None = None,
    path: Path = LINEAR,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the generator's own states at t (B,) on its way from noise x1 (B, ...) by jumps to 0 and renoising.

    Args:
        times: falling, 1 first and 0 left out; every t is one of them. On a GPU, where that isn't read, a row with
            another t becomes NaN.
    """
    if not times or times[0] != 1:
        raise ValueError(f"backward_simulation: expected falling times that start at 1, got {list(times)}")
    x = path.prior(x1)
    states, found = torch.full_like(x, torch.nan), torch.zeros_like(t, dtype=torch.bool)
    for start, end in intervals([*times, 0.0]):
        here = (t - start).abs() < 1e-6
        states, found = torch.where(expand_time(here, x), x, states), found | here
        if end > 0:
            x = gamma(net, x, [start, end], y, gamma=1.0, path=path, generator=generator)
    if t.is_cpu and not bool(found.all()):
        raise ValueError(f"t: expected times among {list(times)}, got {t[~found][0].item()}")
    return states
