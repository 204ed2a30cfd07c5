"""Samples from a trained network, a pure function of the seed: by the method's own sampler, or another it can serve."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastdistill import samplers
from fastdistill.data import generator_at
from fastdistill.data.pictures import grid_of
from fastdistill.objectives.settings import MethodSettings, field_of
from fastdistill.samplers import PARAMETERS, SPECS
from fastdistill.settings import ConfigError, nearest
from fastdistill.train.config import TrainConfig, couples

NUMBERS = (1, 2, 4, 8)  # of steps, in which runs are measured and shown


@dataclass(frozen=True, init=False)
class Sampling:
    """Options of sampling; None, or a parameter that isn't given, takes the method's own."""

    sampler: str | None
    """A name of fastdistill.samplers.SPECS."""
    guidance: float | None
    """The scale of guidance: an input of the network where it takes one, else classifier-free, by two evaluations: for
    samplers of velocities, and for the jumps of the methods that guide these (`MethodSettings.guides_maps`)."""
    parameters: Mapping[str, float] = field(hash=False)
    """Of the sampler, by name, such as gamma: see its specification. Given alone, they choose the sampler."""

    def __init__(self, sampler: str | None = None, guidance: float | None = None, **parameters: float | None) -> None:
        for name in parameters:
            if name not in PARAMETERS:
                raise TypeError(f"{name}: expected a parameter of a sampler; {nearest(name, PARAMETERS)}")
        given = {name: value for name, value in parameters.items() if value is not None}
        for name, value in {"sampler": sampler, "guidance": guidance, "parameters": given}.items():
            object.__setattr__(self, name, value)

    def resolve(self, config: TrainConfig, steps: int = 1) -> Sampling:
        """Return the same with every None filled in; ConfigError names what the run can't serve in so many steps."""
        method = config.method
        spec = self._choose(method)
        parameters = {}
        for name, parameter in spec.parameters.items():
            parameters[name] = self.parameters.get(name, getattr(method, field_of(name)))
            try:
                parameter.check(name, parameters[name])
            except ValueError as error:
                raise ConfigError(str(error)) from error
        guidance = method.sample_guidance if self.guidance is None else self.guidance
        if not math.isfinite(guidance):
            raise ConfigError(f"guidance: expected a finite number, got {guidance}")
        by_pairs = (spec.follows_velocity or method.guides_maps) and not method.conditions_on_guidance
        if guidance != 1 and by_pairs and not config.data.label_dropout:
            raise ConfigError(f"guidance: the run never learnt what no label means, so expected 1, got {guidance}")
        if guidance != 1 and not by_pairs and not method.conditions_on_guidance:
            built_in = "has its guidance built in" if method.guidance_settings is not None else "has no guidance"
            raise ConfigError(f"guidance: a network of {method.name} {built_in}, so expected 1, got {guidance}")
        found = Sampling(spec.name, guidance, **parameters)
        if steps > found.most_steps(config):
            raise ConfigError(
                f"steps: {spec.name} adds fresh noise between steps, while this run matched its noise to its data; "
                f"expected 1, got {steps}"
            )
        return found

    def _choose(self, method: MethodSettings) -> samplers.Sampler:
        """Return the sampler: the one that is named, else the method's own, else the one that takes the parameters."""
        able = [name for name, spec in SPECS.items() if spec.serves(method.learns)]
        name = self.sampler or method.sampler or method.objective().sampler
        if self.sampler is None and self.parameters and not self.parameters.keys() <= SPECS[name].parameters.keys():
            takers = samplers.taking(set(self.parameters))
            fit = [taker for taker in takers if taker in able]
            if len(fit) > 1:
                raise ConfigError(f"sampler: expected one of {', '.join(fit)}, which take these parameters, got none")
            parameter, value = next(iter(self.parameters.items()))
            if not takers:
                raise ConfigError(f"{parameter}: expected parameters of one sampler, got {self.parameters}")
            if not fit:
                raise ConfigError(
                    f"{parameter}: expected none, for {_only(takers)} it and a network of {method.name} serves "
                    f"{', '.join(able)}; got {value}"
                )
            name = fit[0]
        if name not in SPECS:
            raise ConfigError(f"sampler: expected one of {', '.join(SPECS)}, got {name!r}")
        if name not in able:
            raise ConfigError(f"sampler: a network of {method.name} serves {', '.join(able)}, got {name}")
        for parameter, value in self.parameters.items():
            if parameter not in SPECS[name].parameters:
                raise ConfigError(
                    f"{parameter}: expected none with the sampler {name}, for {_only(samplers.taking({parameter}))} "
                    f"it; got {value}"
                )
        return SPECS[name]

    @property
    def spec(self) -> samplers.Sampler:
        """Return the specification of the sampler, which must be resolved."""
        assert self.sampler is not None
        return SPECS[self.sampler]

    @property
    def adds_noise(self) -> bool:
        """Return whether this sampler, resolved, adds fresh noise between steps."""
        return self.spec.adds_noise(self.parameters)

    def most_steps(self, config: TrainConfig) -> float:
        """Return how many steps this sampler, resolved, can make: one where it can't add the noise between two."""
        coupled = couples(config) or config.path.build().coupling != "independent"
        return 1 if self.adds_noise and coupled else math.inf

    def measured_steps(self, config: TrainConfig, numbers: Iterable[int] = NUMBERS) -> list[int]:
        """Return those numbers of steps that this sampler, resolved, can make and whose starts the method learnt."""
        most, method = self.most_steps(config), config.method
        return [number for number in numbers if number <= most and method.has_learnt(number)]


def _only(takers: Sequence[str]) -> str:
    """Return the subject and the verb of a sentence that says who alone takes a parameter."""
    return f"only the sampler {takers[0]} takes" if len(takers) == 1 else f"only {', '.join(takers)} take"


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
    name = config.method.sampler_for(how.sampler, steps)
    told = config.method.conditions_on_guidance
    return samplers.sample(
        name,
        net,
        x1,
        config.method.sample_times(steps),
        y,
        path=config.path.build(),
        g=how.guidance if told else None,
        scale=1.0 if told else how.guidance,
        null=config.data.build().num_classes,
        generator=generator_at(seed, "renoise"),
        **{parameter: how.parameters[parameter] for parameter in SPECS[name].parameters},
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
    seed: int = 0,
    **parameters: float | None,
) -> Tensor:
    """Draw samples the way the run's method does.

    The noise is drawn on the CPU, so that a seed gives the same start on every device.

    Args:
        net: as `load_run` returns it.
        config: of its run.
        count: how many.
        label: one class for all; None: all classes in turn, 0, 1, ... (nothing where the data has none).
        steps: of the sampler; None: the configuration's. See `draw` for the times that they start at.
        sampler, guidance: see `Sampling`; None: the configuration's.
        seed: of the noise.
        parameters: of the sampler, such as gamma; see `fastdistill.samplers.PARAMETERS`.

    Returns:
        Samples (count, *shape) float32 on the network's device.

    Raises:
        ConfigError: an argument that the run can't serve, by name.
    """
    dataset, how = config.data.build(), Sampling(sampler, guidance, **parameters)
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
    """Return the samples that a run draws as it trains, always from the same noise, and the columns of their grid."""
    count, columns = grid_of(config.data.build())
    return generate(net, config, count, seed=config.seed), columns
