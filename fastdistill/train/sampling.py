"""Samples from a trained network, a pure function of the seed: by the method's own sampler, or another it can serve."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdistill import samplers
from fastdistill.train.config import TrainConfig, couples
from fastdistill.train.data import DATASETS, generator_at
from fastdistill.train.settings import ConfigError

NUMBERS = (1, 2, 4, 8)  # of steps, in which runs are measured and shown
GRID_ROWS, GRID_POINTS = 8, 2000
# What a network must have learnt for each sampler; see `MethodSettings.learns`.
NEEDS = {
    "euler": {"velocity"},
    "heun": {"velocity"},
    "adaptive": {"velocity"},
    "average_velocity": {"map"},
    "gamma": {"map"},
    "consistency": {"map", "end"},
}


@dataclass(frozen=True)
class Sampling:
    """How to sample; None is the method's own."""

    sampler: str | None = None
    """A name of fastdistill.samplers.SAMPLERS."""
    guidance: float | None = None
    """The scale of guidance: an input of the network where it takes one, else classifier-free, by two evaluations: for
    samplers of velocities, and for the jumps of the methods that guide these (`MethodSettings.guides_maps`)."""
    gamma: float | None = None
    """Of the sampler `gamma`: how much of the noise is new, in [0, 1]."""

    def resolve(self, config: TrainConfig, steps: int = 1) -> Sampling:
        """The same with every None filled in; ConfigError names what the run can't serve in so many steps."""
        method = config.method
        sampler = self.sampler or ("gamma" if self.gamma is not None else method.sampler or method.objective().sampler)
        if sampler not in NEEDS:
            raise ConfigError(f"sampler: expected one of {', '.join(NEEDS)}, got {sampler!r}")
        if not NEEDS[sampler] & set(method.learns):
            able = [name for name, needs in NEEDS.items() if needs & set(method.learns)]
            if self.sampler is None and self.gamma is not None:
                raise ConfigError(
                    f"gamma: expected none, for only the sampler gamma takes it and a network of {method.name} serves "
                    f"{', '.join(able)}; got {self.gamma}"
                )
            raise ConfigError(f"sampler: a network of {method.name} serves {', '.join(able)}, got {sampler}")
        gamma = self.gamma
        if sampler == "gamma":
            gamma = method.sample_gamma if gamma is None else gamma
            if not 0 <= gamma <= 1:
                raise ConfigError(f"gamma: expected in [0, 1], got {gamma}")
        elif gamma is not None:
            raise ConfigError(f"gamma: expected none with the sampler {sampler}, for only gamma takes it; got {gamma}")
        guidance = method.sample_guidance if self.guidance is None else self.guidance
        if not math.isfinite(guidance):
            raise ConfigError(f"guidance: expected a finite number, got {guidance}")
        by_pairs = (NEEDS[sampler] == {"velocity"} or method.guides_maps) and not method.conditions_on_guidance
        if guidance != 1 and by_pairs and not config.data.label_dropout:
            raise ConfigError(f"guidance: the run never learnt what no label means, so expected 1, got {guidance}")
        if guidance != 1 and not by_pairs and not method.conditions_on_guidance:
            built_in = "has its guidance built in" if method.guidance_settings is not None else "has no guidance"
            raise ConfigError(f"guidance: a network of {method.name} {built_in}, so expected 1, got {guidance}")
        found = Sampling(sampler, guidance, gamma)
        if steps > found.most_steps(config):
            raise ConfigError(
                f"steps: {sampler} adds fresh noise between steps, while this run matched its noise to its data; "
                f"expected 1, got {steps}"
            )
        return found

    def most_steps(self, config: TrainConfig) -> float:
        """How many steps this sampler, resolved, can make: one where it can't add the noise between two."""
        renoises = self.sampler == "consistency" or (self.sampler == "gamma" and self.gamma != 0)
        coupled = couples(config) or config.path.build().coupling != "independent"
        return 1 if renoises and coupled else math.inf

    def measured_steps(self, config: TrainConfig, numbers: Iterable[int] = NUMBERS) -> list[int]:
        """Those of the numbers that this sampler, resolved, can make and whose starts the method learnt."""
        most, method = self.most_steps(config), config.method
        return [number for number in numbers if number <= most and method.has_learnt(number)]


OWN = Sampling()  # the method's own way throughout


@torch.no_grad()
def draw(
    net: nn.Module,
    config: TrainConfig,
    x1: Tensor,
    y: Tensor | None,
    steps: int,
    how: Sampling = OWN,
    *,
    seed: int = 0,
) -> Tensor:
    """Take unit noise x1 (B, ...) to data (B, ...) in `steps` steps; y (B,) labels or None, all on one device.

    The times are the method's `sample_times`: equal steps from 1, for IMM from its `high`; a generator that was trained
    at so many times starts at those, while in another number of steps it may start where it never learnt to jump. Noise
    that a sampler adds on the way is drawn on the CPU from the seed.
    """
    how = how.resolve(config, steps)
    assert how.sampler is not None and how.guidance is not None
    told = config.method.conditions_on_guidance
    return samplers.sample(
        config.method.sampler_for(how.sampler, steps),
        net,
        x1,
        config.method.sample_times(steps),
        y,
        path=config.path.build(),
        g=how.guidance if told else None,
        scale=1.0 if told else how.guidance,
        null=DATASETS[config.data.name].num_classes,
        generator=generator_at(seed, "renoise"),
        **({} if how.gamma is None else {"gamma": how.gamma}),
    )


def generate(
    net: nn.Module,
    config: TrainConfig,
    count: int,
    *,
    label: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    gamma: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Draw samples the way the run's method does.

    The noise is drawn on the CPU, so that a seed gives the same start on every device.

    Args:
        net: as `load_run` returns it.
        config: of its run.
        count: how many.
        label: one class for all; None: all classes in turn, 0, 1, ... (nothing where the data has none).
        steps: of the sampler; None: the configuration's. See `draw` for the times that they start at.
        sampler, guidance, gamma: see `Sampling`; None: the configuration's.
        seed: of the noise.

    Returns:
        Samples (count, *shape) float32 on the network's device.

    Raises:
        ConfigError: an argument that the run can't serve, by name.
    """
    dataset, how = DATASETS[config.data.name], Sampling(sampler, guidance, gamma)
    classes = dataset.num_classes
    if label is not None and not 0 <= label < classes:
        expected = f"one of 0 to {classes - 1}" if classes else f"none, because {config.data.name} has no labels"
        raise ConfigError(f"label: expected {expected}, got {label}")
    device = next(net.parameters()).device
    x1 = torch.randn(count, *dataset.shape, generator=generator_at(seed, "samples")).to(device)
    y = None
    if classes:
        y = torch.arange(count, device=device) % classes if label is None else x1.new_full((count,), label).long()
    return draw(net, config, x1, y, steps or config.method.sample_steps, how, seed=seed)


def sample_grid(net: nn.Module, config: TrainConfig) -> tuple[Tensor, int]:
    """The samples that a run draws as it trains, always from the same noise, and the columns of their grid."""
    classes = DATASETS[config.data.name].num_classes
    return generate(net, config, classes * GRID_ROWS or GRID_POINTS, seed=config.seed), max(classes, 1)
