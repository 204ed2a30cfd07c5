"""Make the checked settings of each method: one class a method, `METHODS` by name, and their union."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from fastdistill.objectives import registry
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.settings import MethodSettings
from fastdistill.train.checked import Checked, make_checked, union

__all__ = ["METHODS", "Method", "method_class"]


class Named(Checked):
    """Base of the classes of methods: each is found by the method's name."""

    row: ClassVar[Objective]

    @classmethod
    def objective(cls) -> Objective:
        """Return the row of the registry as it is now: who changes `OBJECTIVES` changes what is trained."""
        return registry.OBJECTIVES.get(cls.row.name, cls.row)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the fields: no module holds the class."""
        return _restored, (self.model_dump(),)


def _restored(fields: Mapping[str, Any]) -> MethodSettings:
    made: Any = METHODS[fields["name"]]
    return made.model_validate(fields)


def method_class(row: Objective) -> Any:
    """Return the class of a method's settings, which checks them, and whose name field chooses it."""
    title = "".join(part.capitalize() for part in row.name.split("_"))
    made = make_checked(title, (Named, row.settings), row.summary, name=(Literal[row.name], row.name))
    made.row = row
    return made


METHODS: dict[str, Any] = {name: method_class(row) for name, row in registry.METHODS.items()}

if TYPE_CHECKING:
    Method = MethodSettings
else:
    Method = Annotated[union(METHODS.values()), Field(discriminator="name")]
