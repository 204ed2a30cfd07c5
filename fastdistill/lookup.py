"""Find objects by their place: one in each module of a package, or one at `package.module:attribute`."""

from __future__ import annotations

import difflib
import importlib
import operator
import pkgutil
from collections.abc import Collection
from typing import Any


class UnresolvedError(ValueError):
    """Report a reference that leads nowhere; the message says why."""


def discover(package: str, attribute: str, helpers: Collection[str]) -> dict[str, Any]:
    """Return the attribute of every module of a package except its helpers, by the module's name.

    Args:
        package: the package whose modules are imported; modules of its subpackages are not.
        attribute: the attribute that each module must have.
        helpers: the names of the modules that don't have it.

    Raises:
        ImportError: A module lacks the attribute; its definitions would otherwise go unnoticed.
    """
    found = {}
    for name in sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)):
        if name not in helpers:
            module = importlib.import_module(f"{package}.{name}")
            if not hasattr(module, attribute):
                raise ImportError(f"{package}.{name}: expected {attribute} in every module here but {sorted(helpers)}")
            found[name] = getattr(module, attribute)
    return found


def find(reference: str, what: str) -> Any:
    """Import the object that a reference names, without calling it.

    Args:
        reference: "package.module:attribute", which `()` may follow. The module is imported, so its code runs.
        what: a name for messages of what the call would make, such as "the data set".

    Raises:
        UnresolvedError: The reference isn't written like this, or can't be imported.
    """
    module, _, attribute = reference.partition(":")
    path = attribute.removesuffix("()")
    if not module or not path:
        raise UnresolvedError(
            f"expected 'package.module:attribute', followed by () if that has to be called to make {what}, got "
            f"{reference!r}"
        )
    try:
        found = importlib.import_module(module)
    except Exception as error:  # The user's code may raise anything.
        missing = isinstance(error, ModuleNotFoundError)
        advice = "; install it, or name the folder of a module of your own in PYTHONPATH" if missing else ""
        raise _unimportable(reference, error, advice) from error
    try:
        return operator.attrgetter(path)(found)
    except Exception as error:  # The user's code may compute the attribute, and raise anything.
        close = difflib.get_close_matches(path, [name for name in vars(found) if not name.startswith("_")], n=1)
        raise _unimportable(reference, error, f"; did you mean {close[0]!r}?" if close else "") from error


def make(reference: str, what: str, *arguments: Any) -> Any:
    """Import the object that a reference names, and call it with the arguments if the reference ends with `()`.

    Raises:
        UnresolvedError: The reference leads nowhere, as in `find`, or the call raises.
    """
    found = find(reference, what)
    if not reference.endswith("()"):
        return found
    try:
        return found(*arguments)
    except Exception as error:  # The user's code may raise anything.
        raise _unimportable(reference, error) from error


def _unimportable(reference: str, error: Exception, advice: str = "") -> UnresolvedError:
    return UnresolvedError(f"expected {reference} to be importable, got {type(error).__name__}: {error}{advice}")
