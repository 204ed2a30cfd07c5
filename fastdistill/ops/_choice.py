"""Which implementation runs, the checks that every op shares, and whether tangents keep a graph."""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdistill import _compat

IMPLEMENTATIONS = ("auto", "torch", "triton", "cuda")
# Asked once: torch.compile of torch 2.11 can't trace these questions.
HAS_TRITON = importlib.util.find_spec("triton") is not None
AUTOCASTING = frozenset(name for name in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(name))


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
    return _CONSTANT.get(threading.get_ident()) != _compat.functorch_level()


def may_need_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient may be asked of what is computed from these: yes, where a transform or a compiler hides it."""
    if not torch.is_grad_enabled():
        return False
    hidden = torch.compiler.is_compiling() or _compat.functorch_active()
    return hidden or any(x is not None and x.requires_grad for x in tensors)


def triton_problem(device: torch.device) -> str | None:
    """Why the Triton kernels can't run on tensors of `device`, or None where they can."""
    if not HAS_TRITON:
        return "the package triton is not installed"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"tensors are on {device.type!r}; Triton needs a CUDA device (or TRITON_INTERPRET=1 to interpret on the CPU)"


def implementation(family: str, chosen: str) -> Any:
    """The module that implements an op family: plain PyTorch, or the Triton kernels, imported when first needed."""
    package = "fastdistill.kernels" if chosen == "triton" else "fastdistill.eager"
    return importlib.import_module(f"{package}.{family}")


def check_impl(impl: str, device: torch.device) -> None:
    """Refuse an unknown implementation, or an explicit one that can't run here: explicit requests never fall back."""
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl == "cuda":
        raise ValueError("impl='cuda': this version has no CUDA extension; use 'triton', 'torch' or 'auto'")
    if impl == "triton" and (problem := triton_problem(device)):
        raise ValueError(f"impl='triton' cannot run: {problem}")


def check_tensor(name: str, x: object) -> None:
    """Refuse what is not a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if x.dtype.itemsize == 1:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Refuse `x` on another device or (unless told otherwise) of another dtype than `other`."""
    if x.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {x.device}")
    if dtype and x.dtype != other.dtype:
        raise ValueError(f"{name}: expected {other.dtype} as {other_name}, got {x.dtype}")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on `device`, or None where it is off or unknown."""
    if device.type in AUTOCASTING and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Ops choose their own precision: inside, autocast doesn't reach their matmuls."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def checked_tangents(
    named: Sequence[tuple[str, Tensor | None, Tensor | None]], tangent_grad: bool
) -> list[Tensor | None]:
    """Tangents of an explicit pair, checked against their primals and in their primals' dtype.

    Each entry is (name of the primal, primal, tangent).
    """
    checked: list[Tensor | None] = []
    for name, primal, tangent in named:
        if tangent is None:
            checked.append(None)
            continue
        check_tensor(f"t_{name}", tangent)
        if primal is None:
            raise ValueError(f"t_{name}: expected None as {name} is None, got a tensor of {tuple(tangent.shape)}")
        if not primal.is_floating_point():
            raise TypeError(f"t_{name}: expected None, as {name} is {primal.dtype}")
        if tangent.shape != primal.shape:
            raise ValueError(f"t_{name}: expected shape {tuple(primal.shape)} as {name}, got {tuple(tangent.shape)}")
        check_like(f"t_{name}", tangent, name, primal, dtype=False)
        if tangent.requires_grad and not tangent_grad and torch.is_grad_enabled():
            raise ValueError(
                f"t_{name} requires grad, which tangent_grad=False would silently drop: "
                f"pass tangent_grad=True, or t_{name}.detach()"
            )
        checked.append(tangent.to(primal.dtype))
    return checked
