"""Tell whether tangents keep a graph here, as `fastdistill.jvp` says for its thread, and if gradients may follow."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

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


def may_need_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient may be asked of what is computed from these: yes, where a transform or a compiler hides it."""
    if not torch.is_grad_enabled():
        return False
    hidden = torch.compiler.is_compiling() or compat.functorch_active()
    return hidden or any(x is not None and x.requires_grad for x in tensors)
