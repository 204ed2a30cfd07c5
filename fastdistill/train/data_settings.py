"""Define the settings of a run's data set: its name, the batch, and whatever fields the set declares for itself."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    field_validator,
)

from fastdistill.data import DATASETS, DataSet, make_data_set
from fastdistill.data.protocol import try_data_set
from fastdistill.data.registry import settings_of
from fastdistill.settings import ConfigError, nearest, short
from fastdistill.train.settings import Settings


def _described(maker: object) -> str:
    return (maker.__doc__ or "").strip().partition("\n")[0].removesuffix(".")


NAMES = "; ".join(f"{name}: {_described(maker)}" for name, maker in DATASETS.items())


class DataSettings(Settings):
    """Data that is learnt. A set may declare more fields, which then stand here too."""

    name: str = Field(
        description=f"{NAMES}. Or package.module:attribute of a set of your own, with () behind it where that has to "
        f"be called to make one."
    )
    batch: Annotated[int, Field(ge=1, le=2**24)] = 128
    """Rows in a step."""
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the labels replaced by "no label": the training of classifier-free guidance."""

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if name not in DATASETS and ":" not in name:
            guess = nearest(name, DATASETS)
            guess = f"; {guess}" if guess.startswith("did you mean") else ""
            raise ValueError(
                f"expected {' or '.join(map(repr, DATASETS))}, or 'package.module:attribute' of a set of your own, got "
                f"{short(name)}{guess}"
            )
        return name

    @property
    def own(self) -> dict[str, Any]:
        """Return the fields that the set declares for itself."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in DataSettings.model_fields}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the fields: the class may be one that is made from a set's own settings, which no module holds."""
        return settings_from, (self.model_dump(),)

    def build(self) -> DataSet:
        """Return the data set, the same object for the same settings; ConfigError says what is wrong with it."""
        try:
            return _build(self)
        except ValueError as error:
            raise ConfigError(f"data.name: {error}") from error

    def fingerprint(self) -> dict[str, Any]:
        """Return what a run's weights depend on besides the settings: the shape of a row, and the number of classes."""
        data = self.build()
        return {"shape": list(data.shape), "num_classes": data.num_classes}

    def try_out(self) -> None:
        """Draw a small batch of a set that doesn't come with fastdistill; ConfigError says what is wrong with it."""
        if self.name not in DATASETS:
            try:
                try_data_set(self.name, self.build())
            except ValueError as error:
                raise ConfigError(f"data.name: {error}") from error


def settings_from(fields: Mapping[str, Any]) -> DataSettings:
    """Return settings from their fields, by the class that the named set asks for."""
    return settings_class(fields["name"]).model_validate(fields)


def changed_fingerprint(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a line for each part of a set's fingerprint that differs, with both values."""
    return [
        f"data.{name}: {short(before[name])} -> {short(after[name])}"
        for name in after
        if name in before and before[name] != after[name]
    ]


def _choose(given: Any, validate: ValidatorFunctionWrapHandler) -> DataSettings:
    """Return the settings as the class that the named set asks for, made anew where another class holds them."""
    name = given.get("name") if isinstance(given, Mapping) else getattr(given, "name", None)
    if not isinstance(name, str) or (name not in DATASETS and ":" not in name):
        return validate(given)
    with _blaming(name):
        kind = settings_class(name)
    if isinstance(given, DataSettings) and not isinstance(given, kind):
        given = given.model_dump(include=set(DataSettings.model_fields))
    chosen = kind.model_validate(given)
    with _blaming(name):
        _build(chosen)
    return chosen


@contextlib.contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Turn a ValueError into pydantic's error of the field `name`."""
    try:
        yield
    except ValueError as error:
        fault: Any = {"type": "value_error", "loc": ("name",), "input": name, "ctx": {"error": error}}
        raise ValidationError.from_exception_data("DataSettings", [fault]) from error


ChosenData = Annotated[SerializeAsAny[DataSettings], WrapValidator(_choose)]


def settings_class(name: str) -> type[DataSettings]:
    """Return the settings of a set: those of all sets, and a field for each of its own dataclass's."""
    own = settings_of(name)
    return DataSettings if own is None else _settings_class(own)


@functools.lru_cache(maxsize=16)
def _settings_class(own: type) -> type[DataSettings]:
    hints, fields = typing.get_type_hints(own, include_extras=True), {}
    for field in dataclasses.fields(own):
        if field.name in DataSettings.model_fields or hasattr(DataSettings, field.name) or field.name.startswith("_"):
            raise ValueError(f"expected {own.__qualname__} to leave the name {field.name} to the trainer")
        default: Any = ... if field.default is dataclasses.MISSING else field.default
        told: dict[str, Any] = {"description": field.metadata.get("help")}
        if field.default_factory is not dataclasses.MISSING:
            fields[field.name] = (hints[field.name], Field(default_factory=field.default_factory, **told))
        else:
            fields[field.name] = (hints[field.name], Field(default, **told))
    make: Any = create_model
    return make(own.__qualname__.replace(".", ""), __base__=DataSettings, __module__=own.__module__, **fields)


_made: dict[tuple[str, str], DataSet] = {}


def _build(settings: DataSettings) -> DataSet:
    """Return the set of some settings; the last few are kept, for each check of a configuration asks."""
    key = (settings.name, settings.model_dump_json(include=set(settings.own)))
    if key not in _made:
        own = settings_of(settings.name)
        data = make_data_set(settings.name, None if own is None else own(**settings.own))
        while len(_made) >= 4:
            _made.pop(next(iter(_made)))
        _made[key] = data
    return _made[key]
