"""Tell what surrounds a call of an op: autocast, grad mode, a compiler, and the driver `fastdistill.jvp`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol import compat

AUTOCASTING = frozenset(name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name))

# Thread -> the functorch level whose tangents keep no graph there. A plain dict, because torch.compile traces no
# context variable; what is compiled has one driver at one level, and the entry COMPILED.
_CONSTANT: dict[int, int] = {}
COMPILED = 0


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast asks for on `device`, or None where it is off or unknown."""
    if device.type in AUTOCASTING and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast doesn't reach matmuls: ops choose their own precision."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def settled(device: torch.device, implementation: Callable[..., Any], *args: Any) -> Any:
    """Call an implementation where autocast doesn't reach it and Triton launches on the tensors' GPU."""
    if autocast_dtype(device) is None and (device.type != "cuda" or device.index == compat.current_cuda_device()):
        return implementation(*args)
    with without_autocast(device), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return implementation(*args)


def _thread() -> int:
    return COMPILED if torch.compiler.is_compiling() else threading.get_ident()


@contextmanager
def tangents_without_grad(level: int) -> Iterator[None]:
    """Make ops under forward AD at that functorch level, on this thread, save nothing for their tangents."""
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
    """Return whether tangents are differentiable here."""
    if torch.compiler.is_compiling():
        return COMPILED not in _CONSTANT
    return _CONSTANT.get(threading.get_ident()) != (compat.maybe_current_level() or 0)


def may_need_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether a gradient may be asked of what these give: yes, where a transform or a compiler hides it."""
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or compat.functorch_active():
        return True
    return any([x is not None and x.requires_grad for x in tensors])
