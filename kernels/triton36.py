"""Triton 3.6, the one that torch 2.11 comes with, cannot do what the kernels do with tuples: this lends it the rest.

Four gaps, each of which refuses correct code with an error, and none of which 3.7 has:
- a function can't return None, nor a tuple with a None in it;
- a constant (a stride of 1) inside a tuple inside a tuple is forgotten at the first loop or branch, if the outer tuple
  has a None before it;
- `len` and `is None` fail on a tuple with a None in it;
- a launch takes no tensor descriptors inside tuples.
Whatever 3.6 does by itself it does as before. To be deleted together with support for torch 2.11.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import wraps
from typing import Any

import triton


def mend(version: str = triton.__version__) -> None:
    """Patch Triton if it is 3.6, once."""
    from triton.language import core

    if version.startswith("3.6.") and not hasattr(core._type_for_tuple_values, "__wrapped__"):
        _mend_values(core)
        _mend_returns(core)
        _mend_launches()


def _mend_values(core: Any) -> None:
    """Make tuples with a None in them possible, and keep the types of nested constants."""
    from triton.compiler.code_generator import ASTFunction

    type_of_values, deserialize = core._type_for_tuple_values, ASTFunction.deserialize

    @wraps(type_of_values)
    def type_of_all_values(values, fields=None):
        return type_of_values([core.constexpr(None) if x is None else x for x in values], fields)

    def refresh(value):
        if isinstance(value, core.tuple):
            for x in value.values:
                refresh(x)
            value.type = core._type_for_tuple_values(value.values, value.type.fields)

    @wraps(deserialize)
    def with_fresh_types(self, fn):
        arguments = deserialize(self, fn)
        refresh(arguments)
        return arguments

    core._type_for_tuple_values = type_of_all_values
    ASTFunction.deserialize = with_fresh_types


def _mend_returns(core: Any) -> None:
    """Allow None as a result, which was to become a tensor as numbers do."""
    from triton.compiler.code_generator import CodeGenerator

    visit_return = CodeGenerator.visit_Return

    @wraps(visit_return)
    def return_with_none(self, node):
        to_tensor = self.semantic.to_tensor

        def to_tensor_or_none(x, *rest: Any, **options: Any):
            none = isinstance(x, core.constexpr) and x.value is None
            return x if none else to_tensor(x, *rest, **options)

        self.semantic.to_tensor = to_tensor_or_none
        try:
            return visit_return(self, node)
        finally:
            self.semantic.to_tensor = to_tensor

    CodeGenerator.visit_Return = return_with_none


def _mend_launches() -> None:
    """Launch all that is in tuples as arguments of their own where a descriptor is in a tuple."""
    from triton.backends.nvidia import driver

    make_launcher, wrap = driver.make_launcher, driver.wrap_handle_tensordesc

    @wraps(make_launcher)
    def make_flat_launcher(constants, signature, tensordesc_meta):
        if _nests_descriptors(signature):
            signature = dict(enumerate(_leaves(tuple(signature.values()), tuple(signature.values()))))
        return make_launcher(constants, signature, tensordesc_meta)

    @wraps(wrap)
    def wrap_flat(launcher, signature, tensordesc_meta):
        if not _nests_descriptors(signature):
            return wrap(launcher, signature, tensordesc_meta)
        nested, first = tuple(signature.values()), driver._BASE_ARGS_FORMAT_LEN
        launch = wrap(launcher, dict(enumerate(_leaves(nested, nested))), tensordesc_meta)
        return lambda *args: launch(*args[:first], *_leaves(args[first:], nested))

    driver.make_launcher, driver.wrap_handle_tensordesc = make_flat_launcher, wrap_flat


def _leaves(values: tuple[Any, ...], signature: tuple[Any, ...]) -> Iterator[Any]:
    """Yield the values, one by one, of all tuples that the signature has."""
    for value, kind in zip(values, signature, strict=True):
        if isinstance(kind, tuple):
            yield from _leaves(value, kind)
        else:
            yield value


def _nests_descriptors(signature: Mapping[Any, Any]) -> bool:
    nested = tuple(kind for kind in signature.values() if isinstance(kind, tuple))
    return any(kind.startswith("tensordesc") for kind in _leaves(nested, nested))
