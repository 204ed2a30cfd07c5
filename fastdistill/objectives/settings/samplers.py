"""Derive the settings of a run's sampler from the samplers' specifications: `sampler`, and one a parameter."""

from __future__ import annotations

from dataclasses import field, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastdistill.samplers import PARAMETERS, SPECS, taking
from fastdistill.settings import Bounds

if TYPE_CHECKING:
    Sampler = str
else:
    Sampler = Literal[tuple(SPECS)]

Group = TypeVar("Group", bound=type)


def field_of(parameter: str) -> str:
    """Return the name of the setting of a sampler's parameter."""
    return f"sample_{parameter}"


def with_sampler_parameters(group: Group) -> Group:
    """Return a class of settings with a field for each parameter of a sampler after its own."""
    added: list[tuple[str, Any, Any]] = []
    for name, parameter in PARAMETERS.items():
        takers = taking({name})
        of = f"Of the sampler{'s' * (len(takers) > 1)} {', '.join(takers)}: {parameter.help}."
        kind: Any = Annotated[type(parameter.default), Bounds(ge=parameter.low, le=parameter.high)]
        added.append((field_of(name), kind, field(default=parameter.default, metadata={"help": of})))
    make: Any = make_dataclass
    more = {"__module__": group.__module__, "__doc__": group.__doc__}
    return make(group.__name__, added, bases=(group,), namespace=more, frozen=True, kw_only=True)
