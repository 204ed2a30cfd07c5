"""Find data sets by name: fastdistill's own by the file in this folder, and the user's own by a reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from fastdistill.data.protocol import DataSet, check_protocol
from fastdistill.lookup import discover, find, make

HELPERS = frozenset({"pictures", "protocol", "randomness", "registry"})  # Every other module here is a data set.

DATASETS: dict[str, Callable[..., DataSet]] = discover(__package__ or "", "DATA_SET", HELPERS)


def settings_of(name: str) -> type | None:
    """Return the dataclass of a set's own settings, or None if it has none.

    Args:
        name: a key of `DATASETS`, or "package.module:attribute", which `()` may follow.

    Raises:
        ValueError: The name leads nowhere, or its `Settings` is no dataclass.
    """
    maker = DATASETS[name] if name in DATASETS else find(name, "the data set")
    called = name in DATASETS or name.endswith("()")
    settings = getattr(maker, "Settings", None) if called else None
    if settings is not None and not (isinstance(settings, type) and dataclasses.is_dataclass(settings)):
        raise ValueError(f"expected {name.removesuffix('()')}.Settings to be a dataclass, got {settings!r:.80}")
    return settings


def make_data_set(name: str, settings: Any = None) -> DataSet:
    """Return the data set with this name.

    Args:
        name: a key of `DATASETS`, or "package.module:attribute" of a set. With `()` behind it, the attribute is called
            to make the set. The module is imported, so its code runs.
        settings: an instance of `settings_of(name)`; None takes the defaults, and fits a set without settings.

    Raises:
        ValueError: The name leads nowhere, or to something that doesn't keep the protocol; the message says what is
            missing.
    """
    kind = settings_of(name)
    if kind is not None and settings is None:
        try:
            settings = kind()
        except TypeError as error:
            raise ValueError(f"expected settings of {name}, of which not all have a default: {error}") from error
    arguments = () if kind is None else (settings,)
    if name in DATASETS:
        return check_protocol(name, DATASETS[name](*arguments))
    return check_protocol(name, make(name, "the data set", *arguments))
