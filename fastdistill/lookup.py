"""Find things by where they lie: the modules of a package that hold one, and `package.module:attribute`."""

from __future__ import annotations

import difflib
import importlib
import operator
import pkgutil
from collections.abc import Collection
from typing import Any


class UnresolvedError(ValueError):
    """Error of a reference that points to nothing; the message says why."""


def discover(package: str, attribute: str, helpers: Collection[str]) -> dict[str, Any]:
    """Return an attribute of every module of a package but its helpers, by the module's name.

    Args:
        package: whose modules are looked at; those of its subpackages are not.
        attribute: what each module must hold.
        helpers: the names of the modules that hold none.

    Raises:
        ImportError: a module holds no such attribute, so that what it defines would go unseen.
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
    """Import what a reference names, without calling it.

    Args:
        reference: "package.module:attribute", which `()` may follow. The module's code runs when it is imported.
        what: what the call would make, for messages.

    Raises:
        UnresolvedError: it isn't written so, or can't be imported.
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
    except Exception as error:  # whatever the user's code raises
        missing = isinstance(error, ModuleNotFoundError)
        advice = "; install it, or name the folder of a module of your own in PYTHONPATH" if missing else ""
        raise _unimportable(reference, error, advice) from error
    try:
        return operator.attrgetter(path)(found)
    except Exception as error:  # an attribute may be computed by the user's code
        close = difflib.get_close_matches(path, [name for name in vars(found) if not name.startswith("_")], n=1)
        raise _unimportable(reference, error, f"; did you mean {close[0]!r}?" if close else "") from error


def make(reference: str, what: str, *arguments: Any) -> Any:
    """Import what a reference names, and call it with the arguments where it ends with `()`.

    Raises:
        UnresolvedError: as `find`, or the call raises.
    """
    found = find(reference, what)
    if not reference.endswith("()"):
        return found
    try:
        return found(*arguments)
    except Exception as error:  # whatever the user's code raises
        raise _unimportable(reference, error) from error


def _unimportable(reference: str, error: Exception, advice: str = "") -> UnresolvedError:
    return UnresolvedError(f"expected {reference} to be importable, got {type(error).__name__}: {error}{advice}")
