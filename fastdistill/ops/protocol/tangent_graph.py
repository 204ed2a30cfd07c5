"""Whether tangents keep a graph here: `fastdistill.jvp` says so for its thread and level."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastdistill.ops.protocol import compat

# Thread -> the functorch level whose tangents keep no graph there. A plain dict, because torch.compile traces no
# context variable; what is compiled has one driver at one level, and the entry COMPILED.
_CONSTANT: dict[int, int] = {}


COMPILED = 0


def _thread() -> int:
    return COMPILED if torch.compiler.is_compiling() else threading.get_ident()


@contextmanager
def tangents_without_grad(level: int) -> Iterator[None]:
    """Inside, on this thread, ops under forward AD at that functorch level save nothing for their tangents."""
    thread = _thread()
    previous = _CONSTANT.get(thread)
    _CONSTANT[thread] = level
    try:
        yield
    finally:
        if previous is None:
            del _CONSTANT[thread]
        else:
            _CONSTANT[thread] = previous


def tangent_grad() -> bool:
    """Whether tangents are differentiable here."""
    if torch.compiler.is_compiling():
        return COMPILED not in _CONSTANT
    return _CONSTANT.get(threading.get_ident()) != compat.functorch_level()
