"""Checks of a training batch: shapes always, values of times only where they can be read for free."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fastdistill.ops.protocol.compat import is_batched
from fastdistill.paths import Path


def check_batch(
    x0: Tensor, x1: Tensor, t: Tensor, s: Tensor | None = None, y: Tensor | None = None, *, end: str = "s"
) -> None:
    """Raise a ValueError that names the first argument that doesn't fit the others.

    Shapes: x0 and x1 alike, (B, ...); t, s and y (B,). Times must satisfy 0 <= s <= t <= 1. They are read on the CPU
    only: on a GPU that would stall the queue at every step, and the laws of `fastdistill.times` guarantee it.

    Args:
        end: what the method calls its second time.
    """
    if x0.ndim < 2 or len(x0) == 0:
        raise ValueError(f"x0: expected shape (B, ...) with at least one row, got {tuple(x0.shape)}")
    if x1.shape != x0.shape:
        raise ValueError(f"x1: expected the shape of x0, {tuple(x0.shape)}, got {tuple(x1.shape)}")
    for name, value in (("t", t), (end, s), ("y", y)):
        if value is not None and value.shape != x0.shape[:1]:
            raise ValueError(f"{name}: expected shape ({len(x0)},), one entry a row, got {tuple(value.shape)}")
    check_times("t", t, 0.0, 1.0, "in [0, 1]")
    if s is not None:
        check_times(end, s, 0.0, t, "in [0, t]")


def check_labels(name: str, labels: Tensor | None, y: Tensor | None) -> None:
    """Refuse labels that aren't the labels y, of the same shape, in another state."""
    if labels is not None and (y is None or labels.shape != y.shape):
        expected = "None without y" if y is None else f"the shape of y, {tuple(y.shape)}"
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(labels.shape)}")


def check_times(name: str, value: Tensor, low: float, high: Tensor | float, meaning: str) -> None:
    """Refuse times outside [low, high], on the CPU."""
    if value.is_cpu:
        _refuse(name, value, (value >= low) & (value <= high), meaning)


def check_apart(t: Tensor, r: Tensor, name: str = "r") -> None:
    """Refuse r that isn't earlier than t in every row, on the CPU: a discretised method learns from the gap."""
    if r.is_cpu:
        _refuse(name, r, r < t, "in [0, t), earlier than t")


def check_after_data(t: Tensor) -> None:
    """Refuse t = 0, on the CPU: a method that always goes to the data has nothing to learn there."""
    if t.is_cpu:
        _refuse("t", t, t > 0, "in (0, 1]")


def check_one_end(t: Tensor, s: Tensor) -> None:
    """Refuse s that is neither 0 nor t, on the CPU, outside of compiled code and of vmap."""
    if s.is_cpu and not torch.compiler.is_compiling() and not (is_batched(t) or is_batched(s)):
        _refuse("s", s, (s == 0) | (s == t), "0 or t, which a network of one time knows")


def check_share(name: str, value: object, low: float = 0.0) -> None:
    """Refuse all but one plain number in [low, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [{low:g}, 1], got {_kind(value)}")
    if not low <= value <= 1:
        raise ValueError(f"{name}: expected a number in [{low:g}, 1], got {value}")


def check_positive(**numbers: float) -> None:
    """Refuse a number that isn't finite and > 0, by its keyword."""
    for name, value in numbers.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Refuse a name that isn't one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_present(name: str, value: object, method: str, what: str) -> None:
    """Refuse None for what a method can't do without."""
    if value is None:
        raise ValueError(f"{name}: expected {what}, which {method} needs, got None")


def check_starts_at_data(path: Path, method: str, advice: str) -> None:
    """Refuse a path whose state at t = 0 isn't the data itself."""
    zero = torch.zeros((), dtype=torch.float64)
    alpha, beta = float(path.alpha(zero)), float(path.beta(zero))
    if abs(alpha - 1) > 1e-6 or abs(beta) > 1e-6:
        found = f"got {type(path).__name__} with alpha(0) = {alpha:g}, beta(0) = {beta:g}"
        raise ValueError(f"path: {method} expects x_0 to be the data, {found}; {advice}")


def _refuse(name: str, value: Tensor, fits: Tensor, meaning: str) -> None:
    if not bool(fits.all()):
        raise ValueError(f"{name}: expected times {meaning}, got {value[~fits][0].item()}")


def _kind(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def check_deterministic(path: Path, method: str, advice: str) -> None:
    """Refuse a path whose states at two times don't share all their noise."""
    if path.stochastic:
        raise ValueError(f"path: {method} expects states that share their noise, got {path}; {advice}")


def check_keeps_data(path: Path, t: Tensor) -> None:
    """Refuse, on the CPU, a time at which the path is noise alone, so that its noise level is infinite."""
    if t.is_cpu and not bool((path.alpha(t) > 1e-12).all()):
        raise ValueError("t: expected times at which the path holds some data, alpha(t) > 0, got one with alpha = 0")


def check_halves(delta: Tensor, finest: int | None) -> float:
    """Return the least gap of a half jump, or 0 without a grid; refuse, on the CPU, halves between 0 and that."""
    if finest is None:
        return 0.0
    if isinstance(finest, bool) or not isinstance(finest, int) or finest < 1:
        raise ValueError(f"finest: expected None or a number of steps, at least 1, got {finest!r}")
    slack = 1e-3 / finest  # times are rounded, and the next length is twice this one
    if delta.is_cpu:
        meaning = f"0 or at least 1 / finest = 1/{finest} (finest=None is for halves of any length)"
        _refuse("delta", delta, (delta == 0) | (delta >= 1 / finest - slack), meaning)
    return 1 / finest + slack


def check_midpoint(value: Tensor | float, rows: int) -> None:
    """Refuse a midpoint that isn't one number, or one a row, in (0, 1); tensors are read on the CPU only."""
    if isinstance(value, Tensor):
        if value.shape not in ((), (rows,)):
            raise ValueError(f"midpoint: expected a number or shape ({rows},), got {tuple(value.shape)}")
        fits = not value.is_cpu or bool(((value > 0) & (value < 1)).all())
    else:
        fits = 0 < value < 1
    if not fits:
        raise ValueError(f"midpoint: expected in (0, 1), got {value}")
