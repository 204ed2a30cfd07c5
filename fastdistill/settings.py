"""Plain settings: frozen dataclasses whose fields say their bounds and what they mean, and the words of their errors.

A group of settings is a dataclass with a string under each field:

    @settings
    class Times:
        "Times between two."

        low: Annotated[float, Bounds(ge=0)] = 0.0
        "The least time."

Here they are only written down; `fastdistill.train.checked` makes classes of them that check types and bounds.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, dataclass_transform

Group = TypeVar("Group", bound=type)


class ConfigError(ValueError):
    """Error of a configuration that can't be run: it names the field, what was expected and what came."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, as an annotation of its type: `Annotated[float, Bounds(gt=0)]`; None is no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None


Share = Annotated[float, Bounds(ge=0, le=1)]


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(group: Group) -> Group:
    """Turn a class into a frozen dataclass, whose fields are given by keyword."""
    frozen: Any = dataclass(frozen=True, kw_only=True)
    return frozen(group)


def meanings(group: type) -> dict[str, str | None]:
    """Return what each field of a group means: the string under it where it was last declared, or its metadata."""
    found: dict[str, str | None] = {}
    for kind in reversed(group.__mro__):
        told = _strings(sys.modules[kind.__module__]).get(kind.__qualname__, {})
        found |= {name: told.get(name) for name in vars(kind).get("__annotations__", ())}
    for field in dataclasses.fields(group):
        if "help" in field.metadata:
            found[field.name] = field.metadata["help"]
    return found


@functools.cache
def _strings(module: Any) -> dict[str, dict[str, str]]:
    """Return the strings under the fields of each class at the top of a module's source."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # a module without source, such as builtins, or one that is typed in
        return {}
    found: dict[str, dict[str, str]] = {}
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        told = found.setdefault(kind.name, {})
        for line, after in zip(kind.body, kind.body[1:]):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and isinstance(text, str):
                told[line.target.id] = inspect.cleandoc(text)
    return found


class _Shortener(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 80, 80

    def repr_int(self, x: int, level: int) -> str:
        """Shorten what Python refuses to print: a number of thousands of digits."""
        return repr(x) if x.bit_length() < 200 else f"a whole number of {x.bit_length()} bits"


def short(value: object) -> str:
    """Return the repr of a value, cut to what a message has room for: wrong values may be of any size."""
    return _Shortener().repr(value)


def nearest(name: object, known: Mapping[str, Any]) -> str:
    """Return `did you mean 'steps'?`, or the whole list where nothing is near."""
    close = difflib.get_close_matches(name if isinstance(name, str) and len(name) < 80 else short(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
