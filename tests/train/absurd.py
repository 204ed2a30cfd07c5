"""Names of every field of a configuration, and values that none of them was made for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from fastdistill.train import TrainConfig
from fastdistill.train.methods import METHODS

NUMBERS: list[Any] = [-1, 0, 2**31, 2**40, 2**63, 2**64, 10**50, -(2**70), 1e308, -1e308, 5e-324]
OTHERS: list[Any] = [
    float("nan"), float("inf"), None, True, "", "x" * 5000, "\0", [], [1, 2, 3] * 50, {}, {"a": {"b": 1}},
]  # fmt: skip


def leaves(kind: type[BaseModel], place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the place of each field of a class of settings, groups and what is in them; of `method` the group alone."""
    for name, field in kind.model_fields.items():
        yield (*place, name)
        for group in groups_of(field.annotation) if name != "method" else []:
            yield from leaves(group, (*place, name))


def groups_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the classes of settings in a field's type, which may be a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [group for part in get_args(annotation) for group in groups_of(part)]


def all_places() -> list[tuple[str, tuple[str, ...]]]:
    """Return (method, place) of each field of the configuration, once, and of each field of each method."""
    places = [("meanflow", place) for place in leaves(TrainConfig)]
    for name, kind in METHODS.items():
        places += [(name, place) for place in dict.fromkeys(leaves(kind, ("method",)))]
    return places


def planted(fields: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return the fields with a value at a place, and groups made on the way there."""
    name, *rest = place
    if not rest:
        return fields | {name: value}
    group = fields.get(name)
    return fields | {name: planted(group if isinstance(group, dict) else {}, tuple(rest), value)}
