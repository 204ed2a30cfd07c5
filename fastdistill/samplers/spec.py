"""Say of a sampler, beside its code, what it needs of a network, what it costs and which numbers it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Learnt = Literal["velocity", "map", "end"]
"""What u(x, t, s) may have become: the velocity at s = t, the map to any s, or the map to s = 0 alone."""
LEARNT: tuple[Learnt, ...] = ("velocity", "map", "end")


@dataclass(frozen=True)
class Parameter:
    """Number that a sampler takes by keyword; settings, options of the command line and checks follow from it."""

    default: float
    """Taken where nobody gives another; a whole number here means that only whole numbers are allowed."""
    low: float
    high: float
    """The range, both ends included."""
    help: str
    """What it does, as a phrase for help texts."""

    def check(self, name: str, value: float) -> None:
        """Raise a ValueError that begins with `name` where a value is out of range or of another kind."""
        whole = isinstance(self.default, int)
        if isinstance(value, bool) or not self.low <= value <= self.high or (whole and value != int(value)):
            kind = "a whole number " if whole else ""
            raise ValueError(f"{name}: expected {kind}in [{self.low:g}, {self.high:g}], got {value}")


@dataclass(frozen=True)
class Sampler:
    """Specification of one sampler, which its file holds as `SPEC`.

    A sampler of velocities is called as function(velocity, x, steps), any other as function(net, x, steps, y, g=g); one
    that renoises gets path and generator too, and all get their parameters, each by keyword.
    """

    function: Callable[..., Tensor]
    """The function itself, whose name is that of its file."""
    needs: tuple[Learnt, ...]
    """What a network must have learnt; one of these is enough."""
    evaluations: int | None
    """Of the network in a step; None: as many as its tolerance asks for, and the number of steps says nothing."""
    renoises: bool | Callable[..., bool] = False
    """Whether it adds fresh noise between steps, or a function of its parameters, by keyword, that tells."""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    """Its parameters by name."""

    @property
    def name(self) -> str:
        """Return the name, which is that of the function."""
        return self.function.__name__

    @property
    def follows_velocity(self) -> bool:
        """Return whether it integrates a velocity rather than jump along a map."""
        return self.needs == ("velocity",)

    def serves(self, learnt: tuple[Learnt, ...]) -> bool:
        """Return whether a network that learnt this is enough."""
        return bool(set(self.needs) & set(learnt))

    def adds_noise(self, parameters: Mapping[str, float]) -> bool:
        """Return whether it adds fresh noise between steps at these values of its parameters."""
        return self.renoises if isinstance(self.renoises, bool) else self.renoises(**parameters)


def order(spec: Sampler) -> tuple[int, float, bool, str]:
    """Return the key by which samplers are listed: those of velocities first, then cheap ones, then plain ones."""
    evaluations = math.inf if spec.evaluations is None else spec.evaluations
    return (
        len(LEARNT) * len(spec.needs) + LEARNT.index(spec.needs[0]),
        evaluations,
        spec.renoises is not False,
        spec.name,
    )
