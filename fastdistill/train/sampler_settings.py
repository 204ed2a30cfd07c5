"""The fields of a run's sampler, which follow from the samplers' specifications: `sampler`, and one a parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, create_model

from fastdistill.samplers import PARAMETERS, SPECS, taking
from fastdistill.train.settings import Settings

if TYPE_CHECKING:
    Sampler = str
else:
    Sampler = Literal[tuple(SPECS)]

Group = TypeVar("Group", bound=type[Settings])


def field_of(parameter: str) -> str:
    """Return the name of the setting of a sampler's parameter."""
    return f"sample_{parameter}"


def with_sampler_parameters(group: Group) -> Group:
    """Return a class of settings with a field for each parameter of a sampler after its own."""
    fields: dict[str, Any] = {}
    for name, parameter in PARAMETERS.items():
        takers = taking({name})
        of = f"Of the sampler{'s' * (len(takers) > 1)} {', '.join(takers)}: {parameter.help}."
        field = Field(parameter.default, ge=parameter.low, le=parameter.high, description=of)
        fields[field_of(name)] = (type(parameter.default), field)
    make: Any = create_model
    return make(group.__name__, __base__=group, __module__=group.__module__, __doc__=group.__doc__, **fields)
