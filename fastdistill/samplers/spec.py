"""Specify a sampler beside its code: what it needs of a network, what it costs, and which parameters it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Learnt = Literal["velocity", "map", "end"]
"""Names for what a network's u(x, t, s) has learnt: the velocity at s = t, the map to any s, or to 0 alone."""
LEARNT: tuple[Learnt, ...] = ("velocity", "map", "end")


@dataclass(frozen=True)
class Parameter:
    """Number that a sampler takes by keyword; settings, options of the command line and checks follow from it."""

    default: float
    """The value if none is given. If the default is an int, only whole numbers are allowed."""
    low: float
    high: float
    """The largest value; `low` and `high` are both allowed."""
    help: str
    """A phrase for help texts that says what the parameter does."""

    def check(self, name: str, value: float) -> None:
        """Raise a ValueError that begins with `name` if a value is out of range or isn't a number of the right kind."""
        whole = isinstance(self.default, int)
        if isinstance(value, bool) or not self.low <= value <= self.high or (whole and value != int(value)):
            kind = "a whole number " if whole else ""
            raise ValueError(f"{name}: expected {kind}in [{self.low:g}, {self.high:g}], got {value}")


@dataclass(frozen=True)
class Sampler:
    """Specification of one sampler, which its file holds as `SPEC`.

    A sampler of velocities is called as function(velocity, x, steps), any other as function(net, x, steps, y, g=g). A
    sampler that renoises gets `path` and `generator` too. Every sampler gets its parameters by keyword.
    """

    function: Callable[..., Tensor]
    """The function, which has the same name as its file."""
    needs: tuple[Learnt, ...]
    """The kinds of networks that the sampler can use; a network must have learnt at least one of them."""
    evaluations: int | None
    """The number of network evaluations in a step; None if a tolerance decides, and `steps` has no effect on it."""
    renoises: bool | Callable[..., bool] = False
    """True if the sampler adds fresh noise between steps; or a function that tells from the parameters, as keywords."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """The sampler's parameters by name."""

    @property
    def name(self) -> str:
        """Return the name of the sampler, which is that of its function."""
        return self.function.__name__

    @property
    def follows_velocity(self) -> bool:
        """Return whether the sampler integrates a velocity; otherwise it jumps along a map."""
        return self.needs == ("velocity",)

    def serves(self, learnt: tuple[Learnt, ...]) -> bool:
        """Return whether the sampler can use a network that learnt this."""
        return bool(set(self.needs) & set(learnt))

    def adds_noise(self, parameters: Mapping[str, float]) -> bool:
        """Return whether the sampler adds fresh noise between steps at these values of its parameters."""
        return self.renoises if isinstance(self.renoises, bool) else self.renoises(**parameters)


def order(spec: Sampler) -> tuple[int, float, bool, str]:
    """Return the key that sorts a list of samplers.

    Samplers of velocities come first. Within a kind, those with fewer evaluations come first, and then those without
    fresh noise.
    """
    evaluations = math.inf if spec.evaluations is None else spec.evaluations
    return (
        len(LEARNT) * len(spec.needs) + LEARNT.index(spec.needs[0]),
        evaluations,
        spec.renoises is not False,
        spec.name,
    )
