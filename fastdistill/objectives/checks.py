"""Checks of a training batch: shapes always, values of times only where they can be read for free."""

from __future__ import annotations

from torch import Tensor


def check_batch(x0: Tensor, x1: Tensor, t: Tensor, s: Tensor | None = None, y: Tensor | None = None) -> None:
    """Raise a ValueError that names the first argument that doesn't fit the others.

    Shapes: x0 and x1 alike, (B, ...); t, s and y (B,). Times must satisfy 0 <= s <= t <= 1. They are read on the CPU
    only: on a GPU that would stall the queue at every step, and the laws of `fastdistill.times` guarantee it.
    """
    if x0.ndim < 2 or len(x0) == 0:
        raise ValueError(f"x0: expected shape (B, ...) with at least one row, got {tuple(x0.shape)}")
    if x1.shape != x0.shape:
        raise ValueError(f"x1: expected the shape of x0, {tuple(x0.shape)}, got {tuple(x1.shape)}")
    for name, value in (("t", t), ("s", s), ("y", y)):
        if value is not None and value.shape != x0.shape[:1]:
            raise ValueError(f"{name}: expected shape ({len(x0)},), one entry a row, got {tuple(value.shape)}")
    if not t.is_cpu:
        return
    _check_times("t", t, 0.0, 1.0, "in [0, 1]")
    if s is not None:
        _check_times("s", s, 0.0, t, "in [0, t]")


def _check_times(name: str, value: Tensor, low: float, high: Tensor | float, meaning: str) -> None:
    fits = (value >= low) & (value <= high)
    if not bool(fits.all()):
        raise ValueError(f"{name}: expected times {meaning}, got {value[~fits][0].item()}")
