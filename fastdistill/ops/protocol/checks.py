"""Checks that every op shares: a refusal names the argument, what was expected and what came."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastdistill.ops.protocol import compat

Params = ParamSpec("Params")


Result = TypeVar("Result")


def accepts_x(op: Callable[Params, Result]) -> Callable[Params, Result]:
    """Let `op` take `x` as another name of its first argument, which PyTorch, and so its signature, calls `input`."""

    @wraps(op)
    def renamed(*args: Params.args, **kwargs: Params.kwargs) -> Result:
        if "x" in kwargs:
            if args or "input" in kwargs:
                raise TypeError(f"x: {op.__name__} takes it as another name of input, got both")
            kwargs["input"] = kwargs.pop("x")
        return op(*args, **kwargs)

    return renamed


def check_tensor(name: str, x: object) -> None:
    """Refuse what is not a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")
    if x.dtype.itemsize == 1:
        raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}")


def number(name: str, value: Any) -> float:
    """Return a number as a float; of tensors only a constant, because the derivatives of any other would be lost."""
    if isinstance(value, int | float | torch.SymInt | torch.SymFloat | numbers.Real):
        return float(value)
    if isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad and not compat.has_tangent(value):
        return float(value)
    raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def whole(name: str, value: Any, least: int) -> int:
    """Return a whole number from `least` up as an int, of Python's own or NumPy's; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{name}: expected a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected {least} or more, got {value}")
    return value if isinstance(value, torch.SymInt) else int(value)  # type: ignore[return-value]


def check_bool(name: str, value: object) -> None:
    """Refuse what is neither True nor False, such as a word, each of which Python takes for True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """Refuse `x` on another device or (unless told otherwise) of another dtype than `other`."""
    if x.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {x.device}")
    if dtype and x.dtype != other.dtype:
        raise ValueError(f"{name}: expected {other.dtype} as {other_name}, got {x.dtype}")


def checked_tangents(
    named: Sequence[tuple[str, Tensor | None, Tensor | None]], tangent_grad: bool
) -> list[Tensor | None]:
    """Return the tangents of an explicit pair, checked against their primals and in their primals' dtype.

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
