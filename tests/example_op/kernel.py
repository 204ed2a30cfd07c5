"""Compute the L2 norm with its tangent, and both its backward passes: a row a program, each element read once.

With n² = sum x² + eps, r = 1 / n, y = r x and Π(u) = r (u - y <y, u>): t_y = Π(t_x), dt_x = Π(dt_y) and
dx = Π(dy) - r (Π(dt_y) <y, t_x> + Π(t_x) <y, dt_y> + r y (<dt_y, t_x> - <y, t_x> <y, dt_y>)).
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .launch import Launch

Pairs = Sequence[tuple[Any, Any]]


def l2_norm_forward(inputs: Pairs, *, eps: float) -> tuple[list[tuple[Any, Any]], tuple[()]]:
    """Return ((y, t_y),), contiguous and in x's dtype, and no residuals; x (..., C) and t_x may have any strides."""
    x, t_x = (None if z is None else z.contiguous() for z in inputs[0])
    y, t_y = torch.empty_like(x), None if t_x is None else torch.empty_like(x)
    if x.numel():
        launch = plan((x, t_x, None, None), (y, t_y), eps)
        _l2_norm_kernel[launch.grid](*launch.args, **launch.options)
    return [(y, t_y)], ()


def l2_norm_backward(
    cotangents: Pairs, inputs: Pairs, saved: Any, *, eps: float, needs: Sequence[tuple[bool, bool]]
) -> list[tuple[Any, Any]]:
    """Return ((dx, dt_x),), those that are needed; a cotangent of None is zero."""
    x, t_x, dy, dt_y = (None if z is None else z.contiguous() for z in (*inputs[0], *cotangents[0]))
    dx, dt_x = (torch.zeros_like(x) if need else None for need in needs[0])
    if x.numel() and (dy is not None or dt_y is not None):
        launch = plan((x, t_x, dy, dt_y), (dx, dt_x), eps)
        _l2_norm_backward_kernel[launch.grid](*launch.args, **launch.options)
    return [(dx, dt_x)]


def plan(inputs: tuple[Any, ...], outputs: tuple[Any, ...], eps: float) -> Launch:
    """Return how to launch either kernel."""
    width = inputs[0].shape[-1]
    block = triton.next_power_of_2(width)
    rows = inputs[0].numel() // width
    options = {"ROWS": 1, "BLOCK_C": block, "num_warps": 4}
    return Launch((rows,), (inputs, outputs, width, eps), options)


@triton.jit
def _load(x, at, live):
    return tl.load(x + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _l2_norm_kernel(IN, OUT, width, eps, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write one row of y and t_y."""
    offs = tl.arange(0, BLOCK_C)
    live, at = offs < width, tl.program_id(0).to(tl.int64) * width + offs
    x = _load(IN[0], at, live)
    r = tl.rsqrt(tl.sum(x * x) + eps)
    y = x * r
    tl.store(OUT[0] + at, y, mask=live)
    if OUT[1] is not None:
        t = _load(IN[1], at, live)
        tl.store(OUT[1] + at, r * (t - y * tl.sum(y * t)), mask=live)


@triton.jit
def _l2_norm_backward_kernel(IN, OUT, width, eps, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Write one row of dx and dt_x."""
    offs = tl.arange(0, BLOCK_C)
    live, at = offs < width, tl.program_id(0).to(tl.int64) * width + offs
    x = _load(IN[0], at, live)
    r = tl.rsqrt(tl.sum(x * x) + eps)
    y = x * r
    dx = tl.zeros([BLOCK_C], tl.float32)
    if IN[2] is not None:
        dy = _load(IN[2], at, live)
        dx += r * (dy - y * tl.sum(y * dy))
    if IN[3] is not None:
        dt_y = _load(IN[3], at, live)
        other = tl.sum(y * dt_y)
        dt_x = r * (dt_y - y * other)
        if OUT[1] is not None:
            tl.store(OUT[1] + at, dt_x, mask=live)
        if IN[1] is not None:
            t = _load(IN[1], at, live)
            along = tl.sum(y * t)
            dx -= r * (dt_x * along + r * (t - y * along) * other + r * y * (tl.sum(dt_y * t) - along * other))
    if OUT[0] is not None:
        tl.store(OUT[0] + at, dx, mask=live)
