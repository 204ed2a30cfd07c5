"""Classes that check settings, made of the plain dataclasses in which methods write them down."""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Union

from pydantic import Field, create_model, model_validator

from fastdistill.settings import Bounds, meanings
from fastdistill.train.settings import Settings


class Checked(Settings):
    """Base of all checked classes: the plain class may have a say in what a file's fields mean."""

    plain: ClassVar[type]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, fields: Any) -> Any:
        read = getattr(cls, "read", None)
        return fields if read is None or not isinstance(fields, Mapping) else read(fields)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the fields and the plain class: no module holds the checked one."""
        return _restored, (type(self).plain, self.model_dump())


def _restored(plain: type, fields: Mapping[str, Any]) -> Settings:
    return checked(plain).model_validate(fields)


@functools.cache
def checked(plain: type[Any]) -> Any:
    """Return the class that checks a plain group of settings: with its bounds, defaults and meanings, and its methods.

    Where a field holds one of several groups, the field that names their kind decides which one.

    Args:
        plain: a dataclass, as `fastdistill.settings.settings` makes them.
    """
    made = make_checked(plain.__name__, (Checked, plain), plain.__doc__)
    made.plain = plain
    return made


def make_checked(title: str, bases: tuple[type, ...], doc: str | None, /, **others: tuple[Any, Any]) -> Any:
    """Return the class of this title that checks the fields of the last of its bases, a plain group of settings.

    Args:
        others: type and default of fields that are other ones here.
    """
    plain: Any = bases[-1]
    hints, told, found = typing.get_type_hints(plain, include_extras=True), meanings(plain), {}
    for field in dataclasses.fields(plain):
        default = ... if field.default is dataclasses.MISSING else _value(field.default)
        found[field.name] = (_kind(hints[field.name]), Field(default, description=told[field.name]))
    make: Any = create_model
    return make(title, __base__=bases, __module__=plain.__module__, __doc__=doc, **(found | others))


def _value(default: Any) -> Any:
    """Return a default with a checked group in the place of a plain one."""
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return default
    given = {field.name: _value(getattr(default, field.name)) for field in dataclasses.fields(default)}
    return checked(type(default))(**given)


def _kind(hint: Any) -> Any:
    """Return a type with checked groups in the place of plain ones, and pydantic's constraints in that of bounds."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return checked(hint)
    if origin is Annotated:
        kind, *more = inner
        constraints = [Field(**dataclasses.asdict(item)) if isinstance(item, Bounds) else item for item in more]
        return functools.reduce(lambda found, item: Annotated[found, item], constraints, _kind(kind))
    if origin in (Union, types.UnionType):
        groups = [_kind(kind) for kind in inner if dataclasses.is_dataclass(kind)]
        others = [_kind(kind) for kind in inner if not dataclasses.is_dataclass(kind)]
        if len(groups) > 1:
            groups = [Annotated[union(groups), Field(discriminator=_discriminator(groups))]]
        return union([*groups, *others])
    if origin is tuple:
        return tuple[tuple(kind if kind is ... else _kind(kind) for kind in inner)]  # type: ignore[misc]
    return hint


def union(kinds: Iterable[Any]) -> Any:
    """Return the type of whatever is of one of these."""
    return functools.reduce(operator.or_, kinds)


def _discriminator(groups: list[type[Settings]]) -> str:
    """Return the name of the field that has another literal value in each of these groups."""
    return next(
        name
        for name, field in groups[0].model_fields.items()
        if all(
            name in group.model_fields and typing.get_origin(group.model_fields[name].annotation) is Literal
            for group in groups
        )
    )
